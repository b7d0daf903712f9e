"""Images of a user's folder, for `turbovlm calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def image_files(folder: Path, limit: int) -> list[Path]:
    """Files of images in a folder and the folders in it, evenly spaced if there are more than `limit`.

    Raises:
        DataError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [found[i * len(found) // limit] for i in range(limit)] if len(found) > limit else found


def read_image(file: Path) -> Image:
    """The decoded image, RGB.

    Raises:
        DataError: it does not decode; the message names it.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise many kinds, that of too many pixels among them
        raise DataError(f"{file}: does not decode ({error})") from error
