"""Images of a user's: uploaded, or in a folder that the command line names. Each is bounded, and refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm.errors import DataError
from turbovlm.loading.images import IMAGE_SUFFIXES, decode

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""As Pillow names them; of several frames the first counts."""
MOST_BYTES, MOST_PIXELS = 25_000_000, 40_000_000
"""Of one image."""
MOST_IMAGES = 200
"""In one run."""
LONGEST = 1024
"""Pixels of the longer side at which many images are kept; models read 224 to 518."""


@dataclass(frozen=True, eq=False)
class Named:
    """An image, RGB, and what its file is called."""

    name: str
    image: Image


@dataclass(frozen=True)
class Pictures:
    """Images that were read; `left_out`: why others were not, one sentence each."""

    images: tuple[Named, ...]
    left_out: tuple[str, ...] = ()


def read_image(path: str | Path) -> Image:
    """An image, RGB, turned as its EXIF says.

    Raises:
        DataError: no image, too large a file, or too many pixels; the message names the file, not its folder.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise DataError(f"{path.name}: {size / 1e6:.1f} MB; at most {MOST_BYTES / 1e6:.0f} MB are taken")
    try:
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        raise DataError(f"{path.name}: more than {MOST_PIXELS / 1e6:.0f} megapixels, the most that are taken") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise DataError(f"{path.name}: is no image ({', '.join(FORMATS)}), whatever its name says") from None
    if width * height > MOST_PIXELS:
        raise DataError(
            f"{path.name}: {width}×{height} are {width * height / 1e6:.0f} megapixels; at most "
            f"{MOST_PIXELS / 1e6:.0f} are taken"
        )
    try:
        return decode(path)
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error


def read_images(paths: Sequence[str | Path], advance: Callable[[], object] = lambda: None) -> Pictures:
    """The images that can be read, none longer than `LONGEST`, and why others are left out.

    Args:
        advance: called after each.

    Raises:
        DataError: more files than `MOST_IMAGES`.
    """
    if len(paths) > MOST_IMAGES:
        raise DataError(f"{len(paths)} images; at most {MOST_IMAGES} are taken at once")
    images, left_out = [], []
    for path in map(Path, paths):
        try:
            image = read_image(path)
            image.thumbnail((LONGEST, LONGEST))
            images.append(Named(path.name, image))
        except DataError as error:
            left_out.append(str(error))
        advance()
    return Pictures(tuple(images), tuple(left_out))


def files_in(folder: Path, limit: int = MOST_IMAGES) -> list[Path]:
    """Files of images in a folder and the folders in it, evenly spaced if there are more than `limit`.

    Raises:
        DataError: no such folder, or no images in it.
    """
    from turbovlm.cli.images import image_files

    return image_files(folder, limit)


def suffixes() -> list[str]:
    """Of the files that a browser offers."""
    return sorted(IMAGE_SUFFIXES)
