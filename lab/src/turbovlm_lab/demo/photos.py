"""Colour photographs that come inside the scikit-image and scikit-learn packages, read without network."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm.errors import DataError, TurboError
from turbovlm.loading.images import IMAGE_SUFFIXES, decode

if TYPE_CHECKING:
    from PIL.Image import Image

CROPS = 3
"""Random square crops of each photograph, beside its centre square."""


@dataclass(frozen=True)
class Photo:
    """A square image in RGB, and who is to be credited for it."""

    name: str
    image: Image
    credit: str


@dataclass(frozen=True)
class _Source:
    name: str
    package: str
    file: str
    credit: str


_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")
_SOURCES = tuple(
    _Source(name, package, f"{folder}/{file}", credit)
    for name, (package, folder), file, credit in (
        ("astronaut", _SKIMAGE, "astronaut.png", "Eileen Collins; NASA Great Images database, public domain"),
        ("chelsea", _SKIMAGE, "chelsea.png", "Chelsea the cat; Stéfan van der Walt, CC0"),
        ("coffee", _SKIMAGE, "coffee.png", "Coffee cup, courtesy of Pikolo Espresso Bar; Rachel Michetti, CC0"),
        ("rocket", _SKIMAGE, "rocket.jpg", "Launch of DSCOVR on Falcon 9; SpaceX, public domain"),
        (
            "motorcycle",
            _SKIMAGE,
            "motorcycle_left.png",
            "Middlebury 2014 stereo benchmark (Scharstein et al., GCPR 2014), as distributed with scikit-image",
        ),
        (
            "china",
            _SKLEARN,
            "china.jpg",
            "danielbuechele, flickr.com/photos/danielbuechele/6061409035, CC BY 2.0, cropped",
        ),
        (
            "flower",
            _SKLEARN,
            "flower.jpg",
            "vultilion, flickr.com/photos/vultilion/6056698931 (scikit-learn's README also names danielbuechele), "
            "CC BY 2.0, cropped",
        ),
    )
)
_SURFACES = tuple(
    _Source(name, _SKIMAGE[0], f"{_SKIMAGE[1]}/{file}", credit)
    for name, file, credit in (
        ("brick", "brick.png", "Bricks25; CC0Textures, CC0"),
        ("grass", "grass.png", "Grass 01; linolafett, CC0"),
        ("gravel", "gravel.png", "Gravel04; CC0Textures, CC0"),
        ("galaxies", "hubble_deep_field.jpg", "Hubble eXtreme Deep Field; NASA, public domain"),
        ("tissue", "ihc.png", "Colonic glands; Center for Microscopy And Molecular Imaging, no known copyright"),
    )
)


def load_photos() -> list[Photo]:
    """Seven photographs, each as its centre square and three crops: 28 images, the same ones in every run.

    The seven centre squares come first. A crop's side is 50 to 80 % of the photograph's shorter side.

    Raises:
        TurboError: scikit-image, scikit-learn or one of their photographs is not installed.
    """
    from turbovlm_lab.zoo.saliency import centre_square

    photographs = [(source, _open(_locate(source))) for source in _SOURCES]
    whole = [Photo(source.name, centre_square(image), source.credit) for source, image in photographs]
    crops = [
        Photo(f"{source.name}-{index}", _crop(image, f"{source.name}-{index}"), source.credit)
        for source, image in photographs
        for index in range(1, CROPS + 1)
    ]
    return whole + crops


def load_surfaces() -> list[Photo]:
    """Five photographs in which nothing stands out: bricks, grass, gravel, a field of galaxies, stained tissue.

    Raises:
        TurboError: scikit-image or one of them is not installed.
    """
    return [Photo(source.name, _open(_locate(source)), source.credit) for source in _SURFACES]


def load_files(paths: Sequence[str | Path]) -> list[Photo]:
    """The centre squares of the user's own images, in the order given.

    Args:
        paths: image files, or folders of them (without their sub-folders).

    Raises:
        TurboError: a path does not exist, a folder has no image, or a file cannot be read as one.
    """
    from turbovlm_lab.zoo.saliency import centre_square

    files = [file for path in paths for file in _images(Path(path))]
    return [Photo(file.name, centre_square(_open(file)), str(file)) for file in files]


def _images(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise TurboError(f"{path}: the folder has no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _open(path: Path) -> Image:
    if not path.exists():
        raise TurboError(f"{path}: no such file")
    try:
        return decode(path)
    except DataError as error:
        raise TurboError(f"{path}: cannot be read as an image ({error})") from error


def _locate(source: _Source) -> Path:
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise TurboError(f"the demo's photographs need {source.package}: pip install turbovlm-lab")
    path = Path(spec.submodule_search_locations[0]) / source.file
    if not path.is_file():
        raise TurboError(f"{path} is missing: this release of {source.package} comes without it; use --images")
    return path


def _crop(image: Image, seed: str) -> Image:
    chance = random.Random(seed)
    side = round(min(image.size) * chance.uniform(0.5, 0.8))
    left, top = chance.randint(0, image.width - side), chance.randint(0, image.height - side)
    return image.crop((left, top, left + side, top + side))
