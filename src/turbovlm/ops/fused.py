"""The steps of `plain`, by the same names, as Triton's kernels on NVIDIA GPUs.

What the kernels lack goes to `plain`'s function of the same name:

- `attend`: without a bias (PyTorch's own kernel is as fast then), with dropout, with gradients wanted, in float32,
  with heads of more than 128 channels, or on GPUs before compute capability 8.0;
- `attention_row`: with gradients wanted;
- `most_similar`: without destinations, or where some tokens may not be one;
- `degree_of_candidates`: any degree but `"weighted_distance"`;
- `choose`: among all pairs, among more than `MOST_RANKED` candidates, or by degrees of another dtype than kernels take;
- `merge_tokens` with `"keep_norm"`, and `average`: with gradients wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.ops import kernels, plain
from turbovlm.ops.degree import DegreeFunction, default_alpha
from turbovlm.ops.kernels import usable
from turbovlm.ops.pairs import same_for_both
from turbovlm.ops.partition import Index, Partition, positions
from turbovlm.ops.plain import Bags
from turbovlm.ops.tracing import wants_gradient

__all__ = [
    "attend",
    "attention_row",
    "average",
    "choose",
    "degree_of_candidates",
    "merge_tokens",
    "most_similar",
    "usable",
]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float = 0.0) -> Tensor:
    """See `plain.attend`; the bias is added to the scores in registers."""
    if bias is None or dropout_p > 0 or wants_gradient(q, k, v) or not kernels.attends(q, k, v):
        return plain.attend(q, k, v, bias, scale, dropout_p)
    attended: Tensor = kernels.biased_attention(q, k, v, bias, scale)
    return attended


def attention_row(guide: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """See `plain.attention_row`."""
    if wants_gradient(guide, keys):
        return plain.attention_row(guide, keys, bias)
    rows: Tensor = kernels.attention_rows(guide, keys, bias)
    return rows.mean(dim=1)


def most_similar(features: Tensor, partition: Partition, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `plain.most_similar`."""
    candidates = positions(partition.candidates, features.device)
    destinations = positions(partition.destinations, features.device)
    sizes = candidates.shape[-1], destinations.shape[-1]
    if sizes[1] == 0 or hidden is not None:
        return plain.most_similar(features, partition, hidden)
    windows = plain.window_slices(partition.windows, *sizes)
    found = [kernels.most_similar(features, candidates[..., i], destinations[..., j]) for i, j in windows]
    if len(found) == 1:
        redundancy, nearest = found[0]
    else:
        indices = [nearest + j.start for (_, nearest), (_, j) in zip(found, windows)]
        redundancy, nearest = torch.cat([cosines for cosines, _ in found], dim=1), torch.cat(indices, dim=1)
    return (same_for_both(redundancy, nearest) if partition.all_pairs else redundancy), nearest


def degree_of_candidates(
    redundancy: Tensor,
    semantic: Tensor | None,
    candidates: Index,
    block: int,
    *,
    degree: str | DegreeFunction,
    alpha: float | None,
    seed: int,
) -> Tensor:
    """See `plain.degree_of_candidates`."""
    if degree != "weighted_distance" or semantic is None or redundancy.dtype not in kernels.DTYPES:
        return plain.degree_of_candidates(
            redundancy, semantic, candidates, block, degree=degree, alpha=alpha, seed=seed
        )
    alpha = default_alpha(degree) if alpha is None else alpha
    e: Tensor = kernels.weighted_distance(redundancy, semantic, positions(candidates, redundancy.device), alpha)
    return e


def choose(degree: Tensor, nearest: Tensor, partition: Partition, r: int) -> tuple[Tensor, Tensor]:
    """See `plain.choose`; here, those of highest degree come first."""
    if partition.all_pairs or degree.shape[1] > kernels.MOST_RANKED or degree.dtype not in kernels.DTYPES:
        return plain.choose(degree, nearest, partition, r)
    candidates = positions(partition.candidates, degree.device)
    destinations = positions(partition.destinations, degree.device)
    src, dst = kernels.choose(degree.detach(), nearest, candidates, destinations, r)
    return src, dst


def merge_tokens(
    x: Tensor, sizes: Tensor | None, src: Tensor, dst: Tensor, slots: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `plain.merge_tokens`; tokens and books in one launch."""
    if reduce == "keep_norm" and wants_gradient(x):
        return plain.merge_tokens(x, sizes, src, dst, slots, reduce)
    merged, rows, weights, merged_sizes = kernels.merge_tokens(x, sizes, src, dst, slots, reduce)
    return merged, rows, weights, merged_sizes


def average(
    x: Tensor, rows: Tensor, weights: Tensor, left: torch.Size, keep_norm: bool, bags: Bags | None = None
) -> Tensor:
    """See `plain.average`."""
    if wants_gradient(x):
        return plain.average(x, rows, weights, left, keep_norm, bags)
    bags = plain.sort_into_bags(rows, weights, left.numel()) if bags is None else bags
    mean: Tensor = kernels.mean_of_bags(x, *bags)
    return plain.keep_norms(x, mean, rows, weights) if keep_norm else mean
