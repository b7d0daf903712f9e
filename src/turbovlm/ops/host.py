"""The steps of `plain`, by the same names, for CPUs in eager mode: what is done with indices runs in NumPy.

A merge of any two tokens has many such steps, on a few hundred numbers each, and an operator of PyTorch on so few takes
the time of its call (`benchmarks/host_time.py`). What is done with tokens stays in PyTorch. `attend` and
`attention_rows` are those of `plain`, and so is what these lack:

- `most_similar`: but for all pairs in one window, none of them hidden, without gradients;
- `rank` and `choose`: but among all pairs; `rank`: with gradients wanted;
- `merge_tokens`: in another order than the tokens are in; `merge_tokens` and `average`: with gradients wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbovlm.ops import averaging, plain
from turbovlm.ops.averaging import Bags
from turbovlm.ops.degree import FUSIONS, DegreeFunction, default_alpha
from turbovlm.ops.pairs import STEPS_DOUBLED
from turbovlm.ops.partition import Index, Partition
from turbovlm.ops.plain import Chosen, attend, attention_rows
from turbovlm.ops.tracing import wants_gradient

if TYPE_CHECKING:
    from turbovlm.ops.whole import Guide, Merged, Rules

__all__ = ["at_once", "attend", "attention_rows", "average", "choose", "merge_tokens", "most_similar", "rank"]

Numbers = NDArray[np.floating]
Indices = NDArray[np.integer]


def most_similar(
    features: Tensor, partition: Partition, hidden: Tensor | None = None, squares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `plain.most_similar`."""
    one_window = partition.all_pairs and partition.windows == 1 and partition.count() > 1
    if not one_window or hidden is not None or wants_gradient(features):
        return plain.most_similar(features, partition, hidden, squares)
    some = plain.take_tokens(features.detach(), partition.candidates)
    some = some.to(averaging.precise_dtype(some))
    unit = some / torch.linalg.vector_norm(some, dim=-1, keepdim=True).clamp_min_(averaging.SHORTEST)
    cosine = torch.bmm(unit, unit.transpose(1, 2))
    cosine.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # none is its own destination
    redundancy, nearest = cosine.max(dim=-1)
    return redundancy, nearest


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
    how: dict[str, Any] = {"degree": degree, "alpha": alpha, "seed": seed, "padding": padding}
    if not partition.all_pairs or wants_gradient(redundancy):
        return plain.rank(redundancy, nearest, semantic, partition, block, **how, r=r)
    trees = _Trees(nearest.numpy())
    redundancy = torch.from_numpy(trees.same_for_both(_numbers(redundancy)))
    e = plain.degree_of_candidates(redundancy, semantic, partition.candidates, block, **how)
    return redundancy, e, None if r is None else _tokens_at(partition, *trees.chosen(_numbers(e), r))


def choose(degree: Tensor, nearest: Tensor, partition: Partition, r: int) -> Chosen:
    """See `plain.choose`."""
    if not partition.all_pairs:
        return plain.choose(degree, nearest, partition, r)
    return _tokens_at(partition, *_Trees(nearest.numpy()).chosen(_numbers(degree), r))


def _tokens_at(partition: Partition, go: Indices, into: Indices) -> Chosen:
    src, dst = _positions_at(partition.candidates, go), _positions_at(partition.destinations, into)
    return torch.from_numpy(src), torch.from_numpy(dst)


def _numbers(values: Tensor) -> Numbers:
    """NumPy has no bfloat16, and works slowly with float16."""
    found: Numbers = values.detach().to(averaging.precise_dtype(values)).numpy()
    return found


class _Trees:
    """Who points to whom where any token may merge into any other; the images lie behind each other in one row."""

    def __init__(self, nearest: Indices) -> None:
        batch, count = nearest.shape
        self.first = np.arange(0, batch * count, count)[:, None]
        self.nearest, self.place = (nearest + self.first).ravel(), np.arange(batch * count)
        self.mutual = self.nearest[self.nearest] == self.place

    def same_for_both(self, similar: Numbers) -> Numbers:
        """See `turbovlm.ops.pairs.same_for_both`."""
        own = similar.ravel()
        both: Numbers = np.where(self.mutual, np.maximum(own, own[self.nearest]), own).reshape(similar.shape)
        return both

    def chosen(self, degree: Numbers, r: int) -> tuple[Indices, Indices]:
        """See `turbovlm.ops.pairs.paired`, whose names these are; `[batch, r]`, indices of candidates."""
        (batch, count), e, nearest, place = degree.shape, degree.ravel(), self.nearest, self.place
        there = e[nearest]
        lower = (e < there) | ((e == there) & (place > nearest))
        root = self.mutual & (lower | (nearest == place))
        parent = np.where(root, place, nearest)
        odd, ahead = ~root, parent
        for _ in range(STEPS_DOUBLED):
            odd = odd ^ odd[ahead]
            further = ahead[ahead]
            if (further == ahead).all():  # every way ends at its root
                break
            ahead = further
        goes = odd & ~odd[parent]
        stays = np.zeros(batch * count, dtype=bool)
        stays[parent[goes]] = True
        follows = goes[parent] & ~(odd | root | stays)
        kind = np.where(stays, 0, 1)
        kind[follows] = 2
        kind[goes | (follows & (e == np.inf))] = 3
        order = np.lexsort((degree, kind.reshape(batch, count)), axis=1) + self.first  # by kind, then by E
        go = order[:, count - r :]
        into = parent[go]
        into = np.where(follows[go], parent[into], np.where(kind[go] == 1, order[:, :1], into))
        return go - self.first, into - self.first


def _halves_chosen(degree: Numbers, nearest: Indices, r: int) -> tuple[Indices, Indices]:
    """The r candidates of highest degree, and the destination of each, `[batch, r]`, indices among theirs."""
    go = degree.argpartition(degree.shape[1] - r, axis=1)[:, degree.shape[1] - r :]
    return go, np.take_along_axis(nearest, go, axis=1)


def _positions_at(index: Index, chosen: Indices) -> Indices:
    """See `plain._positions_at`."""
    if isinstance(index, slice):
        found: Indices = chosen * index.step + index.start
        return found
    table = index.numpy()
    return table[chosen] if table.ndim == 1 else np.take_along_axis(table, chosen, axis=1)


def at_once(
    x: Tensor,
    features: Tensor,
    guide: Guide | None,
    sizes: Tensor | None,
    partition: Partition,
    rules: Rules,
    r: int,
    index: int,
    padded: bool,
) -> Merged | None:
    """See `plain.at_once`; None with padding, in another order than the tokens are in, or by a random degree."""
    if padded or rules.order != "spatial" or (rules.degree != "redundancy" and rules.degree not in FUSIONS):
        return None
    best, indices = most_similar(features, partition)
    nearest: Indices = indices.numpy()
    e = _numbers(best)
    trees = _Trees(nearest) if partition.all_pairs else None
    if trees is not None:
        e = trees.same_for_both(e)
    if guide is not None:
        semantic: Numbers = _numbers(guide.rows(plain)[0]).mean(axis=1)
        alpha = default_alpha(rules.degree) if rules.alpha is None else rules.alpha
        e = FUSIONS[rules.degree](e, _values_at(semantic, partition.candidates), alpha)
    go, into = _halves_chosen(e, nearest, r) if trees is None else trees.chosen(e, r)
    src, dst = _positions_at(partition.candidates, go), _positions_at(partition.destinations, into)
    merged, rows, weights, left, logs = _merge(x, None if sizes is None else _numbers(sizes), src, dst, rules.reduce)
    return merged, rows, torch.from_numpy(src), weights, left, logs


def _values_at(values: Numbers, index: Index) -> Numbers:
    """See `plain.take_values`."""
    if isinstance(index, slice):
        return values[:, index]
    table = index.numpy()
    return values[:, table] if table.ndim == 1 else np.take_along_axis(values, table, axis=1)


def merge_tokens(
    x: Tensor, sizes: Tensor | None, src: Tensor, dst: Tensor, slots: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `plain.merge_tokens`."""
    if slots is not None or wants_gradient(x):
        return plain.merge_tokens(x, sizes, src, dst, slots, reduce)
    return _merge(x, None if sizes is None else _numbers(sizes), src.numpy(), dst.numpy(), reduce)


def _merge(
    x: Tensor, sizes: Numbers | None, src: Indices, dst: Indices, reduce: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`merge_tokens`: tokens that stay are copied, and of those that others join, means are written over the copies."""
    (batch, tokens, width), r = x.shape, src.shape[1]
    first = np.arange(0, batch * tokens, tokens)[:, None]
    src_rows, dst_rows = (src + first).ravel(), (dst + first).ravel()
    stays = np.ones(batch * tokens, dtype=bool)
    stays[src_rows] = False
    rows = stays.cumsum() - 1  # a token that stays comes behind those before it that stay
    into = rows[dst_rows]
    rows[src_rows] = into
    dtype = np.dtype(np.float64 if x.dtype == torch.float64 else np.float32)
    own = np.ones(batch * tokens, dtype) if sizes is None else sizes.ravel()
    left = own[stays]
    if reduce == "prune":
        weights = stays.astype(own.dtype)
    else:
        left += np.bincount(into, own[src_rows], minlength=len(left)).astype(own.dtype)
        weights = own / np.maximum(left[rows], own.dtype.type(1e-6))  # padding has size 0
    merged = _averaged(x, rows, weights, len(left), reduce == "keep_norm")
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(left), left.dtype.type(plain.LOG_0))
    shape = batch, tokens - r
    of_rows, of_weights = torch.from_numpy(rows), torch.from_numpy(weights.reshape(batch, tokens))
    of_left, of_logs = torch.from_numpy(left.reshape(shape)), torch.from_numpy(logs.reshape(shape))
    return merged.view(*shape, width), of_rows, of_weights, of_left, of_logs


def average(
    x: Tensor, rows: Tensor, weights: Tensor, left: torch.Size, keep_norm: bool, bags: Bags | None = None
) -> Tensor:
    """See `plain.average`."""
    if wants_gradient(x):
        return averaging.average(x, rows, weights, left, keep_norm, bags)
    return _averaged(x, rows.numpy(), _numbers(weights).ravel(), left.numel(), keep_norm).view(*left, x.shape[-1])


def _averaged(x: Tensor, rows: Indices, weights: Numbers, count: int, keep_norm: bool) -> Tensor:
    """The weighted sums of `averaging.average`, `[count, width]`: tokens that weigh 1 are copied, others are added."""
    whole = (weights == 1).nonzero()[0]
    kept, changed = np.zeros(count, dtype=np.int64), np.ones(count, dtype=bool)
    kept[rows[whole]], changed[rows[whole]] = whole, False
    tokens = x.flatten(0, 1)
    sums = tokens.index_select(0, torch.from_numpy(kept))
    targets = changed.nonzero()[0]
    if len(targets) == 0:
        return sums
    members = changed[rows].nonzero()[0]
    members = members[rows[members].argsort(kind="stable")]
    starts, shares = rows[members].searchsorted(targets), weights[members]
    bags = tuple(map(torch.from_numpy, (members, starts, shares)))
    mean = averaging.mean_of_bags(x, *bags)
    if keep_norm:
        parts = tokens.index_select(0, bags[0])
        lengths, found = (np.sqrt(np.einsum("ij,ij->i", each, each)) for each in map(_numbers, (parts, mean)))
        wanted = np.add.reduceat(lengths * shares, starts)
        scale = np.where(found > averaging.SHORTEST, wanted / np.maximum(found, averaging.SHORTEST), 1)
        mean *= torch.from_numpy(scale.astype(found.dtype)).to(mean.dtype).unsqueeze(1)
    return sums.index_copy_(0, torch.from_numpy(targets), mean)
