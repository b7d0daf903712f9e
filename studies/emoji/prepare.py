"""Emoji of three vendors as images, and photographs to put them on: what the small text-to-image model learns from.

    python studies/emoji/prepare.py            # writes studies/emoji/data/emoji.pt, about 15 MB

Needs npm, resvg-py (pip install resvg-py) and the `demo` extra. The drawings are those of the npm packages
@iconify-json/noto (Apache-2.0), @iconify-json/twemoji (CC-BY-4.0) and @iconify-json/fluent-emoji-flat (MIT): animals,
nature, food and drink, where all three have them. The photographs come with scikit-image and scikit-learn.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from turbovlm_lab.demo.photos import load_photos
from turbovlm_lab.zoo.emoji import NAMES, STYLES

DATA = Path(__file__).parent / "data" / "emoji.pt"
SIDE = 64
PACKAGES = dict(zip(STYLES, ("noto", "twemoji", "fluent-emoji-flat")))
CATEGORIES = ("Animals & Nature", "Food & Drink")
BACKGROUNDS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sets = {style: fetch(package, Path(folder)) for style, package in PACKAGES.items()}
    shared = set.intersection(*(set(icons["codes"]) for icons in sets.values()))
    codes = sorted(shared & set(sets["fluent"]["wanted"]))
    names = [sets["noto"]["codes"][code].replace("-", " ") for code in codes]
    drawn = [[draw(icons, icons["codes"][code]) for code in codes] for icons in sets.values()]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"names": names, "styles": list(STYLES), "pictures": torch.stack([torch.stack(row) for row in drawn])}
    torch.save({**content, "photos": backgrounds()}, args.out)
    NAMES.parent.mkdir(exist_ok=True)
    NAMES.write_text("\n".join(names) + "\n")
    print(f"{len(names)} emoji in {len(STYLES)} styles, {BACKGROUNDS} backgrounds: {args.out}")


def fetch(package: str, folder: Path) -> dict[str, Any]:
    """An icon set from the npm registry: its drawings, names by code point, and the codes of the wanted categories."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", f"@iconify-json/{package}"], cwd=folder, check=True, capture_output=True, text=True
    )
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        icons, codes, about = (
            json.load(archive.extractfile(f"package/{name}.json"))  # type: ignore[arg-type]
            for name in ("icons", "chars", "metadata")
        )
    named = {name for category in CATEGORIES for name in about["categories"].get(category, [])}
    wanted = [code for code, name in codes.items() if name in named]
    return {"icons": icons, "codes": codes, "wanted": wanted}


def draw(icons: dict[str, Any], name: str) -> Tensor:
    """One emoji as `[4, 64, 64]`, uint8, RGB and alpha."""
    import resvg_py

    drawings = icons["icons"]
    icon = drawings["icons"].get(name) or drawings["icons"][drawings["aliases"][name]["parent"]]
    width, height = (icon.get(side, drawings.get(side, 16)) for side in ("width", "height"))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))
    return _tensor(image.convert("RGBA").resize((SIDE, SIDE)))


def backgrounds() -> Tensor:
    """Random square crops of the photographs, `[1024, 3, 64, 64]`, uint8, the same ones in every run."""
    chance, photos = random.Random(0), load_photos()
    crops = []
    for _ in range(BACKGROUNDS):
        image = chance.choice(photos).image
        side = chance.uniform(0.3, 1.0) * min(image.size)
        left, top = (chance.uniform(0, length - side) for length in image.size)
        box = (left, top, left + side, top + side)
        crops.append(_tensor(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)))
    return torch.stack(crops)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


if __name__ == "__main__":
    main()
