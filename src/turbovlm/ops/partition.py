"""Who may be merged into whom: the tokens split into candidates and destinations; and how tokens are indexed."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbovlm.errors import ConfigError
from turbovlm.ops.tracing import constant_in_graphs, is_exporting

CACHE_LIMIT = 4096
_CACHED_ORDERS: dict[tuple[Any, ...], Tensor] = {}
"""Orders of patches made so far, by what made them and of what."""

WINDOW = 512
WINDOWED_FROM = 1025
"""From so many patches on, `"random"` lets a token merge only within its window of about 512 patches: similarity then
costs N instead of N²; `benchmarks/fidelity.py` measures what that changes."""

Index = slice | Tensor
"""Token indices: a slice with start, stop and step, `[k]` for all images of the batch, or `[batch, k]`."""


@dataclass(frozen=True)
class Partition:
    """Each of the candidates may be merged into one of the destinations. Prefix and suffix tokens are neither.

    With several windows, the k-th part of the candidates may only be merged into the k-th part of the destinations.

    Attributes:
        candidates, destinations: token positions, ascending.
        windows: how many parts there are.
        suffix: tokens at the end that are neither.
    """

    candidates: Index
    destinations: Index
    windows: int = 1
    suffix: int = 0

    def window_slices(self) -> list[tuple[slice, slice]]:
        """The candidates and the destinations of each window, as slices of theirs."""

        def share(length: int, window: int) -> slice:
            return slice(length * window // self.windows, length * (window + 1) // self.windows)

        sizes = count(self.candidates), count(self.destinations)
        return [(share(sizes[0], window), share(sizes[1], window)) for window in range(self.windows)]


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
    """Split `tokens` tokens, of which the first `prefix` (CLS, distillation, registers) and the last `suffix` stay.

    Args:
        tokens: N, prefix and suffix included.
        prefix: tokens at the front that are never merged and never merged into; `suffix`: those at the end.
        kind: `"alternate"`: even indices are candidates, odd ones destinations, as published. `"random"`: halves drawn
            from `seed` and `block`; from 1,025 patches on, merged within windows of about 512 patches, which costs N
            instead of N². `"grid"`: the top left patch of every 2×2 cell is a destination.
        grid: patch rows and columns for `"grid"`; a square if None.

    Raises:
        ConfigError: the patches do not fill the grid.
    """
    end = tokens - suffix
    patches = end - prefix
    if kind == "alternate":
        first_even, first_odd = prefix + prefix % 2, prefix + 1 - prefix % 2
        return Partition(slice(first_even, end, 2), slice(first_odd, end, 2), suffix=suffix)
    if kind == "random":
        order = _patch_order("random", end, prefix, block, seed, device)
        return Partition(order[patches // 2 :], order[: patches // 2], window_count(patches), suffix)
    rows, columns = grid or (math.isqrt(patches), math.isqrt(patches))
    if rows * columns != patches:
        raise ConfigError(f"grid={grid}: {rows}x{columns} patches expected, {patches} found; give grid=(rows, columns)")
    cells = (rows + 1) // 2 * ((columns + 1) // 2)
    order = _patch_order("grid", patches, prefix, columns, 0, device)
    return Partition(order[cells:], order[:cells], suffix=suffix)


def window_count(patches: int) -> int:
    """The number of windows into which `"random"` divides the patches."""
    return 1 if patches < WINDOWED_FROM else -(-patches // WINDOW)


def _random_halves(tokens: int, prefix: int, block: int, seed: int, device: torch.device | None) -> Tensor:
    """A random half of the patch tokens, then the others, each in ascending order, `[patches]`."""
    patches = tokens - prefix
    order = hashed_uniform(patches, seed, block, device).argsort() + prefix
    return torch.cat([order[: patches // 2].sort().values, order[patches // 2 :].sort().values])


def _corners_first(patches: int, prefix: int, columns: int, seed: int, device: torch.device | None) -> Tensor:
    """The top left patches of all 2×2 cells, then the others, each in ascending order, `[patches]`."""
    index = torch.arange(patches, device=device)
    corner = (index // columns % 2 == 0) & (index % columns % 2 == 0)
    return (index + patches * ~corner).argsort() + prefix


_ORDER_MAKERS = {"random": _random_halves, "grid": _corners_first}


def _patch_order(kind: str, tokens: int, prefix: int, detail: int, seed: int, device: torch.device | None) -> Tensor:
    """The order by `_ORDER_MAKERS`; from the cache, but where a program is exported, or cells where one is compiled.

    Denoisers hold a group's partition until the forward ends, and Dynamo cannot hand on a constant of its graph.
    """
    if is_exporting() or (kind == "grid" and torch.compiler.is_compiling()):
        return _ORDER_MAKERS[kind](tokens, prefix, detail, seed, device)
    # numbers that Dynamo takes for symbols become plain ones, as arguments of a constant must be
    return _cached_order(kind, operator.index(tokens), prefix, operator.index(detail), seed, device)


@constant_in_graphs
def _cached_order(kind: str, tokens: int, prefix: int, detail: int, seed: int, device: torch.device | None) -> Tensor:
    """The order, made once for all forwards; a constant where a graph is compiled."""
    key = (kind, tokens, prefix, detail, seed, device)
    fake = type(torch.empty(0, device=device)) is not Tensor
    if key in _CACHED_ORDERS and not fake:
        return _CACHED_ORDERS[key]
    with torch.inference_mode(False):  # or later forwards with gradients could not use it
        order = _ORDER_MAKERS[kind](tokens, prefix, detail, seed, device)
    # what a capture allocates is the CUDA graph's memory, which a later replay overwrites
    if not fake and not (order.is_cuda and torch.cuda.is_current_stream_capturing()):
        if len(_CACHED_ORDERS) >= CACHE_LIMIT:
            _CACHED_ORDERS.clear()
        _CACHED_ORDERS[key] = order
    return order


def count(index: Index) -> int:
    """The number of tokens that an index names."""
    if isinstance(index, Tensor):
        return index.size(-1)
    length: int = (index.stop - index.start + index.step - 1) // index.step
    return max(length, 0)


def positions(index: Index, device: torch.device) -> Tensor:
    """An index as a tensor of token positions, `[k]` or `[batch, k]`."""
    if isinstance(index, Tensor):
        return index
    return torch.arange(index.start, index.stop, index.step, device=device)


def positions_at(index: Index, chosen: Tensor) -> Tensor:
    """The token positions at the places `chosen`, `[batch, r]`, of an index."""
    if isinstance(index, slice):
        found: Tensor = chosen * index.step + index.start
        return found
    return index.take(chosen) if index.ndim == 1 else index.gather(1, chosen)


def take_tokens(x: Tensor, index: Index) -> Tensor:
    """The indexed tokens of `x`, `[batch, tokens, width]`; a view where the index is a slice."""
    if isinstance(index, slice) or index.ndim == 1:
        return x[:, index]
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def take_values(values: Tensor, index: Index) -> Tensor:
    """The indexed entries of a value per token: `[batch, tokens]` to `[batch, k]`."""
    if isinstance(index, slice):
        return values[:, index]
    return values.index_select(1, index) if index.ndim == 1 else values.gather(1, index)


def row_offsets(values: Tensor) -> Tensor:
    """The row at which each image begins when `values`, `[batch, k]`, is flattened, `[batch, 1]`."""
    batch, length = values.shape
    return torch.arange(0, batch * length, length, device=values.device).unsqueeze(1)


def precise_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over `x` are taken: float32, or that of `x` where it is more precise."""
    return torch.promote_types(x.dtype, torch.float32)


def hashed_uniform(length: int, seed: int, block: int, device: torch.device | None = None) -> Tensor:
    """Numbers in [0, 1) that depend on position, seed and block alone: `[length]`, float32, without a generator."""
    # counted up from 1, as Inductor takes products of `arange` for small enough for 32 bits
    positions_from_1 = torch.ones(length, dtype=torch.int64, device=device).cumsum(0)
    x = positions_from_1 * 2654435761 + (seed * 1000003 + block + 1) * 40503
    for multiplier in (73244475, 73244475, 1):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    return (x & 0xFFFFFF).to(torch.float32) / 0x1000000
