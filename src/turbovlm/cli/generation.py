"""What commands share that are given a pipeline of `diffusers`, or its denoiser alone: options, and what they mean."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbovlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from turbovlm.config import Config

Size = tuple[int, int] | None
"""Height and width in pixels; None for the model's own."""

SHARES_HELP = (
    "with commas the share for each resolution of a denoiser, the largest first, as in 0.5,0.75; or over the steps of "
    "a pipeline START:SHARE, as in 0:0.5,0.6:1"
)
SETTINGS_HELP = "what turbovlm.calibrate, turbovlm calibrate or the save of a config has written"


def shares(text: str) -> Any:
    """Read `--keep`: a share, several with commas, or pairs of a progress and the share that is kept from there on."""
    try:
        parts = [tuple(map(float, part.split(":"))) for part in text.split(",")]
    except ValueError:
        parts = [()]
    if all(len(part) == 2 for part in parts):
        return tuple(parts)
    if any(len(part) != 1 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 0.5; {SHARES_HELP}")
    return parts[0][0] if len(parts) == 1 else tuple(part[0] for part in parts)


def shown(keep: Any) -> str:
    """What `shares` has read, as it is written on the command line."""
    each = keep if isinstance(keep, tuple) else (keep,)
    return ",".join(f"{one[0]:g}:{one[1]:g}" if isinstance(one, tuple) else f"{one:g}" for one in each)


def sizes_from(given: Sequence[str] | None) -> list[Size]:
    """Read each size, `N` or `WIDTHxHEIGHT`; the model's own where none is given."""
    sizes: list[Size] = []
    for text in dict.fromkeys(given or ()):
        found = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text)
        if found is None or 0 in (width := int(found[1]), height := int(found[2] or found[1])):
            raise ConfigError(f"--image-size {text}: must be N or WIDTHxHEIGHT in pixels, such as 512 or 768x512")
        sizes.append((height, width))
    return sizes or [None]


def saved_settings(files: Sequence[str], kind: Any) -> dict[str, Config]:
    """The settings of a class that files hold, by the names of the files.

    Raises:
        ConfigError: a file is not there, or holds others.
    """
    found: dict[str, Config] = {}
    for file in files:
        found[Path(file).name if Path(file).name not in found else file] = kind.load(file)
    return found


def frames_for(pipe: Any, frames: int | None) -> dict[str, Any]:
    """What a pipeline's call is given for `--frames`.

    Raises:
        ConfigError: it makes images.
    """
    if frames is None:
        return {}
    if frames < 1:
        raise ConfigError(f"--frames {frames}: must be an integer ≥ 1")
    if "num_frames" not in inspect.signature(type(pipe).__call__).parameters:
        raise ConfigError(f"--frames {frames}: {type(pipe).__name__} makes images; leave it out")
    return {"num_frames": frames}


def read_prompts(file: Path, limit: int) -> list[str]:
    """The lines of a text file that are not empty, evenly spaced if there are more than `limit`.

    Raises:
        DataError: no such file, or it is no text.
    """
    if not file.is_file():
        raise DataError(
            f"{file}: {'is a folder' if file.is_dir() else 'there is no such file'}: give a text file with "
            "a prompt in each line, for image generation"
        )
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is no text in UTF-8 ({error.reason})") from error
    found = [line for line in lines if line]
    return [found[i * len(found) // limit] for i in range(limit)] if len(found) > limit else found
