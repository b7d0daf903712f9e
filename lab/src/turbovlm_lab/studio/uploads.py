"""Images that somebody uploads: what is taken, and why something is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm.errors import DataError
from turbovlm.loading.images import decode

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Of which the first frame counts."""
MEGABYTES, MEGAPIXELS = 25, 40
KEPT_SIDE = 1024
"""Pixels of the longer side of what is kept; models see fewer."""


def read_upload(path: str | Path) -> Image:
    """The image, RGB, turned as its EXIF says, no larger than `KEPT_SIDE`.

    Sizes are checked before anything is decoded.

    Raises:
        DataError: the file is too large or empty, is no image of these formats, has too many pixels or does not decode;
            the message names the file, what it is and what is allowed.
    """
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    path = Path(path)
    name, megabytes = shown(path.name), path.stat().st_size / 1e6
    if megabytes > MEGABYTES:
        raise DataError(f"{name}: {megabytes:.1f} MB is too large; at most {MEGABYTES} MB are taken")
    if megabytes == 0:
        raise DataError(f"{name}: the file is empty")
    try:
        with pillow.open(path, formats=FORMATS) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        if isinstance(error, pillow.DecompressionBombError):
            raise DataError(f"{name}: too many pixels; at most {MEGAPIXELS} megapixels are taken") from error
        raise DataError(f"{name}: is not an image; {', '.join(FORMATS)} are taken") from error
    if width * height > MEGAPIXELS * 1e6:
        raise DataError(
            f"{name}: {width}×{height} pixels are {width * height / 1e6:.0f} megapixels; at most {MEGAPIXELS} are taken"
        )
    try:
        found = decode(path)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    found.thumbnail((KEPT_SIDE, KEPT_SIDE))
    return found


def shown(name: str) -> str:
    """A file's name for a message, no longer than 60 characters."""
    return name if len(name) <= 60 else f"{name[:40]}…{name[-16:]}"


def inside_uploads(path: object) -> Path:
    """A path that the browser says it has uploaded to, if it is one.

    Raises:
        DataError: it is not a file below the folder of uploads.
    """
    from gradio.utils import get_upload_folder

    folder, file = Path(get_upload_folder()).resolve(), Path(str(path)).resolve()
    if not file.is_relative_to(folder) or not file.is_file():
        raise DataError("image: this file was not uploaded here")
    return file
