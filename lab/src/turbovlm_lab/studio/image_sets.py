"""Several images at once: uploaded, of a folder that the command line names, or built in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm.errors import DataError
from turbovlm_lab.studio.uploads import KEPT_SIDE, read_upload, shown

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_IMAGES = 200
"""In one run."""


@dataclass(frozen=True, eq=False)
class Named:
    """An image, RGB, and what it is called."""

    name: str
    image: Image


@dataclass(frozen=True)
class ImageSet:
    """Images that were read; `left_out`: why others were not, one sentence each."""

    images: tuple[Named, ...]
    left_out: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the images, in order."""
        return tuple(named.name for named in self.images)


def read_files(paths: Sequence[str | Path], advance: Callable[[], object] = lambda: None) -> ImageSet:
    """The images that can be read, as uploads are, and why others are left out.

    Args:
        advance: called after each file.

    Raises:
        DataError: more files than `MOST_IMAGES`.
    """
    if len(paths) > MOST_IMAGES:
        raise DataError(f"images: {len(paths)}; at most {MOST_IMAGES} are taken at once")
    images, left_out = [], []
    for path in map(Path, paths):
        try:
            images.append(Named(shown(path.name), read_upload(path)))
        except DataError as error:
            left_out.append(f"left out: {error}")
        advance()
    return ImageSet(tuple(images), tuple(left_out))


def files_in(folder: Path, limit: int = MOST_IMAGES) -> list[Path]:
    """Files of images in a folder and the folders in it, evenly spaced if there are more than `limit`.

    Raises:
        DataError: no such folder, or no images in it.
    """
    from turbovlm.cli.images import image_files

    return image_files(folder, limit)


def built_in(limit: int) -> ImageSet:
    """The demo's photographs: seven, and crops of them.

    Raises:
        TurboError: scikit-image or scikit-learn is not installed.
    """
    from turbovlm_lab.demo.photos import load_photos

    found = []
    for photo in load_photos()[:limit]:
        image = photo.image.copy()
        image.thumbnail((KEPT_SIDE, KEPT_SIDE))
        found.append(Named(photo.name, image))
    return ImageSet(tuple(found))
