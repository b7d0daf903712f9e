"""Drawings and photographs as CLIP's image tower sees them, and the words for them: what train_text.py learns from.

    python studies/clip/embeddings.py           # writes studies/clip/data/embeddings; an hour on two cores, goes on
                                                # where it stopped

Needs studies/clip/data/stamps (prepare.py), npm, apt-get and dpkg-deb. To train on: emoji of things by three vendors,
on white, with labels and tags, without the fifth that `unseen` leaves out; icons, clip art and Tux Paint's stamps as
studies/pairs/pictures.py has them, on white, the stamps on photographs as well. For evaluation alone: photographs of
Debian's gcompris-qt-data, see photos.py, and prepare.py's images.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "scenes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "pairs"))
from photos import named_photos
from pictures import Item, cliparts, icons, stamps
from prepare import VENDORS, concepts, draw, fetch_icons, fetch_labels, unpack

import turbovlm
from turbovlm_lab.zoo import clip
from turbovlm_lab.zoo.dual_encoder import unseen
from turbovlm_lab.zoo.scenes import on_photo

DATA = Path(__file__).parent / "data" / "embeddings"
TRAINED_VENDORS = ("noto", "fluent-3d", "openmoji")
THINGS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
"""Groups of emoji."""
BATCH, IN_FILE = 32, 128
FLOPS = 0.35
"""Share of the tower's cost for what is trained on, by merging tokens, of which white ground leaves many alike."""
EVALUATED = ("photos", "named-stamps")
SIDE, SHARE = 224, (0.7, 1.0)
"""Pixels a side of an image on white, and what share of it the drawing takes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--at-most", type=int, metavar="N", help=f"stop after N files, of {IN_FILE} images each")
    args = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    left = args.at_most
    model = clip.load_clip()
    with tempfile.TemporaryDirectory() as name:
        for part in args.only:
            if (DATA / f"{part}.done").exists():
                continue
            items = PARTS[part](Path(name))
            for number in range(sys.maxsize):
                file = DATA / f"{part}-{number:03d}.safetensors"
                some = list(islice(items, IN_FILE))
                if not some:
                    (DATA / f"{part}.done").touch()
                    break
                if file.exists():
                    continue
                if left == 0:
                    return
                left = None if left is None else left - 1
                with nullcontext() if part in EVALUATED else turbovlm.apply(model, flops=FLOPS):
                    look(model, some, file)


@torch.inference_mode()
def look(model: torch.nn.Module, items: list[Item], file: Path) -> None:
    """Writes the embeddings of images, `[images, 512]` in fp16, and their words."""
    batches = [items[at : at + BATCH] for at in range(0, len(items), BATCH)]
    vectors = [
        clip.embed(model, clip.preprocess([item.image for item in batch])) for batch in tqdm(batches, desc=file.stem)
    ]
    file.with_suffix(".json").write_text(json.dumps([told(item) for item in items]))
    save_file({"vectors": torch.cat(vectors).half()}, file)


def told(item: Item) -> dict[str, Any]:
    return {name: getattr(item, name) for name in ("source", "maker", "concept", "title", "tags")}


def on_white(items: Iterator[Item]) -> Iterator[Item]:
    for number, item in enumerate(items):
        yield moved(item, white(item.image, random.Random(number)))


def on_photos(items: Iterator[Item], folder: Path) -> Iterator[Item]:
    nature = unpack("mate-backgrounds", folder) / "backgrounds" / "mate" / "nature"
    photos = [Image.open(path).convert("RGB") for path in sorted(nature.glob("*.jpg"))]
    for number, item in enumerate(items):
        yield moved(item, on_photo(item.image, photos, random.Random(number)))


def moved(item: Item, image: Image.Image) -> Item:
    return Item(item.source, item.maker, item.concept, item.title, item.tags, image)


def white(drawing: Image.Image, chance: random.Random) -> Image.Image:
    """One drawing in the middle of a white square, 224×224."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    side = round(SIDE * chance.uniform(*SHARE))
    thing = drawing.resize((side, side), Image.Resampling.LANCZOS)
    image.paste(thing, ((SIDE - side) // 2,) * 2, thing)
    return image


def once(items: Iterator[Item]) -> Iterator[Item]:
    """The first of each title."""
    titles = set()
    for item in items:
        if item.title not in titles:
            titles.add(item.title)
            yield item


def emoji(vendor: str, folder: Path) -> Iterator[Item]:
    """Those that models may learn from, as one vendor draws them."""
    sets = {name: fetch_icons(VENDORS[name], folder) for name in TRAINED_VENDORS}
    entries = concepts(sets, fetch_labels(folder))
    random.Random(0).shuffle(entries)
    for entry in entries:
        if entry["group"] in THINGS and not unseen(entry["code"]):
            image = white(draw(sets[vendor]["icons"], entry["names"][vendor]), random.Random(entry["code"]))
            yield Item("emoji", vendor, entry["code"], entry["label"], tuple(entry["tags"]), image)


def named_stamps() -> Iterator[Item]:
    """One image of each stamp that prepare.py has put on photographs."""
    for path in sorted((DATA.parent / "stamps").glob("*/*-0.png")):
        yield Item("named stamp", "tuxpaint", None, path.parent.name, (), Image.open(path).convert("RGB"))


def tux(folder: Path) -> Iterator[Item]:
    return stamps(unpack("tuxpaint-stamps-default", folder) / "tuxpaint" / "stamps")


PARTS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "photos": lambda folder: (Item("photo", "gcompris", None, name, (), image) for name, image in named_photos(folder)),
    "named-stamps": lambda _: named_stamps(),
    "stamps": lambda folder: on_white(tux(folder)),
    "stamps-on-photos": lambda folder: on_photos(tux(folder), folder),
    **{vendor: partial(emoji, vendor) for vendor in TRAINED_VENDORS},
    "icons": lambda folder: on_white(once(icons(folder))),
    "clipart": lambda folder: on_white(once(cliparts(unpack("openclipart-svg", folder) / "openclipart" / "svg"))),
}
"""The images of a part, in a fixed order; what is fetched goes into the folder."""

if __name__ == "__main__":
    main()
