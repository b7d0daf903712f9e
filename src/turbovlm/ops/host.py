"""The steps of `plain`, by the same names, for CPUs in eager mode: what is done with indices runs in NumPy.

A merge of any two tokens has many such steps, on a few hundred numbers each, and an operator of PyTorch on so few takes
the time of its call (`benchmarks/host_time.py`). What is done with tokens stays in PyTorch. `attend`, `attention_rows`,
`average`, `merge_books` and `restore` are those of `plain`, and so is what these lack:

- `most_similar`: but for all pairs in one window, none of them hidden, without gradients;
- `rank` and `choose`: but among all pairs; `rank`: with gradients wanted;
- `merge_tokens`: in another order than the tokens are in, or with gradients wanted;
- `at_once`: with padding, in another order, or by a random degree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turbovlm.ops import averaging, plain
from turbovlm.ops.averaging import average
from turbovlm.ops.degree import FUSIONS, DegreeFunction, default_alpha
from turbovlm.ops.pairs import STEPS_DOUBLED
from turbovlm.ops.partition import Index, Partition
from turbovlm.ops.plain import Chosen, attend, attention_rows, merge_books
from turbovlm.ops.restoring import restore
from turbovlm.ops.tracing import wants_gradient

if TYPE_CHECKING:
    from turbovlm.ops.whole import Guide, Merged, Rules

__all__ = [
    "at_once",
    "attend",
    "attention_rows",
    "average",
    "choose",
    "merge_books",
    "merge_tokens",
    "most_similar",
    "rank",
    "restore",
]

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
    padded: bool,
) -> Merged | None:
    """See `plain.at_once`."""
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
    """`merge_tokens`, with arrays for all but the tokens."""
    (batch, tokens, width), r = x.shape, src.shape[1]
    left, first = tokens - r, np.arange(0, batch * tokens, tokens)[:, None]
    src_rows, dst_rows = (src + first).ravel(), (dst + first).ravel()
    stays = np.ones(batch * tokens, dtype=bool)
    stays[src_rows] = False
    rows = stays.cumsum() - 1  # a token that stays comes behind those before it that stay
    rows[src_rows] = rows[dst_rows]
    members = np.bincount(rows, minlength=batch * left)
    bag, starts = rows.argsort(kind="stable"), members.cumsum() - members
    dtype = np.dtype(np.float64 if x.dtype == torch.float64 else np.float32)
    if sizes is None and reduce != "prune":
        merged_sizes = members.astype(dtype)
        weights = (1 / merged_sizes)[rows]
    else:
        own = np.ones(batch * tokens, dtype) if sizes is None else sizes.ravel()
        counted = own * stays if reduce == "prune" else own
        merged_sizes = np.bincount(rows, counted, minlength=batch * left).astype(own.dtype)
        shares = counted / np.maximum(merged_sizes[rows], own.dtype.type(1e-6))  # padding has size 0
        weights = stays.astype(own.dtype) if reduce == "prune" else shares
    bags = tuple(map(torch.from_numpy, (bag, starts, weights[bag])))
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(merged_sizes), merged_sizes.dtype.type(plain.LOG_0))
    merged = averaging.mean_of_bags(x, *bags).view(batch, left, width)
    if reduce == "keep_norm":
        merged = _keep_norms(x, merged, rows, weights)
    of_rows, of_weights = torch.from_numpy(rows), torch.from_numpy(weights.reshape(batch, tokens))
    of_left, of_logs = (torch.from_numpy(each.reshape(batch, left)) for each in (merged_sizes, logs))
    return merged, of_rows, of_weights, of_left, of_logs


def _keep_norms(x: Tensor, mean: Tensor, rows: Indices, weights: Numbers) -> Tensor:
    """See `averaging.keep_norms`."""
    precise = averaging.precise_dtype(x)
    lengths, found = (torch.linalg.vector_norm(each, dim=-1, dtype=precise).numpy().ravel() for each in (x, mean))
    wanted = np.bincount(rows, lengths * weights, minlength=len(found)).astype(found.dtype)
    scale = np.where(found > averaging.SHORTEST, wanted / np.maximum(found, averaging.SHORTEST), 1).astype(found.dtype)
    return mean * torch.from_numpy(scale).view(*mean.shape[:2], 1).to(mean.dtype)
