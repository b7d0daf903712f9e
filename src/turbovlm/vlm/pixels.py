"""Cells of equal pixels: found before the tower, which leaves them out, and not read by the language model.

A cell is the square of patches that one visual token is made of. Pixels are known where images are encoded
(`get_image_features`), and compared there; what has become of each cell travels with the library's outputs,
`marks.STANDING`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.config import ReadConfig, TurboConfig
from turbovlm.encoder.entrance import is_announced
from turbovlm.encoder.layout import fetch
from turbovlm.errors import StateError, UnsupportedModelError
from turbovlm.ops.pixels import predicted_in_sequence
from turbovlm.ops.tracing import is_exporting
from turbovlm.vlm.families import PIXELS, VlmFamily
from turbovlm.vlm.marks import STANDING

if TYPE_CHECKING:
    from turbovlm.encoder.feature import EncoderFeature
    from turbovlm.vlm.install import ReadFeature


def tower_to_shorten(
    model: nn.Module, part: str, family: VlmFamily, config: ReadConfig, encoders: Iterable[EncoderFeature]
) -> EncoderFeature:
    """What runs the tower's blocks on the patches that are left: one of `encoders`, or one that merges nothing else.

    Args:
        part: path of the part that reads visual tokens.
        family: the model's.
        encoders: those that merge in the model's towers, where some do.

    Raises:
        UnsupportedModelError: the tower takes images as a batch, or turbovlm does not know its blocks.
    """
    asked = f"pixel_tolerance={config.pixel_tolerance:g}"
    if family.packed is None:
        raise UnsupportedModelError(
            f"{asked}: the tower of {family.family} takes images as a batch of equal length, of which all would have "
            "to lose as many cells; towers that run images as one sequence can, of Qwen2-VL, Qwen2.5-VL and Qwen3-VL. "
            "Behind the tower, visual_keep=1.0, visual_select='diversity', visual_tolerance=0 leaves out equal tokens"
        )
    if not family.merges_inside:
        raise UnsupportedModelError(
            f"{asked}: turbovlm does not know the blocks of {family.family}'s tower, which would have to run on fewer "
            "patches; it does those of Qwen2-VL, Qwen2.5-VL and Qwen3-VL"
        )
    path = f"{part}.{family.tower}".lstrip(".")
    found = [encoder for encoder in encoders if encoder.tower == path]
    if not found:
        from turbovlm.encoder.feature import find_encoders

        found = [encoder for encoder in find_encoders(model, TurboConfig(r=0)) if encoder.tower == path]
        for encoder in found:
            encoder.implied = True
    return found[0]


def standing_cells(model: Any, feature: ReadFeature, inputs: dict[str, Any], modality: str) -> Tensor | None:
    """For each cell of the images or videos of a call, the one that stands for it, `[cells]`.

    None without `pixel_tolerance`, within a call that has looked for them already, and for images that are not as the
    library wants them, of which its own error follows.

    Args:
        model: the part that reads visual tokens.
        inputs: arguments of its `get_image_features` or `get_video_features`.

    Raises:
        StateError: the program is exported.
    """
    tolerance, side = feature.config.pixel_tolerance, feature.family.cell(model)
    if tolerance is None or is_announced():
        return None
    if is_exporting():
        raise StateError(
            "pixel_tolerance cannot be exported: how many cells are left depends on an image's pixels; call "
            "handle.remove()"
        )
    pixels, grid = inputs.get(PIXELS[modality]), inputs.get(f"{modality}_grid_thw")
    if pixels is None or grid is None or pixels.ndim != 2 or len(pixels) != int(grid.prod(dim=1).sum()):
        return None
    encoder = feature.encoder
    assert encoder is not None
    windows = () if encoder.layout.windows is None else encoder.layout.windows(fetch(model, feature.family.tower))
    within = math.isqrt(max(windows, default=0)) // side
    cells = pixels.detach().reshape(len(pixels) // side**2, -1)
    return predicted_in_sequence(cells, grid // grid.new_tensor([1, side, side]), tolerance, within)


def mark_standing(outputs: Any, standing: Tensor, lengths: list[int]) -> None:
    """Have the library's outputs know, for each visual token of an image, the one of the image that stands for it."""
    found, first = [], 0
    for image, length in zip(torch.split(standing, lengths), lengths):
        found.append(image - first)
        first += length
    setattr(outputs, STANDING, found)


def standing_in(outputs: Any, config: ReadConfig) -> list[Tensor] | None:
    """For each visual token of each image the one that stands for it, `[tokens]` each; None without `pixel_tolerance`.

    Raises:
        StateError: the images were encoded by somebody who did not look.
    """
    found: list[Tensor] | None = getattr(outputs, STANDING, None)
    if config.pixel_tolerance is None:
        return None
    if found is None:
        raise StateError(
            f"pixel_tolerance={config.pixel_tolerance:g}: mm_encoder_outputs without what became of each cell: the "
            "tower has read all of them already. Encode the images with this model's own get_image_features while it "
            "is accelerated, or let generate do it"
        )
    return found


def alone(standing: Tensor) -> Tensor:
    """The places of the tokens that stay, `[left]`."""
    return (standing == torch.arange(len(standing), device=standing.device)).nonzero().squeeze(1)
