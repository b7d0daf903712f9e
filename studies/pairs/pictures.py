"""Drawings on photographs as the frozen ViT sees them, and the words for them: what the dual encoder learns from.

    python studies/pairs/pictures.py           # writes studies/pairs/data/features.{pt,json}; half an hour on two cores

Needs studies/scenes/data (studies/scenes/prepare.py), apt-get and dpkg-deb. Beside the five vendors' emoji:

  Debian openclipart-svg (public domain): drawings with a title and subjects
  Debian tuxpaint-stamps-default (GPL-2+): captioned cut-outs of photographs, and drawings

A fifth of the emoji, chosen by `unseen`, is left out for evaluation, whoever drew them; so is Twemoji. Features are CLS
and the mean of the patches after the ViT's tenth block.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "scenes"))
from features import load_drawings
from prepare import DATA as SCENES
from prepare import VENDORS

from turbovlm.zoo import preprocess
from turbovlm.zoo.dual_encoder import unseen
from turbovlm.zoo.reader import scene_encoder
from turbovlm.zoo.scenes import on_photo
from turbovlm.zoo.sprites import load_sprites

DATA = Path(__file__).parent / "data"
COPIES = {"emoji": 4, "clipart": 2, "stamp": 4}
"""Pictures of each drawing, on different photographs."""
BATCH, SIDE = 32, 224


@dataclass(frozen=True)
class Item:
    """A drawing and its words: a title, and others. `concept` is an emoji's code."""

    source: str
    concept: str | None
    title: str
    tags: tuple[str, ...]
    picture: Image.Image


def main() -> None:
    DATA.mkdir(exist_ok=True)
    _, photos = load_drawings()
    encoder = scene_encoder().to(torch.bfloat16)
    chance = random.Random(0)
    about, features, ready = [], [], []

    def flush() -> None:
        with torch.inference_mode():
            out = encoder(pixel_values=preprocess(ready).to(torch.bfloat16)).last_hidden_state.float()
        features.append(torch.cat([out[:, 0], out[:, 1:].mean(dim=1)], dim=1).half())
        ready.clear()

    for item in tqdm(items(), unit=" drawings"):
        for _ in range(COPIES[item.source]):
            ready.append(on_photo(item.picture, photos, chance))
            about.append({"source": item.source, "concept": item.concept, "title": item.title, "tags": item.tags})
            if len(ready) == BATCH:
                flush()
    if ready:
        flush()
    torch.save(torch.cat(features), DATA / "features.pt")
    (DATA / "features.json").write_text(json.dumps(about))


def items() -> Iterator[Item]:
    for vendor in VENDORS:
        if vendor == "twemoji":
            continue
        for s in load_sprites(SCENES / f"{vendor}.zip"):
            if not unseen(s.code):
                yield Item("emoji", s.code, s.label, s.tags, s.picture)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from cliparts(unpack("openclipart-svg", folder) / "openclipart" / "svg")
        yield from stamps(unpack("tuxpaint-stamps-default", folder) / "tuxpaint" / "stamps")


def unpack(package: str, folder: Path) -> Path:
    """A Debian package's /usr/share."""
    subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    (file,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", file.name, package], cwd=folder, check=True)
    return folder / package / "usr" / "share"


def cliparts(folder: Path) -> Iterator[Item]:
    """Those with a title of letters, no flags."""
    import resvg_py

    subject = "{http://purl.org/dc/elements/1.1/}"
    item = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
    titles = set()
    for path in sorted(folder.rglob("*.svg")):
        if "flag" in str(path) or path.stat().st_size > 400_000:
            continue
        try:
            root = ET.parse(path).getroot()
        except ET.ParseError:
            continue
        title = words(next((t.text or "" for t in root.iter(f"{subject}title")), ""))
        key = (title, path.name)
        if not title or key in titles:
            continue
        titles.add(key)
        tags = [words(entry.text or "") for entry in root.iter(item)]
        folders = [words(part) for part in path.relative_to(folder).parts[:-1]]
        try:
            png = resvg_py.svg_to_bytes(svg_path=str(path), width=SIDE)
            picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        except (ValueError, OSError):
            continue
        if picture.getchannel("A").getextrema()[1] and max(picture.size) < 8 * min(picture.size):
            yield Item("clipart", None, title, tuple(filter(None, [*folders, *tags[1:]])), square(picture))


def stamps(folder: Path) -> Iterator[Item]:
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        if not text.exists() or "symbols" in path.parts:
            continue
        title = text.read_text(errors="replace").splitlines()[0].strip().rstrip(".!")
        folders = path.relative_to(folder).parts[:-1]
        yield Item("stamp", None, title, tuple(folders), square(Image.open(path).convert("RGBA")))


def words(text: str) -> str:
    """Spaces for underscores and hyphens, no digits; nothing if what is left is no word."""
    plain = re.sub(r"[\d_\-.]+", " ", text).strip().lower()
    plain = " ".join(plain.split())
    return plain if re.fullmatch(r"[a-z' ,()&]{3,60}", plain) else ""


def square(picture: Image.Image) -> Image.Image:
    """Cut to what is drawn, on a transparent square."""
    cut = picture.crop(picture.getchannel("A").getbbox())
    side = max(cut.size)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
