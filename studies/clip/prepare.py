"""Things on photographs, in a folder for each name: what real CLIP is asked to name.

    python studies/clip/prepare.py --names FOLDER     # writes studies/clip/data/stamps/NAME/*.png, a minute
    turbovlm evaluate classification --model zoo:clip --data studies/clip/data/stamps --names FOLDER --controls

FOLDER has embeddings of names by CLIP ViT-B/16's text tower, see `turbovlm_lab.zoo.clip_names`. The things are Tux
Paint's stamps (Debian tuxpaint-stamps-default, GPL-2+): those whose English caption ends in one
of the names; each stands on six of mate-backgrounds' nature photographs (Debian, see its copyright file), at
another size and place. Needs apt-get (for `apt-get download`, without root) and dpkg-deb. None of it is in this
repository.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "scenes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "pairs"))
from pictures import Item, stamps
from prepare import unpack

from turbovlm_lab.zoo.clip_names import read_names
from turbovlm_lab.zoo.scenes import on_photo

DATA = Path(__file__).parent / "data"
COPIES = 6
"""Photographs that each stamp is put on."""
PLURALS = {"s": "", "es": "", "ies": "y"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", required=True, metavar="PATH", help="embeddings of names: a folder or a .npy")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N names; 80 of COCO-Stuff's are things")
    args = parser.parse_args()
    names = read_names(args.names).names[: args.first]
    folder = DATA / "stamps"
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        shared = unpack("tuxpaint-stamps-default", Path(name)) / "tuxpaint" / "stamps"
        nature = unpack("mate-backgrounds", Path(name)) / "backgrounds" / "mate" / "nature"
        photos = [Image.open(path).convert("RGB") for path in sorted(nature.glob("*.jpg"))]
        found = [(item, label) for item in stamps(shared) if (label := label_of(item, names)) is not None]
        for number, (item, label) in enumerate(tqdm(found, desc="stamps", unit="stamp")):
            (folder / label).mkdir(parents=True, exist_ok=True)
            for copy in range(COPIES):
                image = on_photo(item.image, photos, random.Random(number * COPIES + copy))
                image.save(folder / label / f"{number:03d}-{copy}.png")
    labels = {label for _, label in found}
    print(f"{len(found)} stamps of {len(labels)} names, {len(found) * COPIES} images: {folder}")


def label_of(item: Item, names: tuple[str, ...]) -> str | None:
    """The name that a stamp's caption ends in, the longest of several: "A black cat." is a cat."""
    words = re.sub(r"\(.*?\)", "", item.title.lower()).replace(",", " ").split()
    for first in range(len(words)):
        for form in singular(" ".join(words[first:])):
            if form in names:
                return form
    return None


def singular(text: str) -> Iterator[str]:
    """The text as it is, and without what makes it a plural."""
    yield text
    for ending, instead in PLURALS.items():
        if text.endswith(ending):
            yield text.removesuffix(ending) + instead


if __name__ == "__main__":
    main()
