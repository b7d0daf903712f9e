"""Who may be merged into whom: the tokens split into candidates and partners."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from turbovlm.errors import ConfigError

Index = slice | Tensor
"""Token indices: a slice with start, stop and step, `[k]` for all pictures of the batch, or `[batch, k]`."""


@dataclass(frozen=True)
class Partition:
    """Candidates may be merged, each into one of the partners. Both in ascending order; prefix tokens are neither."""

    candidates: Index
    partners: Index


def partition_tokens(
    tokens: int,
    prefix: int = 0,
    kind: str = "alternate",
    *,
    block: int = 0,
    seed: int = 0,
    grid: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> Partition:
    """Split `tokens` tokens, the first `prefix` of which (CLS, distillation, registers) are protected.

    Args:
        tokens: N, the prefix included.
        prefix: tokens at the front that are never merged and never merged into.
        kind: `"alternate"`: even indices are candidates, odd ones partners, as published. `"random"`: halves drawn
            from `seed` and `block`. `"grid"`: the top left patch of every 2×2 cell is a partner.
        grid: patch rows and columns for `"grid"`; a square if None.

    Raises:
        ConfigError: the patches do not fill the grid.
    """
    patches = tokens - prefix
    if kind == "alternate":
        first = prefix + prefix % 2
        return Partition(slice(first, tokens, 2), slice(2 * prefix + 1 - first, tokens, 2))
    if kind == "random":
        order = hashed_uniform(patches, seed, block, device).argsort() + prefix
        half = patches // 2
        return Partition(order[half:].sort().values, order[:half].sort().values)
    rows, columns = grid or (math.isqrt(patches), math.isqrt(patches))
    if rows * columns != patches:
        raise ConfigError(f"grid={grid}: {rows}x{columns} patches expected, {patches} found; give grid=(rows, columns)")
    index = torch.arange(patches, device=device)
    corner = (index // columns % 2 == 0) & (index % columns % 2 == 0)
    partners = (rows + 1) // 2 * ((columns + 1) // 2)
    order = (~corner).to(torch.int8).argsort(stable=True) + prefix
    return Partition(order[partners:], order[:partners])


@lru_cache(maxsize=4096)
def kept_partition(
    tokens: int,
    prefix: int,
    kind: str,
    *,
    block: int,
    seed: int,
    grid: tuple[int, int] | None,
    device: torch.device,
) -> Partition:
    """`partition_tokens`, made once for all forwards; not for use while tracing, whose tensors must not be kept."""
    with torch.inference_mode(False):
        return partition_tokens(tokens, prefix, kind, block=block, seed=seed, grid=grid, device=device)


def count(index: Index) -> int:
    """How many tokens an index names."""
    if isinstance(index, Tensor):
        return index.shape[-1]
    length: int = (index.stop - index.start + index.step - 1) // index.step
    return max(length, 0)


def positions(index: Index, device: torch.device) -> Tensor:
    """An index as a tensor of token positions, `[k]` or `[batch, k]`."""
    if isinstance(index, Tensor):
        return index
    return torch.arange(index.start, index.stop, index.step, device=device)


def take(x: Tensor, index: Index) -> Tensor:
    """The indexed tokens of `x` `[batch, tokens, width]`; a view where the index is a slice."""
    if isinstance(index, slice):
        return x[:, index]
    if index.ndim == 1:
        return x.index_select(1, index)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def hashed_uniform(length: int, seed: int, block: int, device: torch.device | None = None) -> Tensor:
    """Numbers in [0, 1) that depend on position, seed and block alone: `[length]`, float32, without a generator."""
    x = torch.arange(1, length + 1, device=device) * 2654435761 + (seed * 1000003 + block + 1) * 40503
    for multiplier in (73244475, 73244475, 1):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    return (x & 0xFFFFFF).to(torch.float32) / 0x1000000
