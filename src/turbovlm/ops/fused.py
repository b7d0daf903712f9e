"""The steps of `plain`, by the same names, as Triton's kernels on NVIDIA GPUs.

What the kernels lack goes to `plain`'s function of the same name:

- `attend`: without a bias (PyTorch's own kernel is as fast then), with dropout, with gradients wanted, in float32,
  with heads of more than 128 channels, or on GPUs before compute capability 8.0;
- `attention_rows`: with gradients wanted, or in float64;
- `most_similar`: without destinations;
- `rank`: with padding, or by a degree that is none of `kernels.RANKED`;
- `rank` and `choose`: among more than `MOST_RANKED` candidates, or by degrees of another dtype than kernels take;
- `merge_books`: of tokens of other sizes than 1, in another order, or in float64;
- `merge_tokens` with `"keep_norm"`, `average` and `restore`: with gradients wanted, and `restore` of other dtypes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turbovlm.ops import averaging, kernels, plain, restoring
from turbovlm.ops.averaging import Bags
from turbovlm.ops.degree import DegreeFunction, default_alpha
from turbovlm.ops.kernels import usable
from turbovlm.ops.partition import Partition, index_count, published_order
from turbovlm.ops.plain import Chosen
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
    "usable",
]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float = 0.0) -> Tensor:
    """See `plain.attend`; the bias is added to the scores in registers."""
    if bias is None or dropout_p > 0 or wants_gradient(q, k, v) or not kernels.attends(q, k, v):
        return plain.attend(q, k, v, bias, scale, dropout_p)
    attended: Tensor = kernels.biased_attention(q, k, v, bias, scale)
    return attended


def attention_rows(
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    *,
    guides: tuple[int, int] = (0, 1),
    weights: Tensor | None = None,
    scale: float = 1.0,
    content: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `plain.attention_rows`."""
    if wants_gradient(q, keys) or keys.dtype not in kernels.DTYPES:
        return plain.attention_rows(q, keys, bias, guides=guides, weights=weights, scale=scale, content=content)
    rows, squares = kernels.attention_rows(q, keys, content, bias, weights, list(guides), scale)
    return rows, squares


def most_similar(
    features: Tensor, partition: Partition, hidden: Tensor | None = None, squares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `plain.most_similar`."""
    candidates, destinations = partition.candidates, partition.destinations
    counts = [index_count(candidates), index_count(destinations), partition.windows]
    if counts[1] == 0:
        return plain.most_similar(features, partition, hidden)
    squares = _squares(features, partition) if squares is None else squares
    redundancy, nearest = kernels.most_similar(features, squares, hidden, *_placed(partition), counts)
    return redundancy, nearest


def _squares(features: Tensor, partition: Partition) -> Tensor | None:
    """Squared lengths, `[batch, 1, tokens]`; None where the programs that compare them measure them in passing.

    Programs of 64 candidates do not: these hold products in all of their registers (`tests/compiled_kernels.py`).
    """
    windows = partition.windows
    if kernels.candidates_at_a_time(len(features) * windows, -(-partition.count() // windows)) < 64:
        return None
    lengths: Tensor = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)
    return lengths.square().unsqueeze(1)


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
    """See `plain.at_once`: four launches, and those of a published order; None where a step is not a kernel's."""
    degree, counts = rules.degree, [partition.count(), index_count(partition.destinations), partition.windows]
    takes = all(each.dtype in kernels.DTYPES for each in (x, features)) and 0 < counts[0] <= kernels.MOST_RANKED
    if padded or counts[1] == 0 or degree not in kernels.RANKED or not takes:
        return None
    own = (None,) * 5 if guide is None else guide[:5]
    if guide is not None and guide.keys.dtype not in kernels.DTYPES:
        return None
    placed = _placed(partition)
    known = None if guide is not None and guide.of_features else _squares(features, partition)
    slots = None if rules.order == "spatial" else published_order(partition, x.shape[1], x.device)

    def launch() -> Merged:
        rows, squares = None, known
        if guide is not None:
            q, keys, content, bias, shares, guides, scale, of_features = guide
            rows, lengths = kernels.attention_rows.eager(q, keys, content, bias, shares, guides, scale)
            squares = lengths if of_features else known
        found = kernels.most_similar.eager(features, squares, None, *placed, counts)
        alpha = default_alpha(degree) if rules.alpha is None else rules.alpha
        _, _, src, dst = kernels.choose.eager(*found, rows, *placed, degree, alpha, partition.all_pairs, r)
        merged, where, weights, left, logs = kernels.merge_tokens.eager(x, sizes, src, dst, slots, rules.reduce)
        return merged, where, src, weights, left, logs

    how = (rules, r, *(() if guide is None else guide[5:]), *placed[2], *counts, partition.all_pairs)
    merged, where, src, weights, left, logs = kernels.replayed(
        launch, (x, features, sizes, *own, *placed[:2], known, slots), x, how
    )
    return merged, where, src, weights, left, logs


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
    takes = degree in kernels.RANKED and _takes(redundancy)
    if not takes or padding is not None or (semantic is None and degree != "redundancy"):
        redundancy, e, _ = plain.rank(
            *(redundancy, nearest, semantic, partition, block),
            degree=degree,
            alpha=alpha,
            seed=seed,
            padding=padding,
            r=None,
        )
        return redundancy, e, None if r is None else choose(e, nearest, partition, r)
    alpha = default_alpha(degree) if alpha is None else alpha
    rows = semantic if semantic is None or semantic.ndim == 3 else semantic.unsqueeze(1)
    redundancy, e, src, dst = kernels.choose(
        *(redundancy.detach(), nearest, None if rows is None else rows.detach(), *_placed(partition)),
        *(degree, alpha, partition.all_pairs, r or 0),
    )
    return redundancy, e, None if r is None else (src, dst)


def choose(degree: Tensor, nearest: Tensor, partition: Partition, r: int) -> Chosen:
    """See `plain.choose`; here, those that go are in ascending order."""
    if not _takes(degree):
        return plain.choose(degree, nearest, partition, r)
    _, _, src, dst = kernels.choose(
        degree.detach(), nearest, None, *_placed(partition), "given", 0.0, partition.all_pairs, r
    )
    return src, dst


def _takes(degree: Tensor) -> bool:
    """Whether `kernels.choose` takes degrees, or R, `[batch, candidates]`."""
    return 0 < degree.shape[1] <= kernels.MOST_RANKED and degree.dtype in kernels.DTYPES


def _placed(partition: Partition) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """Candidates and destinations as kernels take them: tables, or where slices begin and how they go on."""
    both = partition.candidates, partition.destinations
    tables = [index if isinstance(index, Tensor) else None for index in both]
    slices = [index for index in both if isinstance(index, slice)]
    firsts = [index.start if isinstance(index, slice) else 0 for index in both]
    return tables[0], tables[1], [*firsts, slices[0].step if slices else 1]


def merge_tokens(
    x: Tensor, sizes: Tensor | None, src: Tensor, dst: Tensor, slots: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `plain.merge_tokens`; tokens and books in one launch."""
    if reduce == "keep_norm" and wants_gradient(x):
        return plain.merge_tokens(x, sizes, src, dst, slots, reduce)
    merged, rows, weights, merged_sizes, logs = kernels.merge_tokens(x, sizes, src, dst, slots, reduce)
    return merged, rows, weights, merged_sizes, logs


def merge_books(
    src: Tensor,
    dst: Tensor,
    tokens: int,
    dtype: torch.dtype,
    sizes: Tensor | None,
    slots: Tensor | None,
    reduce: str,
) -> tuple[Tensor, Tensor, Tensor, Bags | None]:
    """See `plain.merge_books`."""
    if sizes is not None or slots is not None or dtype != torch.float32:
        return plain.merge_books(src, dst, tokens, dtype, sizes, slots, reduce)
    rows, weights, merged_sizes, *bags = kernels.merge_books(src, dst, tokens, reduce == "prune")
    return rows, weights, merged_sizes, (bags[0], bags[1], bags[2])


def average(
    x: Tensor, rows: Tensor, weights: Tensor, left: torch.Size, keep_norm: bool, bags: Bags | None = None
) -> Tensor:
    """See `plain.average`."""
    if wants_gradient(x):
        return averaging.average(x, rows, weights, left, keep_norm, bags)
    bags = averaging.sort_into_bags(rows, weights, left.numel()) if bags is None else bags
    mean: Tensor = kernels.mean_of_bags(x, *bags)
    return averaging.keep_norms(x, mean, rows, weights) if keep_norm else mean


def restore(x: Tensor, merged: Tensor, out: Tensor, rows: Tensor, update: bool, samples: int) -> Tensor:
    """See `restoring.restore`; one launch by copies, two by regression."""
    takes = all(each.dtype in kernels.DTYPES for each in (x, merged, out))
    if not takes or wants_gradient(x, merged, out):
        return restoring.restore(x, merged, out, rows, update, samples)
    restored: Tensor = kernels.restore(x, merged, out, rows, update, samples, restoring.RIDGE)
    return restored
