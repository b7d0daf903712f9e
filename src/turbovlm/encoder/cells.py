"""Merges that are chosen in parts: within the images of a packed sequence, and among whole squares of patches.

Squares are those that a merger joins. They are compared by their patches' features side by side, and ranked by the sum
of their A. One that goes is averaged into its destination place by place, so that every square left is whole. Which
tokens go where is all that differs: from there on, the merge is one like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.encoder.attention import Heads, guide_of
from turbovlm.encoder.state import State
from turbovlm.errors import ConfigError, StateError
from turbovlm.ops.merging import Merge, rank_candidates
from turbovlm.ops.partition import Split
from turbovlm.ops.tracing import is_readable

if TYPE_CHECKING:
    from turbovlm.encoder.feature import EncoderFeature
    from turbovlm.encoder.towers import Tower


def check_cells(tower: Tower, config: TurboConfig) -> None:
    """See that settings are possible for a tower of packed sequences, or of some blocks with windows, and for cells.

    Raises:
        ConfigError: saying which are.
    """
    which, in_cells = f"{tower.title} ({tower.layout.family})", config.partition == "cells"
    if in_cells and tower.cell == 1:
        raise ConfigError(f"partition='cells': nothing that reads {which} is known to join squares of its patches")
    if in_cells or tower.layout.packed:
        words = "of partition='cells'" if in_cells else f"of {which}, which runs images as one packed sequence,"
        if config.partition == "grid" or config.order == "partition":
            found = "order='partition'" if config.order == "partition" else "partition='grid'"
            raise ConfigError(f"{found}: merges {words} know no such halves; use partition='all' or 'random'")
        for name in ("thresholds", "trace"):
            if getattr(config, name):
                raise ConfigError(f"{name}: it is not kept of merges {words}: leave it out")
    if in_cells and isinstance(config.r, tuple) and any(r % tower.cell**2 for r in config.r):
        raise ConfigError(
            f"r={list(config.r)}: squares of {tower.cell**2} patches merge as one: give multiples of {tower.cell**2}"
        )
    windows = () if tower.layout.windows is None else tower.layout.windows(tower.module)
    if not any(windows):
        return
    asked = config.blocks if isinstance(config.blocks, tuple) else range(len(tower.blocks))
    amounts = config.r if isinstance(config.r, tuple) else [int(isinstance(config.blocks, tuple))] * len(asked)
    within = [block for block, r in zip(asked, amounts) if r and windows[block]]
    if within:
        whole = [block for block, window in enumerate(windows) if window == 0]
        raise ConfigError(f"block {within[0]} of {which} attends within windows; tokens merge in {whole}")


def merge_cells(
    path: ModuleType,
    feature: EncoderFeature,
    index: int,
    state: State,
    r: int,
    x: Tensor,
    features: Tensor,
    heads: Heads,
) -> tuple[Merge, Tensor, Tensor | None]:
    """Merge `r` tokens of each image of a batch, or `state.spare` of each segment of a packed sequence, in cells.

    A cell is a square of patches for `partition="cells"`, else one patch.

    Args:
        x: the tokens, `[batch, N, width]`; a packed sequence is a batch of one.
        features: what is compared, `[batch, N, any width]`.
        heads: what this block has attended with.

    Returns:
        The merge, the merged tokens, and where the cells of a batch's images are behind it, as in `State.cells`.

    Raises:
        StateError: patches that are no square of whole cells, or padding inside an image.
    """
    if state.segments is None:
        cells = _cells_of(feature, state, x)
        src, dst = _choose(path, feature, index, state, r, features, _semantic(path, feature, state, heads), cells)
        src_tokens, dst_tokens = _tokens(cells, src), _tokens(cells, dst)
    else:
        cells, unit, found = None, feature.shape.unit, []
        for rows, spare in _alike(state):
            one = _of_rows(heads, state, rows)
            within = torch.arange(rows.shape[1], device=rows.device).view(1, -1, unit).expand(len(rows), -1, -1)
            semantic = _semantic(path, feature, *one)
            chosen = _choose(path, feature, index, state, spare, features[0][rows], semantic, within)
            found.append([rows.gather(1, _tokens(within, each)).flatten() for each in chosen])
        src_tokens, dst_tokens = (torch.cat(each).unsqueeze(0) for each in zip(*found))
    reduce = feature.config.reduce
    merged, merged_rows, weights, sizes, logs = path.merge_tokens(x, state.sizes, src_tokens, dst_tokens, None, reduce)
    merge = Merge(merged_rows, src_tokens, weights, sizes, reduce == "keep_norm", logs=logs)
    return merge, merged, None if cells is None else _left(cells, src, merge)


def _choose(
    path: ModuleType,
    feature: EncoderFeature,
    index: int,
    state: State,
    r: int,
    features: Tensor,
    semantic: Tensor | None,
    cells: Tensor,
) -> tuple[Tensor, Tensor]:
    """The cells that go, and those that they are merged into, `[images, r / unit]` each.

    Args:
        features: `[images, N, width]`; `semantic`: A, `[images, N]`.
        cells: the tokens of each, `[images, cells, unit]`.
    """
    config, (images, count, unit) = feature.config, cells.shape
    flat = cells.flatten(1)
    alike = features.gather(1, flat.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
    alike = compared(alike.view(images, count, unit, -1))
    if semantic is not None:
        semantic = semantic.gather(1, flat).view(images, count, unit).sum(dim=2)
    kind = "all" if feature.partition == "cells" else feature.partition
    partition = Split(kind, block=index, seed=config.seed).partition(count, features.device)
    ranking = rank_candidates(
        *(alike, partition, semantic, len(state.merges)),
        degree=config.degree,
        alpha=config.alpha,
        seed=config.seed,
        r=r // unit,
        path=path,
    )
    if ranking.chosen is not None:
        return ranking.chosen
    chosen: tuple[Tensor, Tensor] = path.choose(ranking.degree, ranking.nearest, ranking.partition, r // unit)
    return chosen


def compared(features: Tensor) -> Tensor:
    """What cells are compared by, `[images, cells, width]`, of their patches' `[images, cells, unit, width]`."""
    return features.flatten(2)


def _semantic(path: ModuleType, feature: EncoderFeature, state: State, heads: Heads) -> Tensor | None:
    """A of every token, `[images, N]`; None where the degree needs none."""
    if not feature.semantic:
        return None
    return guide_of(heads, feature.guidance, state).rows(path)[0].mean(dim=1)


def _cells_of(feature: EncoderFeature, state: State, x: Tensor) -> Tensor:
    """The tokens of each cell of a batch's images, `[batch, cells, unit]`: those so far, or squares of a square."""
    if state.cells is not None:
        return state.cells
    unit, patches = feature.shape.unit, x.shape[1] - state.prefix - state.suffix
    side, length = math.isqrt(unit), math.isqrt(patches)
    if length * length != patches or length % side:
        raise StateError(
            f"{patches} patches found where {feature.tower or 'the model'} is read in cells of {side}×{side}: they are "
            "no square of them"
        )
    if state.padded and state.sizes is not None and is_readable(state.sizes) and not bool((state.sizes > 0).all()):
        raise StateError(
            f"{feature.config.amount}: images with padding inside, whose cells of {side}×{side} patches would be part "
            "of it: give images that fill their pixels, or call handle.remove()"
        )
    place = torch.arange(patches, device=x.device).view(length // side, side, length // side, side)
    return (place.transpose(1, 2).reshape(-1, unit) + state.prefix).expand(x.shape[0], -1, -1)


def _alike(state: State) -> Iterator[tuple[Tensor, int]]:
    """Places of the tokens of segments of one length that give up as many, `[segments, length]`, and how many."""
    assert state.segments is not None
    starts: dict[tuple[int, int], list[int]] = {}
    start, device = 0, state.segments.device
    for length, spare in zip(state.segments.lengths, state.spare):
        if spare > 0:
            starts.setdefault((length, spare), []).append(start)
        start += length
    for (length, spare), found in starts.items():
        first = torch.tensor(found, device=device).unsqueeze(1)
        yield first + torch.arange(length, device=device), spare


def _of_rows(heads: Heads, state: State, rows: Tensor) -> tuple[State, Heads]:
    """What a packed sequence attends with, `[1, heads, N, head_dim]`, of the segments at `rows`, as a batch."""

    def at(x: Tensor) -> Tensor:
        return x[0][:, rows].transpose(0, 1)

    q, k = at(heads.q), at(heads.k)
    content = k if heads.content is heads.k else at(heads.content)
    bias = None if heads.bias is None else heads.bias[0, 0, 0][rows][:, None, None, :]
    sizes = None if state.sizes is None else state.sizes[0][rows]
    return State(state.block, (), 0, sizes=sizes), Heads(q, k, q, content, bias, heads.scale, 0.0)


def _tokens(cells: Tensor, chosen: Tensor) -> Tensor:
    """The tokens of the cells that were chosen, `[images, chosen · unit]`."""
    index = chosen.unsqueeze(-1).expand(-1, -1, cells.shape[-1])
    return cells.gather(1, index).flatten(1)


def _left(cells: Tensor, src: Tensor, merge: Merge) -> Tensor:
    """Where the tokens of the cells left are behind a merge, `[batch, cells left, unit]`, the cells in order."""
    images, count, unit = cells.shape
    gone = torch.zeros(images, count, dtype=torch.int64, device=cells.device).scatter(1, src, 1)
    left = gone.argsort(dim=1, stable=True)[:, : count - src.shape[1]]
    kept = _tokens(cells, left)
    return merge.source.gather(1, kept).view(images, -1, unit)
