"""Positions of a prompt that has fewer placeholders than its images have tokens.

Every token keeps the position of the full prompt. Where text stands is known before an image is encoded; which of its
tokens are left is not. So a placeholder first has the position of the image itself, marked by its sign, and the place
within the image, its offset, comes with the features of the token that is left: as digits behind them, which every
floating-point type holds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 256
"""Integers up to it are exact in bfloat16."""
PLANES = 3
"""Of rotary positions: time, rows and columns. Where there is one alone, all three are equal."""
DIGITS = 2 * PLANES
"""Channels behind the features of a token."""


@dataclass(frozen=True)
class ImagePlace:
    """Where an image stands in a shortened prompt.

    Attributes:
        first: column of its first placeholder.
        kept: how many placeholders it has.
        tokens: how many tokens it has in the full prompt.
    """

    first: int
    kept: int
    tokens: int


def full_columns(length: int, images: Sequence[ImagePlace]) -> Tensor:
    """The column that each column of a prompt of `length` had in the full one; the first of its image for placeholders.

    Args:
        length: of the shortened prompt.
        images: in the prompt's order.
    """
    columns = torch.arange(length)
    for image in images:
        behind = image.first + image.kept
        columns[behind:] += image.tokens - image.kept
        columns[image.first : behind] = columns[image.first].clone()
    return columns


def unresolved(full: Tensor, length: int, images: Sequence[ImagePlace]) -> Tensor:
    """Positions of a shortened prompt, `[3, length]`: those of placeholders −1 − the position of their image.

    Args:
        full: positions of the full prompt, `[3, columns]`.
        length: of the shortened prompt.
        images: in the prompt's order.
    """
    positions = full[:, full_columns(length, images)].clone()
    for image in images:
        placeholders = slice(image.first, image.first + image.kept)
        positions[:, placeholders] = -1 - positions[:, placeholders]
    return positions


def resolve(positions: Tensor, offsets: Tensor) -> None:
    """Put in place what `unresolved` left open: `positions`, `[3, n]`, of placeholders become their image's + offset.

    Positions that are resolved stay as they are.

    Args:
        positions: changed in place, as graphs that were captured read them where they are.
        offsets: of each column's token within its image, `[3, n]`.
    """
    positions.copy_(torch.where(positions < 0, offsets - 1 - positions, positions))


def with_offsets(features: Tensor, offsets: Tensor) -> Tensor:
    """Features `[k, width]` with their tokens' offsets, `[3, k]`, below 65,536, as `DIGITS` channels behind them."""
    digits = torch.cat([offsets // BASE, offsets % BASE]).T.to(features)
    return torch.cat([features, digits], dim=1)


def split_offsets(features: Tensor) -> tuple[Tensor, Tensor]:
    """What `with_offsets` joined: features `[k, width]` and offsets `[3, k]`, int64."""
    digits = features[:, -DIGITS:].T.long()
    return features[:, :-DIGITS], digits[:PLANES] * BASE + digits[PLANES:]
