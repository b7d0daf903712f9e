"""Who may be merged into whom: the tokens split into candidates and partners."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbovlm.errors import ConfigError
from turbovlm.ops.backend import is_exporting

KEPT_LIMIT = 4096
_KEPT: dict[tuple[Any, ...], Tensor] = {}
"""Orders of tokens made so far, by what made them and of what."""

WINDOW = 512
WINDOWED_FROM = 1025
"""From so many patches on, `"random"` lets a token merge only within its window of about 512 patches."""

Index = slice | Tensor
"""Token indices: a slice with start, stop and step, `[k]` for all pictures of the batch, or `[batch, k]`."""


@dataclass(frozen=True)
class Partition:
    """Candidates may be merged, each into one of the partners. Both in ascending order; prefix tokens are neither.

    With several windows, the k-th part of the candidates may only be merged into the k-th part of the partners.
    """

    candidates: Index
    partners: Index
    windows: int = 1


def partition_tokens(
    tokens: int,
    prefix: int = 0,
    kind: str = "alternate",
    *,
    suffix: int = 0,
    block: int = 0,
    seed: int = 0,
    grid: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> Partition:
    """Split `tokens` tokens, the first `prefix` of which (CLS, distillation, registers) are protected.

    Args:
        tokens: N, prefix and suffix included.
        prefix: tokens at the front that are never merged and never merged into.
        kind: `"alternate"`: even indices are candidates, odd ones partners, as published. `"random"`: halves drawn
            from `seed` and `block`; from 1,025 patches on, merged within windows of about 512 patches, which costs N
            instead of N². `"grid"`: the top left patch of every 2×2 cell is a partner.
        grid: patch rows and columns for `"grid"`; a square if None.

    Raises:
        ConfigError: the patches do not fill the grid.
    """
    end = tokens - suffix
    patches = end - prefix
    if kind == "alternate":
        first = prefix + prefix % 2
        return Partition(slice(first, end, 2), slice(2 * prefix + 1 - first, end, 2))
    if kind == "random":
        order = _order("random", end, prefix, block, seed, device)
        return Partition(order[patches // 2 :], order[: patches // 2], window_count(patches))
    rows, columns = grid or (math.isqrt(patches), math.isqrt(patches))
    if rows * columns != patches:
        raise ConfigError(f"grid={grid}: {rows}x{columns} patches expected, {patches} found; give grid=(rows, columns)")
    partners = (rows + 1) // 2 * ((columns + 1) // 2)
    order = _order("grid", patches, prefix, columns, 0, device)
    return Partition(order[partners:], order[:partners])


def window_count(patches: int) -> int:
    """Into how many windows `"random"` divides the patches."""
    return 1 if patches < WINDOWED_FROM else -(-patches // WINDOW)


def _draw_halves(tokens: int, prefix: int, block: int, seed: int, device: torch.device | None) -> Tensor:
    """A random half of the patch tokens, then the others, each in ascending order, `[patches]`."""
    patches = tokens - prefix
    order = hashed_uniform(patches, seed, block, device).argsort() + prefix
    return torch.cat([order[: patches // 2].sort().values, order[patches // 2 :].sort().values])


def _cells(patches: int, prefix: int, columns: int, seed: int, device: torch.device | None) -> Tensor:
    """The top left patches of all 2×2 cells, then the others, each in ascending order, `[patches]`."""
    index = torch.arange(patches, device=device)
    corner = (index // columns % 2 == 0) & (index % columns % 2 == 0)
    return (index + patches * ~corner).argsort() + prefix


_MAKERS = {"random": _draw_halves, "grid": _cells}


def _order(kind: str, tokens: int, prefix: int, detail: int, seed: int, device: torch.device | None) -> Tensor:
    """What `_MAKERS` make; kept, but where a program is exported, and cells where one is compiled.

    Denoisers hold a group's partition until the forward ends, and Dynamo cannot hand on a constant of its graph.
    """
    if is_exporting() or (kind == "grid" and torch.compiler.is_compiling()):
        return _MAKERS[kind](tokens, prefix, detail, seed, device)
    order: Tensor = _kept(kind, operator.index(tokens), prefix, operator.index(detail), seed, device)
    return order


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kept(kind: str, tokens: int, prefix: int, detail: int, seed: int, device: torch.device | None) -> Tensor:
    """Kept for all forwards; a constant where a graph is compiled.

    Nothing is kept of a capture: its memory is the CUDA graph's.
    """
    key = (kind, tokens, prefix, detail, seed, device)
    fake = type(torch.empty(0, device=device)) is not Tensor
    if key in _KEPT and not fake:
        return _KEPT[key]
    with torch.inference_mode(False):
        order = _MAKERS[kind](tokens, prefix, detail, seed, device)
    if not fake and not (order.is_cuda and torch.cuda.is_current_stream_capturing()):
        if len(_KEPT) >= KEPT_LIMIT:
            _KEPT.clear()
        _KEPT[key] = order
    return order


def count(index: Index) -> int:
    """How many tokens an index names."""
    if isinstance(index, Tensor):
        return index.size(-1)
    length: int = (index.stop - index.start + index.step - 1) // index.step
    return max(length, 0)


def positions(index: Index, device: torch.device) -> Tensor:
    """An index as a tensor of token positions, `[k]` or `[batch, k]`."""
    if isinstance(index, Tensor):
        return index
    return torch.arange(index.start, index.stop, index.step, device=device)


def part(index: Index, where: slice, device: torch.device) -> Tensor:
    """Some of the token positions that `index` names, `[k]` or `[batch, k]`."""
    return positions(index, device)[..., where]


def look_up(index: Index, chosen: Tensor) -> Tensor:
    """The token positions that `chosen`, `[batch, r]`, points at among those that `index` names."""
    if isinstance(index, slice):
        moved: Tensor = chosen * index.step + index.start
        return moved
    return index.take(chosen) if index.ndim == 1 else index.gather(1, chosen)


def take(x: Tensor, index: Index) -> Tensor:
    """The indexed tokens of `x` `[batch, tokens, width]`; a view where the index is a slice."""
    if isinstance(index, slice):
        return x[:, index]
    if index.ndim == 1:
        return x[:, index]
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def hashed_uniform(length: int, seed: int, block: int, device: torch.device | None = None) -> Tensor:
    """Numbers in [0, 1) that depend on position, seed and block alone: `[length]`, float32, without a generator.

    Positions are counted up, as Inductor takes products of `arange` for small enough for 32 bits.
    """
    positions_from_1 = torch.ones(length, dtype=torch.int64, device=device).cumsum(0)
    x = positions_from_1 * 2654435761 + (seed * 1000003 + block + 1) * 40503
    for multiplier in (73244475, 73244475, 1):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    return (x & 0xFFFFFF).to(torch.float32) / 0x1000000
