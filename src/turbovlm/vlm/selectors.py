"""A selector of the user's: a function that says which visual tokens are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.checks import brief, called
from turbovlm.encoder.layout import fetch
from turbovlm.errors import ConfigError
from turbovlm.vlm.families import native_pixels, tokens_per_image
from turbovlm.vlm.marks import GRIDS

if TYPE_CHECKING:
    from turbovlm.vlm.install import ReadFeature

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image's visual tokens."""


def ask_selector(
    selector: Callable[..., Any],
    features: Tensor,
    attention: Tensor | None,
    text: Sequence[Tensor] | None,
    grid: Grid | None,
    k: int,
) -> Tensor:
    """The positions that `selector(features, attention, text, grid, k=k)` returns, ascending, `[images, k]`.

    Args:
        selector: the user's; see `ReadConfig`.
        features: `[images, n, width]`.
        attention: A, `[images, n]`; None where it is not known.
        text: the words of each image's prompt, `[words, width]` each; None where the prompt is not known.
        grid: of these images; None where it is not known.
        k: how many tokens of each image are to stay.

    Raises:
        ConfigError: it returned something else than `k` different positions for each image, or a mask of `k`.
    """
    found = selector(features, attention, text, grid, k=k)
    images, n = features.shape[:2]
    name = f"visual_select={called(selector)}"
    wanted = (
        f"the {k} visual tokens to be read of each of {images} images: integers ({images}, {k}) from 0 to {n - 1}, "
        f"each once, or a bool mask ({images}, {n})"
    )
    if not isinstance(found, Tensor):
        raise ConfigError(f"{name} returned a {type(found).__name__}, {brief(found)}; it must return {wanted}")
    if found.dtype == torch.bool:
        if found.shape != (images, n):
            raise ConfigError(f"{name} returned a mask of shape {tuple(found.shape)}; it must return {wanted}")
        counts = found.sum(dim=1).tolist()
        if counts != [k] * images:
            raise ConfigError(f"{name} returned a mask of {brief(counts)} tokens; it must return {wanted}")
        return found.nonzero()[:, 1].view(images, k).to(features.device)
    if found.is_floating_point() or found.is_complex() or found.shape != (images, k):
        raise ConfigError(f"{name} returned {found.dtype} of shape {tuple(found.shape)}; it must return {wanted}")
    kept = found.to(features.device, torch.int64).sort(dim=1).values
    if bool((kept < 0).any()) or bool((kept >= n).any()):
        raise ConfigError(
            f"{name} returned positions from {int(kept.min())} to {int(kept.max())}; it must return {wanted}"
        )
    if bool((kept.diff(dim=1) == 0).any()):
        raise ConfigError(f"{name} returned a position twice; it must return {wanted}")
    return kept


def grids_of(model: Any, feature: ReadFeature, outputs: Any, modality: str, counts: list[int]) -> list[Grid | None]:
    """The grid of each image where a selector of the user's is to know it, and it can be known; else None.

    It can where the tower's call says it (`image_grid_thw`), and for square images of the tower's own size.

    Args:
        model: the part that puts visual features in place of placeholders.
        feature: how it reads.
        outputs: what the library has encoded.
        modality: `"image"` or `"video"`.
        counts: tokens of each image.
    """
    if not callable(feature.config.visual_select):
        return [None] * len(counts)
    family, said = feature.family, getattr(outputs, GRIDS, None)
    if said is not None:
        side = family.cell(model)
        rows = [grid[0].tolist() for grid in said]
        found = [(frames, height // side, width // side) for frames, height, width in rows]
        fits = [math.prod(grid) for grid in found] == counts
        return list(found) if fits else [None] * len(counts)
    tower = getattr(fetch(model, family.tower), "config", None)
    plain = hasattr(tower, "patch_size") and hasattr(tower, "image_size") and not family.packed and not family.rearrange
    if not plain or modality != "image":
        return [None] * len(counts)
    square = tokens_per_image(family, model, native_pixels(family, model))
    if square is None:
        return [None] * len(counts)
    side = math.isqrt(square)
    return [(1, side, side) if n == square == side * side else None for n in counts]
