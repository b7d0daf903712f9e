"""Files of images: which they are, and how they decode."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING

from turbovlm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of what is opened, whatever a file is called: of others some run programs, as EPS does."""


def open_image(file: str | os.PathLike[str] | IO[bytes]) -> Image:
    """The image, not yet decoded.

    Raises:
        OSError: there is no such file, or it is of none of `FORMATS`.
        Exception: whatever Pillow raises for a broken header, or for more pixels than it takes.
    """
    from PIL import Image

    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def in_eight_bits(image: Image, mode: str = "RGB") -> Image:
    """The image in a mode of 8 bits: Pillow cuts off what is above 255 of images with more.

    Raises:
        DataError: its numbers have no known range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 16 bits
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode in ("I", "F"):
        raise DataError(f"has numbers of 32 bits ({image.mode}), whose range nothing says; save it with 8 or 16")
    if image.mode in ("P", "PA") and mode != "RGBA":
        image = image.convert("RGBA")  # else Pillow warns of some palettes
    return image.convert(mode)


def decode(file: str | os.PathLike[str] | IO[bytes]) -> Image:
    """The image, RGB, turned as its EXIF says; the first frame of several.

    Raises:
        DataError: it does not decode, has more pixels than Pillow takes, or numbers of 32 bits.
    """
    from PIL import ImageOps

    try:
        with open_image(file) as image:
            image.load()
            kept = image.format
            turned = ImageOps.exif_transpose(image)
            turned.format = kept
            return in_eight_bits(turned)
    except DataError:
        raise
    except Exception as error:  # decoders raise many kinds, that of too many pixels among them
        said = " ".join(str(error).partition(" <_io")[0].split()) or type(error).__name__
        raise DataError(f"does not decode ({said})") from error
