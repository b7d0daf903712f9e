"""The steps of attention and merging in PyTorch's own operators, on any device; `kernels` has most of them in Triton.

These are the truth that the kernels are tested against. `dispatch` decides which of the two runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.ops.partition import Partition, positions_at, precise_dtype, row_offsets, take_tokens, take_values

STORED_SCORES = 1 << 20
"""Scores that `stored_attention` holds at a time, at most: 2 MiB, which a core's cache still serves."""

SIMILARITY_ROWS = 1024
"""Candidates compared at a time: the similarity in memory is never larger than this times the destinations."""

SHORTEST = 1e-12
"""Features of less length than this count as this long."""


def masked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`scaled_dot_product_attention` with the bias as its mask. On CUDA a mask rules FlashAttention out."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def stored_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Matrix products and a softmax in the tensors' own dtype, a few heads or rows of scores at a time.

    Not differentiable. Beside its result it takes the memory of two tensors no larger than the queries, as far as
    one row of scores allows.
    """
    attended: Tensor = stored_attention_operator(q, k, v, bias, scale)
    return attended


@torch.library.custom_op("turbovlm::stored_attention", mutates_args=())
def stored_attention_operator(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """An operator of its own, so that compilers do not trace its loops."""
    out = _heads_side_by_side(q)
    _, heads, queries, _ = q.shape
    tokens = k.shape[2]
    limit = min(STORED_SCORES, q.numel())
    several = min(max(limit // (queries * tokens), 1), heads)
    rows = min(max(limit // tokens, 1), queries) if several == 1 else queries
    keys = k.transpose(-1, -2)
    for image in range(q.shape[0]):
        for head in range(0, heads, several):
            some = slice(head, head + several)
            for row in range(0, queries, rows):
                part = q[image, some, row : row + rows]
                if bias is None:
                    scores = torch.bmm(part, keys[image, some]).mul_(scale)
                else:
                    scores = torch.baddbmm(bias[image], part, keys[image, some], alpha=scale)
                out[image, some, row : row + rows] = torch.bmm(scores.softmax(dim=-1), v[image, some])
    return out


@stored_attention_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return _heads_side_by_side(q)


def _heads_side_by_side(q: Tensor) -> Tensor:
    """An empty tensor of `q`'s shape; in memory a token's heads lie side by side, as the projection reads them."""
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def attention_rows(guide: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """`softmax(g·Kᵀ + bias)` of one query per head, `[batch, heads, tokens]`, in float32 or better.

    Args:
        guide: `[batch, heads, 1, head_dim]`, scaled.
        keys: `[batch, heads, tokens, head_dim]`.
        bias: `[batch, 1, 1, tokens]`, or None.
    """
    # heads are strides apart in memory: a matrix product would first copy all keys, a product and a sum do not
    scores = (keys * guide).sum(dim=-1, dtype=precise_dtype(keys))
    if bias is not None:
        scores = scores + bias[:, 0]
    return scores.softmax(dim=-1)


def most_similar(features: Tensor, partition: Partition) -> tuple[Tensor, Tensor]:
    """The cosine and the index of each candidate's most similar destination, the lowest of equals.

    Args:
        features: `[batch, tokens, width]`.
        partition: with one destination at least.

    Returns:
        Cosines in float32 or better, and indices among the destinations, int64, `[batch, candidates]` each.
    """
    features = features.to(precise_dtype(features))
    # products of the tokens as they are, then scaled by lengths: less to move than normalised tokens
    scale = torch.linalg.vector_norm(features, dim=-1).clamp_min(SHORTEST).reciprocal()
    rows, columns = take_tokens(features, partition.candidates), take_tokens(features, partition.destinations)
    row_scale, column_scale = take_values(scale, partition.candidates), take_values(scale, partition.destinations)
    cosines, indices = [], []
    for window, allowed in partition.window_slices():
        for start in range(window.start, max(window.stop, window.start + 1), SIMILARITY_ROWS):
            some = slice(start, min(start + SIMILARITY_ROWS, window.stop))
            products = torch.bmm(rows[:, some], columns[:, allowed].transpose(1, 2))
            best = (products * column_scale[:, None, allowed]).max(dim=-1)
            cosines.append(best.values * row_scale[:, some])
            indices.append(best.indices + allowed.start if allowed.start else best.indices)
    if len(cosines) == 1:
        return cosines[0], indices[0]
    return torch.cat(cosines, dim=1), torch.cat(indices, dim=1)


def choose(degree: Tensor, nearest: Tensor, partition: Partition, r: int) -> tuple[Tensor, Tensor]:
    """The r candidates of highest degree, in any order, and the destination of each: token positions, `[batch, r]`.

    Args:
        degree: E, `[batch, candidates]`.
        nearest: the index of each candidate's destination among the destinations, `[batch, candidates]`.
    """
    chosen = degree.topk(r, dim=1, sorted=False).indices
    return positions_at(partition.candidates, chosen), positions_at(partition.destinations, nearest.gather(1, chosen))


def merge_books(
    src: Tensor, dst: Tensor, slots: Tensor | None, sizes: Tensor, reduce: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each of N tokens goes when r of them are merged, and what it weighs there.

    Args:
        src: the tokens that are merged, `[batch, r]`, distinct.
        dst: the token that each is merged into, `[batch, r]`, none of `src`.
        slots: the order of the tokens left, as places in the order of all N, `[N]` or `[batch, N]`; theirs if None.
        sizes: patches each token stands for, `[batch, N]`.
        reduce: as in `TurboConfig`.

    Returns:
        `rows`, `weights` and `sizes` of `Merge`.
    """
    (batch, tokens), r, first = sizes.shape, src.shape[1], row_offsets(sizes)
    src_rows, dst_rows = (src + first).flatten(), (dst + first).flatten()
    stays = torch.ones(batch * tokens, dtype=torch.bool, device=src.device).index_fill_(0, src_rows, False)
    if slots is None:
        rows = stays.cumsum(0).sub_(1)  # a token that stays comes behind those before it that stay
    else:
        places = (slots + first).flatten()
        rows = stays.scatter(0, places, stays).cumsum(0).sub_(1).index_select(0, places)
    rows = rows.index_copy_(0, src_rows, rows.index_select(0, dst_rows))
    counted = sizes.flatten() * stays if reduce == "prune" else sizes.flatten()
    merged_sizes = sizes.new_zeros(batch * (tokens - r)).scatter_add_(0, rows, counted)
    if reduce == "prune":
        weights = stays.to(sizes.dtype)
    else:
        weights = counted / merged_sizes.index_select(0, rows).clamp_min(1e-6)  # padding has size 0
    return rows, weights.view(batch, tokens), merged_sizes.view(batch, tokens - r)


def mean_of_bags(x: Tensor, bag: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of a batch's tokens, `[batch · M, width]`, in one pass and without a weighted copy of `x`.

    Args:
        x: `[batch, N, width]`.
        bag: rows of the `batch · N`, `[batch · N]`, int64: those of the first sum, then of the second, and so on.
        starts: where each sum begins in `bag`, `[batch · M]`, int64.
        weights: of each entry of `bag`.
    """
    return F.embedding_bag(bag, x.flatten(0, 1), starts, mode="sum", per_sample_weights=weights.to(x.dtype))


def mean_of_rows(x: Tensor, rows: Tensor, weights: Tensor, count: int) -> Tensor:
    """The sums of `mean_of_bags` in operators that every backend and exporter has.

    Args:
        x: `[batch, N, width]`.
        rows: the sum that each token is part of, `[batch · N]`, int64.
        weights: its weight there, `[batch, N]`.
        count: how many sums there are, `batch · M`.
    """
    weighted = (x * weights.unsqueeze(-1)).flatten(0, 1)
    return weighted.new_zeros(count, x.shape[-1]).index_add(0, rows, weighted).to(x.dtype)


def keep_norms(x: Tensor, mean: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """`mean`, `[batch, M, width]`, each token as long as what it is the mean of, on average by `weights`.

    The rest as in `mean_of_rows`.
    """
    precise = precise_dtype(x)
    lengths = torch.linalg.vector_norm(x, dim=-1, dtype=precise) * weights.to(precise)
    found = torch.linalg.vector_norm(mean, dim=-1, dtype=precise)
    wanted = lengths.new_zeros(found.numel()).index_add(0, rows, lengths.flatten()).view(found.shape)
    scale = torch.where(found > SHORTEST, wanted / found.clamp_min(SHORTEST), 1)
    return mean * scale.to(mean.dtype).unsqueeze(-1)
