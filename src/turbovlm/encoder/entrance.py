"""Patches that other patches stand for, left out before a packed tower's first block.

Who encodes images says which they are (`leaving_out`); the tower that runs next in its thread leaves them out, by a
merge in which the one that stands for others keeps its own value. From there on it is a merge like any other: rotary
positions are those of the patches left, segments and windows are as much shorter, and what reads every position gets
each its own back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.encoder.state import State
from turbovlm.errors import StateError
from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.merging import Merge

if TYPE_CHECKING:
    from turbovlm.encoder.feature import EncoderFeature


class _Announced(threading.local):
    """For each cell of the images to be encoded next in this thread, the one that stands for it; None otherwise."""

    standing: Tensor | None = None


_ANNOUNCED = _Announced()


@contextlib.contextmanager
def leaving_out(standing: Tensor | None) -> Iterator[None]:
    """Have the packed tower that this thread runs next leave out the cells that others stand for.

    Args:
        standing: for each cell the one that stands for it, itself where it stays, `[cells]`, in the order of the
            pixels; None for nothing.
    """
    outer, _ANNOUNCED.standing = _ANNOUNCED.standing, standing
    try:
        yield
    finally:
        _ANNOUNCED.standing = outer


def is_announced() -> bool:
    """Whether it was said of the images about to be encoded which of their cells are left out."""
    return _ANNOUNCED.standing is not None


def standing_patches(
    feature: EncoderFeature, tower: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """For each patch in the order of the tower's blocks the one that stands for it, `[patches]`.

    None where nothing was said of the images of this call, and where every patch stays. What was said is used up.

    Raises:
        StateError: it was said of other images.
    """
    standing, _ANNOUNCED.standing = _ANNOUNCED.standing, None
    layout = feature.layout
    if standing is None or layout.cell is None:
        return None
    cells = torch.arange(len(standing), device=standing.device)
    if torch.equal(standing, cells):
        return None
    pixels, grid = (
        kwargs.get(name, args[at] if len(args) > at else None) for at, name in enumerate(("hidden_states", "grid_thw"))
    )
    unit = layout.cell(tower) ** 2
    if pixels is None or grid is None or len(pixels) != len(standing) * unit:
        raise StateError(
            f"{feature.tower or 'the tower'} got other images than those whose cells of equal pixels were looked for: "
            f"{None if pixels is None else len(pixels)} patches where {len(standing)} cells of {unit} were"
        )
    if layout.order is not None:
        order = layout.order(tower, grid, dict(kwargs)).to(standing.device)
        place = torch.empty_like(order).scatter_(0, order, cells)
        standing = place[standing[order]]
    within = torch.arange(unit, device=standing.device)
    return (standing.unsqueeze(1) * unit + within).flatten()


def enter(feature: EncoderFeature, state: State, hidden: Tensor, standing: Tensor) -> tuple[Tensor, State]:
    """The tokens that stay before the first block, and the state with this merge.

    One that stands for others keeps its own value, and counts as one in attention: of a tower whose weights are real,
    counting all that it stands for, or the mean of their embeddings, changed the output more (benchmarks/pixels.py).

    Args:
        hidden: what the first block gets, `[1, tokens, width]`.
        standing: for each token the one that stands for it, `[tokens]`.
    """
    standing = standing.to(hidden.device)
    stays = standing == torch.arange(len(standing), device=standing.device)
    kept, gone = (which.nonzero().squeeze(1) for which in (stays, ~stays))
    rows = (stays.cumsum(0) - 1)[standing]
    weights = stays.to(precise_dtype(hidden)).unsqueeze(0)
    merge = Merge(rows, gone.unsqueeze(0), weights, torch.ones_like(weights[:, : len(kept)]))
    keeps_apart = feature.how == "residual" and (feature.restore or state.whole)
    where = (kept - state.prefix).unsqueeze(0)
    state = state.changed(
        merges=(merge,),
        lost=(None,) if keeps_apart else (),  # what an equal cell was apart is not given back
        positions=where if feature.layout.rotary is not None else None,
        entered=where,
    )
    return hidden.index_select(1, kept), state
