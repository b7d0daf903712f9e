"""Inputs of a denoiser alone, of native size or another, as its config has them: one entry of `INPUTS` per class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turbovlm.diffusion.inputs.entry import Entry, Request
from turbovlm.diffusion.inputs.images import IMAGES
from turbovlm.diffusion.inputs.videos import VIDEOS
from turbovlm.errors import ConfigError, TurboError

INPUTS: Mapping[str, Entry] = {**IMAGES, **VIDEOS}
"""By the name of the denoiser's class."""


def denoiser_request(
    model: Any, size: tuple[int, int] | None, batch: int, frames: int | None = None, pixels: int | None = None
) -> Request:
    """What is asked of a denoiser in one forward: see `denoiser_inputs`.

    Args:
        pixels: of the image, per side of a latent pixel; None for those of the class.
    """
    kind, config = type(model).__name__, model.config
    entry = _entry_of(model)
    along, side = entry.patch_of(config)
    pixels = pixels or entry.pixels_of(config)
    height, width = size or (length * pixels // entry.pixels_of(config) for length in entry.size_of(config))
    if height % (pixels * side) or width % (pixels * side):
        raise ConfigError(f"--image-size {width}x{height}: {kind} takes multiples of {pixels * side} pixels a side")
    latents = _latent_frames(entry, kind, entry.frames_of(config) if frames is None else frames)
    latents += -latents % along  # as pipelines do
    rows, columns = height // pixels, width // pixels
    return Request(model, batch, latents, rows, columns, (latents // along, rows // side, columns // side), pixels)


def denoiser_inputs(model: Any, size: tuple[int, int] | None, batch: int, frames: int | None = None) -> dict[str, Any]:
    """Make seeded noise for one forward of a denoiser alone.

    Args:
        model: on its device, in its dtype.
        size: height and width of the image in pixels; None for the denoiser's own.
        batch: images, or videos.
        frames: of a video; None for the denoiser's own.

    Returns:
        Arguments of its forward, by name.

    Raises:
        ConfigError: a size or frames that make no whole number of tokens, or frames of what makes images.
        TurboError: a class of denoisers whose inputs are not known.
    """
    return inputs_asked(denoiser_request(model, size, batch, frames))


def inputs_asked(request: Request) -> dict[str, Any]:
    """Arguments of a denoiser's forward, by name: see `denoiser_inputs`."""
    return {**_entry_of(request.model).make(request), "return_dict": False}


def _entry_of(model: Any) -> Entry:
    kind = type(model).__name__
    if kind not in INPUTS:
        raise TurboError(f"{kind}: which inputs it takes is not known; give the pipeline that it is from")
    return INPUTS[kind]


def _latent_frames(entry: Entry, kind: str, frames: int) -> int:
    if entry.stride is None:
        if frames != 1:
            raise ConfigError(f"--frames {frames}: {kind} makes images; leave it out")
        return 1
    least = max(entry.first, entry.least)
    if frames < least or (frames - least) % entry.stride:
        raise ConfigError(
            f"--frames {frames}: {kind} takes {least} and multiples of {entry.stride} more, such as "
            f"{least + 4 * entry.stride}"
        )
    return (frames - entry.first) // entry.stride + 1


__all__ = ["INPUTS", "Request", "denoiser_inputs", "denoiser_request", "inputs_asked"]
