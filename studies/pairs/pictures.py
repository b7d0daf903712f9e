"""Drawings on photographs as the frozen ViT sees them, and the words for them: what the dual encoder learns from.

    python studies/pairs/pictures.py           # writes studies/pairs/data/features.{pt,json}; half an hour on two cores

Needs studies/scenes/data (studies/scenes/prepare.py), npm, apt-get and dpkg-deb. Beside the emoji there:

  npm @iconify-json/streamline-kameleon-color, streamline-ultimate-color (CC-BY-4.0), flat-color-icons (MIT): icons
  with names
  Debian openclipart-svg (public domain): drawings with a title and subjects
  Debian tuxpaint-stamps-default (GPL-2+): captioned cut-outs of photographs, and drawings
  Debian gimp-data (GPL-3+ and others, see its copyright file): patterns, which are tiled

A fifth of the emoji, chosen by `unseen`, is left out for evaluation, whoever drew them; so is Twemoji. What other
sources call by the same name is not left out. Features are CLS and the mean of the patches after the ViT's tenth block:
of images on photographs at 224 pixels, and of others, emoji and icons, on photographs and patterns at several sizes.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "scenes"))
from features import load_drawings
from prepare import DATA as SCENES
from prepare import PARTIAL, VENDORS, fetch_npm, read_json, unpack
from prepare import draw as drawn

from turbovlm_lab.zoo import preprocess
from turbovlm_lab.zoo.dual_encoder import unseen
from turbovlm_lab.zoo.reader import scene_encoder
from turbovlm_lab.zoo.scenes import on_photo
from turbovlm_lab.zoo.sprites import load_sprites

DATA = Path(__file__).parent / "data"
ICONS = ("streamline-kameleon-color", "streamline-ultimate-color", "flat-color-icons")
"""Of `@iconify-json`, beside the packs of `VENDORS`."""
COPIES = {"emoji": 4, "clipart": 2, "stamp": 4}
MORE_COPIES = {"emoji": 1, "other emoji": 3, "icon": 1}
"""Images of each drawing: on photographs, and on photographs and patterns."""
BATCH, SIDE, TILED = 32, 224, 512
SIDES = (140, 168, 196, 224)


@dataclass(frozen=True)
class Item:
    """A drawing, who drew it, and its words: a title, and others. `concept` is an emoji's code."""

    source: str
    maker: str
    concept: str | None
    title: str
    tags: tuple[str, ...]
    image: Image.Image


def main() -> None:
    DATA.mkdir(exist_ok=True)
    _, photos = load_drawings()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        full = [vendor for vendor in VENDORS if vendor != "twemoji"]
        first = [*emoji("emoji", full), *other_drawings(folder)]
        more = [*emoji("emoji", full), *emoji("other emoji", PARTIAL), *icons(folder)]
        both = [*photos, *patterns(folder)]
    seen = [look(first, COPIES, photos, (SIDE,), 0), look(more, MORE_COPIES, both, SIDES, 1)]
    torch.save(torch.cat([features for features, _ in seen]), DATA / "features.pt")
    (DATA / "features.json").write_text(json.dumps([entry for _, about in seen for entry in about]))


def look(
    items: list[Item], copies: dict[str, int], backgrounds: list[Image.Image], sides: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Features of images, `[images, 768]`, and what each shows. All of a batch have one of the sizes."""
    encoder = scene_encoder().to(torch.bfloat16)
    chance = random.Random(seed)
    about: list[dict[str, Any]] = []
    features: list[torch.Tensor] = []
    ready: list[Image.Image] = []

    def flush() -> None:
        side = sides[len(features) % len(sides)]
        with torch.inference_mode():
            out = encoder(pixel_values=preprocess(ready, side).to(torch.bfloat16)).last_hidden_state.float()
        features.append(torch.cat([out[:, 0], out[:, 1:].mean(dim=1)], dim=1).half())
        ready.clear()

    for item in tqdm(items, unit=" drawings"):
        told = {"source": item.source, "maker": item.maker, "concept": item.concept, "title": item.title}
        for _ in range(copies[item.source]):
            ready.append(on_photo(item.image, backgrounds, chance))
            about.append({**told, "tags": item.tags})
            if len(ready) == BATCH:
                flush()
    if ready:
        flush()
    return torch.cat(features), about


def emoji(source: str, vendors: Iterable[str]) -> Iterator[Item]:
    for vendor in vendors:
        for s in load_sprites(SCENES / f"{vendor}.zip"):
            if not unseen(s.code):
                yield Item(source, vendor, s.code, s.label, s.tags, s.image)


def icons(folder: Path) -> Iterator[Item]:
    """One drawing of each name, without numbers and words for variants."""
    for pack in ICONS:
        with fetch_npm(f"@iconify-json/{pack}", folder) as archive:
            given = read_json(archive, "icons.json")
        names = {words(re.sub(r"-(duo|flat)$", "", name)): name for name in sorted(given["icons"], reverse=True)}
        for title in sorted(filter(None, names)):
            yield Item("icon", pack, None, title, (), drawn(given, names[title]))


def patterns(folder: Path) -> Iterator[Image.Image]:
    """GIMP's, of stone, wood and the like, each repeated over a square."""
    for path in sorted((unpack("gimp-data", folder) / "gimp" / "2.0" / "patterns").rglob("*.pat")):
        content = path.read_bytes()
        start, _, width, height, channels = struct.unpack(">5I", content[:20])
        if path.parent.name == "Legacy" or channels not in (1, 3):
            continue
        tile = Image.frombytes("L" if channels == 1 else "RGB", (width, height), content[start:]).convert("RGB")
        canvas = Image.new("RGB", (TILED, TILED))
        for left in range(0, TILED, width):
            for top in range(0, TILED, height):
                canvas.paste(tile, (left, top))
        yield canvas


def other_drawings(folder: Path) -> Iterator[Item]:
    yield from cliparts(unpack("openclipart-svg", folder) / "openclipart" / "svg")
    yield from stamps(unpack("tuxpaint-stamps-default", folder) / "tuxpaint" / "stamps")


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
            image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        except (ValueError, OSError):
            continue
        if image.getchannel("A").getextrema()[1] and max(image.size) < 8 * min(image.size):
            yield Item("clipart", "openclipart", None, title, tuple(filter(None, [*folders, *tags[1:]])), square(image))


def stamps(folder: Path) -> Iterator[Item]:
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        if not text.exists() or "symbols" in path.parts:
            continue
        title = text.read_text(errors="replace").splitlines()[0].strip().rstrip(".!")
        folders = path.relative_to(folder).parts[:-1]
        yield Item("stamp", "tuxpaint", None, title, tuple(folders), square(Image.open(path).convert("RGBA")))


def words(text: str) -> str:
    """Spaces for underscores and hyphens, no digits; nothing if what is left is no word."""
    plain = re.sub(r"[\d_\-.]+", " ", text).strip().lower()
    plain = " ".join(plain.split())
    return plain if re.fullmatch(r"[a-z' ,()&]{3,60}", plain) else ""


def square(image: Image.Image) -> Image.Image:
    """Cut to what is drawn, on a transparent square."""
    cut = image.crop(image.getchannel("A").getbbox())
    side = max(cut.size)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
