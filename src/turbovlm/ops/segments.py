"""Packed sequences: tokens of several images, frames or windows in a row, which attend within their own segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENTS, SHORTENED = "_turbovlm_segments", "_turbovlm_shortened"
"""Names of the attributes of `cu_seqlens` that keep its `Segments`, and those left of them: every block of a forward
gets the same tensor."""


@dataclass(frozen=True)
class Segments:
    """Where the segments of a packed sequence are, those of one length together.

    Attributes:
        lengths: tokens of each segment, in order.
        device: where the tokens are.
        groups: `(count, length)` of the segments of each length, the lengths in order of their first segment.
        order: the tokens, those of the first group in front, `[tokens]`, int64; None where that is their order anyway.
        place: where each token is in `order`, `[tokens]`; None likewise.
    """

    lengths: tuple[int, ...]
    device: torch.device
    groups: tuple[tuple[int, int], ...]
    order: Tensor | None
    place: Tensor | None

    def split(self, x: Tensor) -> list[Tensor]:
        """`[1, heads, tokens, width]` by groups: `[count, heads, length, width]` each."""
        heads, width = x.shape[1], x.shape[3]
        rows = x[0].transpose(0, 1)
        rows = rows if self.order is None else rows.index_select(0, self.order)
        parts = torch.split(rows, [count * length for count, length in self.groups])
        return [
            part.view(count, length, heads, width).transpose(1, 2) for part, (count, length) in zip(parts, self.groups)
        ]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo `split`, of `[count, length, heads, width]` each: `[1, tokens, heads, width]`."""
        rows = torch.cat([part.flatten(0, 1) for part in parts]) if len(parts) > 1 else parts[0].flatten(0, 1)
        return (rows if self.place is None else rows.index_select(0, self.place)).unsqueeze(0)


def segments_of(bounds: Tensor) -> Segments:
    """The segments between `bounds`, `[segments + 1]`: the number of tokens before each, and of all.

    They are read from the device once for each tensor, and kept on it until somebody changes it.
    """
    known: tuple[int, Segments] | None = getattr(bounds, SEGMENTS, None)
    if known is not None and known[0] == _version(bounds):
        return known[1]
    found = segments_from(bounds.diff().tolist(), bounds.device)
    if (version := _version(bounds)) is not None:
        setattr(bounds, SEGMENTS, (version, found))
    return found


def _version(bounds: Tensor) -> int | None:
    """How often a tensor was changed; None where nothing may be kept on it, or would not be seen to be old."""
    return None if torch.compiler.is_compiling() or bounds.is_inference() else bounds._version


def shortened(bounds: Tensor, kept: Tensor | None) -> Segments:
    """What is left of the segments between `bounds` where only the tokens at `kept`, `[1, left]`, are; all if None."""
    if kept is None:
        return segments_of(bounds)
    known: tuple[int, Tensor, Segments] | None = getattr(bounds, SHORTENED, None)
    if known is not None and known[0] == _version(bounds) and known[1] is kept:
        return known[2]
    numbers = torch.searchsorted(bounds, kept[0].to(bounds.dtype), right=True) - 1
    found = segments_from(torch.bincount(numbers, minlength=len(bounds) - 1).tolist(), kept.device)
    if (version := _version(bounds)) is not None:
        setattr(bounds, SHORTENED, (version, kept, found))
    return found


def segments_from(lengths: Sequence[int], device: torch.device) -> Segments:
    """Segments of `lengths` tokens, in order; those without tokens are left out."""
    lengths = tuple(length for length in lengths if length > 0)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    of_length: dict[int, list[int]] = {}
    for start, length in zip(starts, lengths):
        of_length.setdefault(length, []).append(start)
    groups = tuple((len(found), length) for length, found in of_length.items())
    if lengths == tuple(length for count, length in groups for _ in range(count)):
        return Segments(lengths, device, groups, None, None)
    rows = [(torch.tensor(found).unsqueeze(1) + torch.arange(length)).flatten() for length, found in of_length.items()]
    order = torch.cat(rows)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return Segments(lengths, device, groups, order.to(device), place.to(device))


def attend_within(attend: Callable[..., Tensor], segments: Segments, *heads: Tensor) -> Tensor:
    """Attention within segments: one call for all that have one length.

    Args:
        attend: a function of queries, keys and values, `[batch, heads, tokens, width]` each, and of whatever else is
            given here; returns `[batch, tokens, heads, width]`.
        segments: of the packed sequence.
        heads: `[1, heads, tokens, width]` each.

    Returns:
        `[1, tokens, heads, width]`.
    """
    return segments.join([attend(*parts) for parts in zip(*(segments.split(x) for x in heads))])
