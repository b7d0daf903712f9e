"""Images and recordings that somebody uploads: what is taken, and why something is not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm.errors import DataError
from turbovlm.loading.images import decode

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Of which the first frame counts."""
MEGABYTES, MEGAPIXELS = 25, 40
SECONDS, RATE = 30, 16_000
"""Of recordings, at most; samples a second that are kept."""
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


def read_recording(path: str | Path) -> tuple[Tensor, Image]:
    """A WAV file as a wave, mono, 16 kHz, `[samples]`, and a picture of its spectrogram.

    Raises:
        DataError: the file is too large, is no WAV file of 8 or 16 bits, or lasts longer than `SECONDS`.
    """
    import wave

    import numpy as np
    import torch
    from scipy.signal import resample_poly

    path = Path(path)
    name, megabytes = shown(path.name), path.stat().st_size / 1e6
    if megabytes > MEGABYTES:
        raise DataError(f"{name}: {megabytes:.1f} MB is too large; at most {MEGABYTES} MB are taken")
    try:
        with wave.open(str(path)) as file:
            channels, width, rate, count, *_ = file.getparams()
            content = file.readframes(min(count, rate * SECONDS + 1))
    except (wave.Error, EOFError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{name}: is not a WAV file of plain samples ({error})") from error
    if width not in (1, 2) or not 1_000 <= rate <= 192_000 or channels < 1:
        raise DataError(f"{name}: has {8 * width} bits at {rate} Hz; 8 or 16 bits at 1 to 192 kHz are taken")
    if not content or count > rate * SECONDS:
        raise DataError(f"{name}: lasts {count / rate:.0f} seconds; up to {SECONDS} are taken")
    raw = np.frombuffer(content, np.int16 if width == 2 else np.uint8).astype(np.float32)
    samples = raw / 32768 if width == 2 else (raw - 128) / 128
    mono = samples[: len(samples) // channels * channels].reshape(-1, channels).mean(axis=1)
    common = math.gcd(rate, RATE)
    sound = torch.from_numpy(resample_poly(mono, RATE // common, rate // common).astype(np.float32))
    return sound, spectrogram(sound)


def spectrogram(wave: Tensor) -> Image:
    """A picture of a recording, a column for every 10 ms, low tones at the bottom, louder is lighter."""
    import torch
    from PIL import Image as pillow

    power = torch.stft(wave, 400, 160, window=torch.hann_window(400), return_complex=True).abs()[:128] + 1e-5
    level = power.log10().flip(0)
    level = (level - level.max() + 4).clamp(0, 4) / 4
    return pillow.fromarray((255 * level).byte().numpy()).convert("RGB")


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
