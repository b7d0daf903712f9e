"""The steps of `plain`, by the same names, for CPUs in eager mode: what is done with indices runs in NumPy.

A merge has about a hundred such steps on a few hundred numbers, and of an operator of PyTorch on so few the call is all
that takes time; NumPy's takes a third. What is done with tokens stays in PyTorch: `attend`, `attention_rows`,
`most_similar` and `average` are those of `plain`, and so is whatever these lack:

- `rank`: by a degree that is none of `RANKED`;
- `merge_tokens`: in another order than the tokens are in.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbovlm.ops import plain
from turbovlm.ops.degree import DegreeFunction, default_alpha
from turbovlm.ops.pairs import STEPS_DOUBLED
from turbovlm.ops.partition import Index, Partition
from turbovlm.ops.plain import Chosen, attend, attention_rows, average, most_similar
from turbovlm.ops.tracing import wants_gradient

__all__ = ["attend", "attention_rows", "average", "choose", "merge_tokens", "most_similar", "rank"]

RANKED = ("redundancy", "weighted_difference", "weighted_distance")
"""Degrees that `rank` knows."""

Numbers = NDArray[np.floating]
Indices = NDArray[np.integer]


def rank(
    redundancy: Tensor,
    nearest: Tensor,
    semantic: Tensor | None,
    partition: Partition,
    block: int,
    *,
    degree: str | DegreeFunction,
    alpha: float | None,
    seed: int,
    padding: Tensor | None,
    r: int | None,
) -> tuple[Tensor, Tensor, Chosen | None]:
    """See `plain.rank`."""
    if degree not in RANKED or padding is not None or (semantic is None and degree != "redundancy"):
        redundancy, e, _ = plain.rank(
            *(redundancy, nearest, semantic, partition, block),
            **{"degree": degree, "alpha": alpha, "seed": seed, "padding": padding, "r": None},
        )
        return redundancy, e, None if r is None else choose(e, nearest, partition, r)
    similar, partner = redundancy.detach().numpy(), nearest.numpy()
    if partition.all_pairs:
        similar = _same_for_both(similar, partner)
    e_numbers = similar
    if degree != "redundancy":
        assert semantic is not None
        own = plain.take_values(plain.over_heads(semantic.detach()), partition.candidates).numpy()
        alpha = default_alpha(degree) if alpha is None else alpha
        if degree == "weighted_difference":
            e_numbers = similar - similar.dtype.type(alpha) * own
        else:
            mean = np.maximum(own.mean(axis=1, keepdims=True), np.finfo(own.dtype).tiny)
            e_numbers = (similar - 1) * (1 + own.dtype.type(alpha) * np.sqrt(own / mean))
    redundancy, e = torch.from_numpy(similar), torch.from_numpy(e_numbers)
    return redundancy, e, None if r is None else choose(e, nearest, partition, r)


def _same_for_both(similar: Numbers, partner: Indices) -> Numbers:
    """See `turbovlm.ops.pairs.same_for_both`."""
    back = np.take_along_axis(partner, partner, axis=1)
    other = np.take_along_axis(similar, partner, axis=1)
    return np.where(back == np.arange(partner.shape[1]), np.maximum(similar, other), similar)


def choose(degree: Tensor, nearest: Tensor, partition: Partition, r: int) -> Chosen:
    """See `plain.choose`."""
    if not partition.all_pairs:
        return plain.choose(degree, nearest, partition, r)
    chosen, into = _paired(degree.detach().numpy(), nearest.numpy(), r)
    return _positions_at(partition.candidates, chosen), _positions_at(partition.destinations, into)


def _positions_at(index: Index, chosen: Indices) -> Tensor:
    assert isinstance(index, slice)  # as those of all pairs are
    return torch.from_numpy(chosen * index.step + index.start)


def _paired(degree: Numbers, nearest: Indices, r: int) -> tuple[Indices, Indices]:
    """See `turbovlm.ops.pairs.paired`, whose names these are; here, the images lie behind each other in one row."""
    batch, count = degree.shape
    first = np.arange(0, batch * count, count)[:, None]
    e, nearest, place = degree.ravel(), (nearest + first).ravel(), np.arange(batch * count)
    there = e[nearest]
    lower = (e < there) | ((e == there) & (place > nearest))
    root = (nearest[nearest] == place) & (lower | (nearest == place))
    parent = np.where(root, place, nearest)
    odd, ahead = ~root, parent
    for _ in range(STEPS_DOUBLED):
        odd = odd ^ odd[ahead]
        further = ahead[ahead]
        if np.array_equal(further, ahead):  # every way ends at its root
            break
        ahead = further
    goes = odd & ~odd[parent]
    stays = np.zeros(batch * count, dtype=bool)
    stays[parent[goes]] = True
    follows = goes[parent] & ~(odd | root | stays)
    kind = np.where(stays, 0, 1)
    kind[follows] = 2
    kind[goes] = 3
    kind[follows & np.isposinf(e)] = 3
    into = np.where(follows, parent[parent], parent).reshape(batch, count)
    order = np.lexsort((degree, kind.reshape(batch, count)), axis=1)  # by kind, then by E
    into = np.where(kind.reshape(batch, count) == 1, order[:, :1] + first, into)  # the last never goes
    chosen = order[:, count - r :]
    return chosen, np.take_along_axis(into, chosen, axis=1) - first


def merge_tokens(
    x: Tensor, sizes: Tensor | None, src: Tensor, dst: Tensor, slots: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `plain.merge_tokens`."""
    if slots is not None:
        return plain.merge_tokens(x, sizes, src, dst, slots, reduce)
    (batch, tokens), r = x.shape[:2], src.shape[1]
    left, first = tokens - r, np.arange(0, batch * tokens, tokens)[:, None]
    src_rows, dst_rows = ((each.numpy() + first).ravel() for each in (src, dst))
    stays = np.ones(batch * tokens, dtype=bool)
    stays[src_rows] = False
    rows = stays.cumsum() - 1  # a token that stays comes behind those before it that stay
    rows[src_rows] = rows[dst_rows]
    dtype = np.float64 if x.dtype == torch.float64 else np.float32
    own = np.ones(batch * tokens, dtype=dtype) if sizes is None else sizes.detach().numpy().ravel()
    counted = own * stays if reduce == "prune" else own
    merged_sizes = np.bincount(rows, counted, minlength=batch * left).astype(own.dtype)
    if reduce == "prune":
        weights = stays.astype(own.dtype)
    else:
        weights = counted / np.maximum(merged_sizes[rows], own.dtype.type(1e-6))  # padding has size 0
    bag = rows.argsort(kind="stable")
    starts = np.searchsorted(rows[bag], np.arange(batch * left))
    bags = tuple(map(torch.from_numpy, (bag, starts, weights[bag])))
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(merged_sizes), own.dtype.type(plain.LOG_0))
    of_rows, of_weights = torch.from_numpy(rows), torch.from_numpy(weights).view(batch, tokens)
    merged = plain.mean_of_bags(x, *bags).view(batch, left, x.shape[2])
    if reduce == "keep_norm":
        if wants_gradient(x):
            merged = plain.keep_norms(x, merged, of_rows, of_weights)
        else:
            merged = _keep_norms(x, merged, rows, weights)
    of_left = (torch.from_numpy(each).view(batch, left) for each in (merged_sizes, logs))
    return merged, of_rows, of_weights, *of_left


def _keep_norms(x: Tensor, mean: Tensor, rows: Indices, weights: Numbers) -> Tensor:
    """See `plain.keep_norms`."""
    precise = plain.precise_dtype(x)
    lengths, found = (torch.linalg.vector_norm(each, dim=-1, dtype=precise).numpy().ravel() for each in (x, mean))
    wanted = np.bincount(rows, lengths * weights, minlength=len(found)).astype(found.dtype)
    scale = np.where(found > plain.SHORTEST, wanted / np.maximum(found, plain.SHORTEST), 1).astype(found.dtype)
    return mean * torch.from_numpy(scale).view(*mean.shape[:2], 1).to(mean.dtype)
