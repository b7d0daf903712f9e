"""How much information a token carries: its redundancy R and its semantic value A."""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.ops.attention import size_bias
from turbovlm.ops.backend import fused_kernels
from turbovlm.ops.degree import DegreeFunction, default_alpha, information_degree
from turbovlm.ops.partition import Index, Partition, count, part, positions, take

SIMILARITY_ROWS = 1024
"""Candidates compared at a time: the similarity in memory is never larger than this times the partners."""

SHORTEST = 1e-12
"""Features of less length than this count as this long."""


def mutual_redundancy(features: Tensor, partition: Partition) -> tuple[Tensor, Tensor]:
    """`R_i = max_j cos(f_i, f_j)`, i a candidate and j a partner (Turbo, equation 6 and §6.1).

    Args:
        features: `[batch, tokens, width]`: keys averaged over heads, or any other features.
        partition: who may be merged into whom.

    Returns:
        R in [−1, 1] and the index of the most similar partner among the partners, `[batch, candidates]` each.
        Without partners, R is −1.
    """
    candidates, partners, precise = partition.candidates, partition.partners, _precise(features)
    if count(partners) == 0:
        alone = features.new_full((features.shape[0], count(candidates)), -1.0, dtype=precise)
        return alone, torch.zeros_like(alone, dtype=torch.int64)
    parts = _compared(count(candidates), count(partners), partition.windows)
    kernels = fused_kernels(features)
    if kernels is not None:
        pairs = [(part(candidates, i, features.device), part(partners, j, features.device)) for i, j in parts]
        best = [kernels.most_similar(features, *pair) for pair in pairs]
    else:
        best = _most_similar(features.to(precise), partition, parts)
    if len(best) == 1:
        return best[0][0], best[0][1]
    indices = [found[1] + j.start for found, (_, j) in zip(best, parts)]
    return torch.cat([found[0] for found in best], dim=1), torch.cat(indices, dim=1)


def _most_similar(
    features: Tensor, partition: Partition, parts: list[tuple[slice, slice]]
) -> list[tuple[Tensor, Tensor]]:
    """Products of the tokens as they are, scaled by their lengths behind it: less to move than normalised tokens."""
    scale = torch.linalg.vector_norm(features, dim=-1).clamp_min(SHORTEST).reciprocal()
    rows, columns = take(features, partition.candidates), take(features, partition.partners)
    row_scale, column_scale = (candidates_of(scale, index) for index in (partition.candidates, partition.partners))
    best = []
    for i, j in parts:
        products = torch.bmm(rows[:, i], columns[:, j].transpose(1, 2)) * column_scale[:, None, j]
        nearest = products.max(dim=-1)
        best.append((nearest.values * row_scale[:, i], nearest.indices))
    return best


def _compared(candidates: int, partners: int, windows: int) -> list[tuple[slice, slice]]:
    """Which candidates are compared with which partners, one product at a time."""
    if windows == 1:
        starts = range(0, max(candidates, 1), SIMILARITY_ROWS)
        return [(slice(start, start + SIMILARITY_ROWS), slice(0, partners)) for start in starts]

    def share(length: int, window: int) -> slice:
        return slice(length * window // windows, length * (window + 1) // windows)

    return [(share(candidates, window), share(partners, window)) for window in range(windows)]


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def semantic_value(guide: Tensor, keys: Tensor, sizes: Tensor | None = None) -> Tensor:
    """What each token contributes to the guide: the guide's attention row, averaged over heads.

    Args:
        guide: the guide's query (CLS, or the mean query), `[batch, heads, 1, head_dim]`, already scaled.
        keys: `[batch, heads, tokens, head_dim]`.
        sizes: patches each token stands for, `[batch, tokens]`; None before the first merge.

    Returns:
        `[batch, tokens]`, in the keys' dtype, non-negative, summing to 1. Turbo, equations (8) and (16).
    """
    return attention_row(guide, keys, None if sizes is None else size_bias(sizes, keys.dtype)).to(keys.dtype)


def attention_row(guide: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """`semantic_value` in float32 or better, with the bias of attention itself, `[batch, 1, 1, tokens]`, or None.

    Heads are strides apart in memory, where a matrix product would first copy all keys; a product and a sum do not.
    """
    kernels = fused_kernels(keys)
    if kernels is not None and not (torch.is_grad_enabled() and (keys.requires_grad or guide.requires_grad)):
        rows: Tensor = kernels.attention_rows(guide, keys, bias)
        return rows.mean(dim=1)
    scores = (keys * guide).sum(dim=-1, dtype=_precise(keys))
    if bias is not None:
        scores = scores + bias[:, 0]
    return scores.softmax(dim=-1).mean(dim=1)


def degree_of_candidates(
    redundancy: Tensor,
    semantic: Tensor | None,
    candidates: Index,
    block: int = 0,
    *,
    degree: str | DegreeFunction,
    alpha: float | None,
    seed: int = 0,
) -> Tensor:
    """`information_degree` of candidates, of the A of all tokens, `[batch, tokens]`."""
    kernels = None if semantic is None or degree != "weighted_distance" else fused_kernels(redundancy)
    if kernels is None:
        own = None if semantic is None else candidates_of(semantic, candidates)
        return information_degree(redundancy, own, block, degree=degree, alpha=alpha, seed=seed)
    alpha = default_alpha(degree) if alpha is None else alpha
    e: Tensor = kernels.weighted_distance(redundancy, semantic, positions(candidates, redundancy.device), alpha)
    return e


def candidates_of(values: Tensor, candidates: Index) -> Tensor:
    """The candidates' share of a per-token value: `[batch, tokens]` to `[batch, candidates]`."""
    if isinstance(candidates, slice):
        return values[:, candidates]
    return values.index_select(1, candidates) if candidates.ndim == 1 else values.gather(1, candidates)
