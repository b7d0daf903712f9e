"""Images of a user's folder, for `turbovlm calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm.errors import DataError
from turbovlm.loading.images import IMAGE_SUFFIXES, decode

if TYPE_CHECKING:
    from PIL.Image import Image

NAMED = 5
"""Files that a message names at most."""


def image_files(folder: Path, limit: int) -> list[Path]:
    """Files of images in a folder and the folders in it, evenly spaced if there are more than `limit`.

    Raises:
        DataError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is a file; give a folder' if folder.exists() else 'there is no such folder'}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise DataError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [found[i * len(found) // limit] for i in range(limit)] if len(found) > limit else found


def read_images(files: Sequence[Path]) -> list[Image]:
    """The decoded images, RGB.

    Raises:
        DataError: some do not decode; the message names them.
    """
    images, bad = [], []
    for file in files:
        try:
            images.append(read_image(file))
        except DataError as error:
            bad.append(str(error))
    if bad:
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise DataError(
            f"{len(bad)} of {len(files)} images cannot be read, remove or replace them: {'; '.join(bad[:NAMED])}{more}"
        )
    return images


def read_image(file: Path) -> Image:
    """The decoded image, RGB.

    Raises:
        DataError: it does not decode; the message names it.
    """
    try:
        return decode(file)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
