"""Who goes into whom where any token may merge into any other."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS_DOUBLED = 6
"""How often the steps to a root are doubled: trees of similar tokens are rarely deeper than the 64 steps it makes."""


def same_for_both(redundancy: Tensor, nearest: Tensor) -> Tensor:
    """R of all pairs, `[batch, n]`, the same for two that are each other's most similar, whatever rounding says."""
    place = torch.arange(nearest.shape[1], device=nearest.device)
    is_mutual = nearest.gather(1, nearest) == place
    return torch.where(is_mutual, torch.maximum(redundancy, redundancy.gather(1, nearest)), redundancy)


def paired(degree: Tensor, nearest: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Of tokens that may merge into any other: the r that do, and where each goes, none of which goes itself.

    Every token points to its most similar one. Of two that point to each other, the one of lower E, or the second of
    equals, is a root, and so the tokens form trees; along the way to a root similarity grows. Those an odd number of
    steps away from their root merge, by E, each into the one it points to. Where these are fewer than r, leaves an even
    number of steps away follow into where theirs went. A token that another goes into never goes: at least half of the
    tokens can.

    Args:
        degree: E, `[batch, n]`.
        nearest: the most similar of the others, `[batch, n]`, int64.
        r: at most n // 2.

    Returns:
        Indices, `[batch, r]` each.
    """
    count = degree.shape[1]
    place = torch.arange(count, device=degree.device).expand_as(nearest)
    there = degree.gather(1, nearest)
    lower = (degree < there) | ((degree == there) & (place > nearest))
    root = (nearest.gather(1, nearest) == place) & (lower | (nearest == place))  # itself: it has no other
    parent = torch.where(root, place, nearest)
    odd, ahead = ~root, parent
    for _ in range(STEPS_DOUBLED):
        odd, ahead = odd ^ odd.gather(1, ahead), ahead.gather(1, ahead)
    goes = odd & ~odd.gather(1, parent)
    stays = torch.zeros_like(nearest).scatter_add(1, parent, goes.to(nearest.dtype)) > 0
    follows = ~odd & ~root & ~stays & goes.gather(1, parent)
    # ranked: those that go, and padding; those that follow; whoever has no place in a tree (cycles of equals, depth)
    kind = torch.where(goes | (follows & (degree == torch.inf)), 3, torch.where(follows, 2, torch.where(stays, 0, 1)))
    order = degree.argsort(dim=1).argsort(dim=1) + count * kind  # not `stable`, which ONNX lacks: equals in any order
    into = torch.where(follows, parent.gather(1, parent), parent)
    ranked = order.argsort(dim=1, descending=True)
    into = torch.where(kind == 1, ranked[:, -1:], into)  # the last never goes
    chosen = ranked[:, :r]
    return chosen, into.gather(1, chosen)
