"""Photographs to choose settings on: animals, buildings, tools, landscapes, people, each a different one.

    python studies/photos/prepare.py           # writes studies/photos/data/photos.zip: 256 of them, as they come

Needs apt-get (for `apt-get download`, without root) and dpkg-deb. They are those of seven activities of GCompris in
Debian's gcompris-qt-data; most are CC-BY-SA or in the public domain, its copyright file says which. None is in this
repository, and none is seen by a model that ships.
"""

from __future__ import annotations

import io
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

DATA = Path(__file__).parent / "data"
ACTIVITIES = (
    *("categorization", "explore_farm_animals", "explore_monuments", "explore_world_animals"),
    *("explore_world_music", "erase", "details"),
)
LEAST_SIDE = 200
ALIKE = 0.98
"""Correlation of two photographs, in 8×8 cells, from which on the second is taken for the first again."""


def main() -> None:
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["apt-get", "download", "-qq", "gcompris-qt-data"], cwd=folder, check=True)
        (package,) = folder.glob("gcompris-qt-data_*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "out"], cwd=folder, check=True)
        found = [
            (f"{activity}-{number:03d}.webp", content)
            for activity in ACTIVITIES
            for number, content in enumerate(
                webps((folder / f"out/usr/share/gcompris-qt/rcc/{activity}.rcc").read_bytes())
            )
        ]
    new = different([Image.open(io.BytesIO(content)) for _, content in found])
    with zipfile.ZipFile(DATA / "photos.zip", "w") as archive:
        for (name, content), is_new in zip(found, new):
            if is_new:
                archive.writestr(name, content)
    print(f"{sum(new)} photographs: {DATA / 'photos.zip'}")


def load_photos() -> list[Image.Image]:
    """RGB, of different sizes."""
    with zipfile.ZipFile(DATA / "photos.zip") as archive:
        return [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in archive.namelist()]


def webps(resources: bytes) -> Iterator[bytes]:
    """The WebP files in a Qt resource file that are no drawings: those without transparency, large enough."""
    at = resources.find(b"RIFF")
    while at >= 0:
        length = 8 + struct.unpack("<I", resources[at + 4 : at + 8])[0]
        content = resources[at : at + length]
        if content[8:12] == b"WEBP":
            image = Image.open(io.BytesIO(content))
            if image.mode == "RGB" and min(image.size) >= LEAST_SIDE:
                yield content
        at = resources.find(b"RIFF", at + 4)


def different(images: list[Image.Image]) -> list[bool]:
    """Whether each is like none before it."""
    cells = [torch.tensor(list(image.convert("RGB").resize((8, 8)).tobytes())).float() for image in images]
    centred = torch.stack([each - each.mean() for each in cells])
    units = torch.nn.functional.normalize(centred, dim=1)
    return [not bool((units[:number] @ unit > ALIKE).any()) for number, unit in enumerate(units)]


if __name__ == "__main__":
    main()
