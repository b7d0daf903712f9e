"""A block's whole merge in one call; in compiled programs, one operator."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.degree import DegreeFunction
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.merging import Merge, merge_ranked, rank_candidates
from turbovlm.ops.partition import Split
from turbovlm.ops.tracing import is_exporting, wants_gradient

Merged = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The merged tokens; and `rows`, `src`, `weights`, `sizes` and `logs` of `Merge`."""


class Guide(NamedTuple):
    """By whose attention tokens weigh: see `plain.attention_rows`, whose arguments these are."""

    q: Tensor
    keys: Tensor
    content: Tensor | None
    bias: Tensor | None
    weights: Tensor | None
    guides: tuple[int, int]
    scale: float
    of_features: bool
    """Whether the content (or the keys) of all heads are the features that are compared: their lengths come with it."""

    def rows(self, path: ModuleType) -> tuple[Tensor, Tensor | None]:
        """What the guide attends to, and squared lengths of parts of the features where they come with it."""
        q, keys, content, bias, weights, guides, scale, of_features = self
        rows, squares = path.attention_rows(q, keys, bias, guides=guides, weights=weights, scale=scale, content=content)
        return rows, squares if of_features else None


NO_GUIDE = (None, None, None, None, None, (0, 1), 1.0, False)


class Rules(NamedTuple):
    """How tokens are ranked and merged: see `TurboConfig`."""

    degree: str | DegreeFunction
    alpha: float | None
    seed: int
    order: str
    reduce: str


def merge_whole(
    path: ModuleType,
    x: Tensor,
    features: Tensor,
    guide: Guide | None,
    sizes: Tensor | None,
    split: Split,
    destinations: Tensor | None,
    rules: Rules,
    *,
    r: int,
    index: int,
    padded: bool = False,
) -> tuple[Merge, Tensor]:
    """What `rank_candidates` and `merge_ranked` do, in one call.

    Args:
        path: from `path_for`.
        x: the tokens, `[batch, N, width]`.
        features: what is compared, `[batch, N, any width]`.
        guide: None where the degree needs no A. With a content of its own, or keys that are the features, squared
            lengths come with its rows.
        sizes: patches each token stands for, `[batch, N]`; ones if None.
        split: who may be merged into whom; `destinations`: as `Split.partition` takes them.
        rules: how.
        r: tokens to merge, ≥ 1, at most the number of candidates.
        index: of the merging block, counted from 0.
        padded: whether some of the tokens are padding, of size 0.

    Returns:
        The merge, and the merged tokens, `[batch, N − r, width]`.
    """
    if torch.compiler.is_compiling() and not (is_exporting() or wants_gradient(x, features)):
        q, keys, content, bias, weights, guides, scale, of_features = guide or NO_GUIDE
        merged, rows, src, weights, left, logs = merge_operator(
            *(x, features, sizes, destinations, q, keys, content, bias, weights, list(guides), scale, of_features),
            *(*split[:5], list(split.grid or ()), *rules, r, index, padded),
        )
        return Merge(rows, src, weights, left, rules.reduce == "keep_norm", logs=logs), merged
    partition = split.partition(x.shape[1], x.device, destinations)
    # autograd, modes that count or fake, and subclasses of tensors see the steps
    if not wants_gradient(x, features) and type(x) is Tensor and _get_current_dispatch_mode() is None:
        found: Merged | None = path.at_once(x, features, guide, sizes, partition, rules, r, padded)
        if found is not None:
            merged, rows, src, weights, left, logs = found
            return Merge(rows, src, weights, left, rules.reduce == "keep_norm", logs=logs), merged
    semantic, squares = (None, None) if guide is None else guide.rows(path)
    ranking = rank_candidates(
        *(features, partition, semantic, index),
        degree=rules.degree,
        alpha=rules.alpha,
        seed=rules.seed,
        sizes=sizes if padded else None,
        squares=squares,
        r=r,
        path=path,
    )
    return merge_ranked(ranking, r, x, sizes=sizes, order=rules.order, reduce=rules.reduce, path=path)


@torch.library.custom_op("turbovlm::merge_whole", mutates_args=())
def merge_operator(
    x: Tensor,
    features: Tensor,
    sizes: Tensor | None,
    destinations: Tensor | None,
    q: Tensor | None,
    keys: Tensor | None,
    content: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    guides: list[int],
    scale: float,
    of_features: bool,
    kind: str,
    prefix: int,
    suffix: int,
    block: int,
    split_seed: int,
    grid: list[int],
    degree: str,
    alpha: float | None,
    seed: int,
    order: str,
    reduce: str,
    r: int,
    index: int,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`merge_whole` with its tuples laid open, `q` None where there is no guide: compilers do not look into it."""
    guide = None
    if q is not None and keys is not None:
        guide = Guide(q, keys, content, bias, weights, (guides[0], guides[1]), scale, of_features)
    split = Split(kind, prefix, suffix, block, split_seed, (grid[0], grid[1]) if grid else None)
    merge, merged = merge_whole(
        *(path_for(x), x, features, guide, sizes, split, destinations, Rules(degree, alpha, seed, order, reduce)),
        r=r,
        index=index,
        padded=padded,
    )
    assert merge.logs is not None
    return merged, merge.rows, merge.src, merge.weights, merge.sizes, merge.logs


@merge_operator.register_fake
def _(x: Tensor, *others: Any) -> Merged:
    (batch, tokens, width), r = x.shape, others[-3]
    rows, src = (x.new_empty(shape, dtype=torch.int64) for shape in ((batch * tokens,), (batch, r)))
    precise, left = precise_dtype(x), tokens - r
    weights, sizes, logs = (x.new_empty(batch, count, dtype=precise) for count in (tokens, left, left))
    return x.new_empty(batch, left, width), rows, src, weights, sizes, logs
