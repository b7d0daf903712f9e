"""Who may be merged into whom: the tokens split into candidates and destinations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from turbovlm.errors import ConfigError
from turbovlm.ops.tracing import is_exporting, untraced

CACHE_LIMIT = 4096
_CACHED: dict[tuple[Any, ...], Partition] = {}
"""Partitions made so far, by what they are made of."""

WINDOW = 512
WINDOWED_FROM = 1025
"""From so many patches on, `"random"` and `"all"` let a token merge only within its window of about 512 patches:
similarity then costs N instead of N²; `benchmarks/fidelity.py` measures what that changes."""

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
        all_pairs: whether the candidates are the destinations too: each may be merged into any other of them.
    """

    candidates: Index
    destinations: Index
    windows: int = 1
    suffix: int = 0
    all_pairs: bool = False

    def count(self) -> int:
        """C, how many candidates there are."""
        return index_count(self.candidates)


def partition_tokens(
    tokens: int,
    prefix: int = 0,
    kind: str = "alternate",
    *,
    suffix: int = 0,
    block: int = 0,
    seed: int = 0,
    grid: tuple[int, int] | tuple[int, int, int] | None = None,
    device: torch.device | None = None,
) -> Partition:
    """Split `tokens` tokens, of which the first `prefix` (CLS, distillation, registers) and the last `suffix` stay.

    Args:
        tokens: N, prefix and suffix included.
        prefix: tokens at the front that are never merged and never merged into; `suffix`: those at the end.
        kind: `"alternate"`: even indices are candidates, odd ones destinations, as published. `"random"`: halves drawn
            from `seed` and `block`; from 1,025 patches on, merged within windows of about 512 patches, which costs N
            instead of N². `"grid"`: the top left patch of every 2×2 cell is a destination. `"all"`: every patch is a
            candidate and a destination; windows as for `"random"`.
        grid: patch rows and columns for `"grid"`, behind the number of images where there are several, as in a video;
            a square if None.

    Raises:
        ConfigError: the patches do not fill the grid.
    """
    patches = tokens - prefix - suffix
    if kind == "alternate":
        first_even, first_odd = prefix + prefix % 2, prefix + 1 - prefix % 2
        return Partition(slice(first_even, tokens - suffix, 2), slice(first_odd, tokens - suffix, 2), suffix=suffix)
    if kind == "all":
        patch_tokens = slice(prefix, tokens - suffix, 1)
        return Partition(patch_tokens, patch_tokens, window_count(patches), suffix, all_pairs=True)
    in_graph = torch.compiler.is_compiling()
    # Plain numbers: `torch.jit.trace` gives sizes as tensors, and a compiler would reason about symbols for minutes; a
    # graph has one compilation per shape anyway. Exported programs may take images of any size.
    if not (in_graph and is_exporting()):
        patches, prefix = operator.index(patches), operator.index(prefix)
    if kind == "random":
        detail: Any = block
        fixed, windows = patches // 2, window_count(patches)
    else:
        *frames, rows, columns = grid or (math.isqrt(patches), math.isqrt(patches))
        images = math.prod(frames)
        if images * rows * columns != patches:
            raise ConfigError(
                f"grid={grid}: {'x'.join(map(str, (*frames, rows, columns)))} patches expected, {patches} found; give "
                "grid=(rows, columns)"
            )
        fixed, windows, seed = images * ((rows + 1) // 2) * ((columns + 1) // 2), 1, 0
        detail = rows, columns
    if not in_graph:
        return _cached_partition(kind, patches, prefix, detail, seed, device, fixed, windows, suffix)
    # Computed by the graph: AOTAutograd takes the constants of two blocks for one source.
    order = _ORDER_MAKERS[kind](patches, prefix, detail, seed, device)
    return Partition(order[fixed:], order[:fixed], windows, suffix)


class Split(NamedTuple):
    """What a partition of tokens is made of: see `partition_tokens`."""

    kind: str
    prefix: int = 0
    suffix: int = 0
    block: int = 0
    seed: int = 0
    grid: tuple[int, int] | None = None

    def most(self, tokens: int, destinations: Tensor | None = None) -> int:
        """How many candidates there are, of `tokens` tokens; `destinations` as below."""
        patches = tokens - self.prefix - self.suffix
        if destinations is not None:
            return patches - destinations.shape[1]
        if self.kind != "grid":
            return patches if self.kind == "all" else patches - patches // 2
        rows, columns = self.grid or (math.isqrt(patches), math.isqrt(patches))
        return patches - (rows + 1) // 2 * ((columns + 1) // 2)

    def partition(self, tokens: int, device: torch.device, destinations: Tensor | None = None) -> Partition:
        """Who of `tokens` tokens may be merged into whom.

        Args:
            destinations: where those of a grid are by now, `[batch, destinations]`, int64; None before the first merge.
        """
        kind, prefix, suffix, block, seed, grid = self
        if destinations is None:
            return partition_tokens(
                tokens, prefix, kind, suffix=suffix, block=block, seed=seed, grid=grid, device=device
            )
        # the destinations of a grid stay so: all other patches are candidates, sorted in front of what is left out
        batch, fixed = destinations.shape
        place = torch.arange(tokens, device=device).expand(batch, -1).scatter(1, destinations, tokens)
        place[:, :prefix] = tokens
        place[:, tokens - suffix :] = tokens
        candidates = place.sort(dim=1).values[:, : tokens - prefix - suffix - fixed]
        return Partition(candidates, destinations, suffix=suffix)


def published_order(partition: Partition, tokens: int, device: torch.device) -> Tensor:
    """The place of each token in prefix, candidates, destinations, suffix, in a row, `[N]` or `[batch, N]`.

    Raises:
        ConfigError: all pairs are no halves to order by.
    """
    if partition.all_pairs:
        raise ConfigError('order="partition": partition="all" makes no halves to order by; use order="spatial"')
    place = torch.arange(tokens, device=device)
    halves = [positions(index, device) for index in (partition.candidates, partition.destinations)]
    patches = sum(half.shape[-1] for half in halves)
    prefix = tokens - patches - partition.suffix
    ends = [end.expand(*halves[0].shape[:-1], -1) for end in (place[:prefix], place[prefix + patches :])]
    order = torch.cat([ends[0], *halves, ends[1]], dim=-1)
    return order.scatter(-1, order, place.expand_as(order))


def window_count(patches: int) -> int:
    """The number of windows into which `"random"` and `"all"` divide the patches."""
    return 1 if patches < WINDOWED_FROM else -(-patches // WINDOW)


def _random_halves(patches: int, prefix: int, block: int, seed: int, device: torch.device | None) -> Tensor:
    """A random half of the patch tokens, then the others, each in ascending order, `[patches]`."""
    order = hashed_uniform(patches, seed, block, device).argsort() + prefix
    return torch.cat([order[: patches // 2].sort().values, order[patches // 2 :].sort().values])


def _corners_first(patches: int, prefix: int, image: tuple[int, int], seed: int, device: torch.device | None) -> Tensor:
    """The top left patches of all 2×2 cells of all images, then the others, each in ascending order, `[patches]`."""
    index, (rows, columns) = torch.arange(patches, device=device), image
    corner = (index // columns % rows % 2 == 0) & (index % columns % 2 == 0)
    return (index + patches * ~corner).argsort() + prefix


_ORDER_MAKERS: dict[str, Callable[..., Tensor]] = {"random": _random_halves, "grid": _corners_first}


def _cached_partition(
    kind: str,
    patches: int,
    prefix: int,
    detail: Any,
    seed: int,
    device: torch.device | None,
    fixed: int,
    windows: int,
    suffix: int,
) -> Partition:
    """The partition whose destinations are the first `fixed` of the order by `_ORDER_MAKERS`, made once."""
    key = (kind, patches, prefix, detail, seed, device, fixed, windows, suffix)
    # tensors without values, of a mode that only follows shapes, stay out of the cache, and cached ones out of the mode
    fake = _get_current_dispatch_mode() is not None and type(torch.empty(0, device=device)) is not Tensor
    if not fake and (found := _CACHED.get(key)) is not None:
        return found
    with torch.inference_mode(False), untraced():  # or later forwards with gradients could not use it
        order = _ORDER_MAKERS[kind](patches, prefix, detail, seed, device)
        made = Partition(order[fixed:], order[:fixed], windows, suffix)
    # what a capture allocates is the CUDA graph's memory, which a later replay overwrites
    if not fake and not (order.is_cuda and torch.cuda.is_current_stream_capturing()):
        if len(_CACHED) >= CACHE_LIMIT:
            _CACHED.clear()
        _CACHED[key] = made
    return made


def index_count(index: Index) -> int:
    """How many tokens an index has."""
    # no `len(range(…))`, as the sizes of an exported program are symbols
    return index.shape[-1] if isinstance(index, Tensor) else max(-((index.start - index.stop) // index.step), 0)


def positions(index: Index, device: torch.device) -> Tensor:
    """An index as a tensor of token positions, `[k]` or `[batch, k]`."""
    if isinstance(index, Tensor):
        return index
    return torch.arange(index.start, max(index.start, index.stop), index.step, device=device)


def hashed_uniform(length: int, seed: int, block: int, device: torch.device | None = None) -> Tensor:
    """Numbers in [0, 1) that depend on position, seed and block alone: `[length]`, float32, without a generator."""
    # counted up from 1, as Inductor takes products of `arange` for small enough for 32 bits
    positions_from_1 = torch.ones(length, dtype=torch.int64, device=device).cumsum(0)
    x = positions_from_1 * 2654435761 + (seed * 1000003 + block + 1) * 40503 % 2**63
    for multiplier in (73244475, 73244475, 1):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    return (x & 0xFFFFFF).to(torch.float32) / 0x1000000
