"""Files of images: which they are, and how they decode."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING

from turbovlm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def decode(file: str | os.PathLike[str] | IO[bytes]) -> Image:
    """The image, RGB, turned as its EXIF says; the first frame of several.

    Raises:
        DataError: it does not decode, or has more pixels than Pillow takes.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise many kinds, that of too many pixels among them
        said = str(error).partition(" <_io")[0].replace("\n", " ") or type(error).__name__
        raise DataError(f"does not decode ({said})") from error
