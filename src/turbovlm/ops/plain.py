"""The steps of attention and merging in PyTorch's own operators, on any device.

They are what the same steps in `host` (NumPy) and in `fused` (Triton) are tested against; `dispatch` decides which of
the three runs. `average` and `restore` are two of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.ops.averaging import SHORTEST, Bags, has_bags, precise_dtype, sort_into_bags
from turbovlm.ops.averaging import average as average
from turbovlm.ops.degree import DegreeFunction, information_degree
from turbovlm.ops.pairs import paired, same_for_both
from turbovlm.ops.partition import Index, Partition
from turbovlm.ops.restoring import restore as restore
from turbovlm.ops.tracing import is_exporting, wants_gradient

_CPU: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
FAST_BFLOAT16_PRODUCTS = bool(_CPU.get("avx512_bf16")) and not _CPU.get("amx_bf16")
"""Whether this CPU multiplies bfloat16 matrices faster than float32 ones, but not within PyTorch's fused attention.
Read at import, so that compilers see a constant. Releases of PyTorch that do not tell what the CPU has count as no."""

STORED_SCORES = 1 << 20
"""Scores that `stored_attention` holds at a time, at most: 2 MiB, which a core's cache still serves."""

SIMILARITY_ROWS = 1024
"""Candidates compared at a time: the similarity in memory is never larger than this times the destinations."""

LOG_0 = -60000.0
"""What stands for log 0, the size of padding, in attention: float16 holds it, and its exponential is 0."""

Chosen = tuple[Tensor, Tensor]
"""The tokens that go, and the destination of each: token positions, `[batch, r]`, int64."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float = 0.0) -> Tensor:
    """`softmax(QKᵀ·scale + bias) V`, `[batch, heads, tokens, head_dim]`.

    `benchmarks/fidelity.py` measures which way is faster: PyTorch's fused attention (on CUDA, a mask rules
    FlashAttention out), or plain products for bfloat16 on CPUs with `FAST_BFLOAT16_PRODUCTS`.

    Args:
        q, k, v: `[batch, heads, tokens, head_dim]`.
        bias: finite, `[batch, 1, 1, tokens]`, of `q`'s dtype or a more precise one, or None.
        scale: of the scores.
        dropout_p: dropout of the attention weights, for training.
    """
    bias = bias if bias is None else bias.to(q.dtype)
    low = FAST_BFLOAT16_PRODUCTS and q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if low and dropout_p == 0 and not wants_gradient(q, k, v) and not is_exporting():
        return stored_attention(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


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
    """`softmax(g·Kᵀ·scale + bias)` of the guide's query g in every head, in float32 or better.

    Args:
        q: `[batch, heads, tokens, head_dim]`.
        keys: `[batch, heads, tokens, head_dim]`.
        bias: that of attention itself, `[batch, 1, 1, tokens]`, or None.
        guides: the first of the queries whose mean g is, and the one behind the last.
        weights: of the queries in g, `[batch, tokens]`; all alike if None.
        scale: of the products.
        content: what is compared, of the keys' shape, if it is not the keys.

    Returns:
        `[batch, heads, tokens]`; and the squared lengths of the content by head, likewise, where they come with it.
    """
    first, behind = guides
    guide = q[:, :, first:behind]
    if weights is not None and behind - first > 1:
        shares = weights[:, first:behind] / weights[:, first:behind].sum(dim=1, keepdim=True)
        guide = (guide * shares.to(q.dtype)[:, None, :, None]).sum(dim=2, keepdim=True)
    elif behind - first > 1:
        guide = guide.mean(dim=2, keepdim=True)
    # heads are strides apart in memory: a matrix product would first copy all keys, a product and a sum do not; the
    # guide in float32 makes it a product in float32, which queries and keys of float16 may need
    scores = (keys * (guide * scale).to(precise_dtype(keys))).sum(dim=-1)
    if bias is not None:
        scores = scores + bias[:, 0]
    return scores.softmax(dim=-1), None


def over_heads(semantic: Tensor) -> Tensor:
    """A of every token, `[batch, tokens]`, of what heads attend to, `[batch, heads, tokens]`; itself if it is A."""
    return semantic if semantic.ndim == 2 else semantic.mean(dim=1)


def most_similar(
    features: Tensor, partition: Partition, hidden: Tensor | None = None, squares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The cosine and the index of each candidate's most similar destination, the lowest of equals.

    Args:
        features: `[batch, tokens, width]`.
        partition: who may be merged into whom.
        hidden: tokens that are nobody's destination, `[batch, tokens]`, bool; none if None.
        squares: squared lengths of parts of the features, `[batch, parts, tokens]`, where they are known.

    Returns:
        Cosines in float32 or better, −1 without destinations, and indices among the destinations, int64,
        `[batch, candidates]` each.
    """
    features = features.to(precise_dtype(features))
    # products of the tokens as they are, then scaled by lengths: less to move than normalised tokens
    length = torch.linalg.vector_norm(features, dim=-1) if squares is None else squares.sum(dim=1).sqrt()
    scale = length.clamp_min(SHORTEST).reciprocal()
    rows, columns = take_tokens(features, partition.candidates), take_tokens(features, partition.destinations)
    row_scale, column_scale = take_values(scale, partition.candidates), take_values(scale, partition.destinations)
    if columns.shape[1] == 0:
        alone = torch.full_like(row_scale, -1)
        return alone, torch.zeros_like(alone, dtype=torch.int64)
    if partition.all_pairs or hidden is not None:
        never = None if hidden is None else take_values(hidden, partition.destinations)
        return _nearest_allowed(rows, columns, row_scale, column_scale, partition, never)
    if partition.windows == 1 and rows.shape[1] <= SIMILARITY_ROWS:
        return _nearest(rows, columns, row_scale, column_scale)
    cosines, indices = [], []
    for window, allowed in window_slices(partition.windows, rows.shape[1], columns.shape[1]):
        for start in range(window.start, max(window.stop, window.start + 1), SIMILARITY_ROWS):
            some = slice(start, min(start + SIMILARITY_ROWS, window.stop))
            found = _nearest(rows[:, some], columns[:, allowed], row_scale[:, some], column_scale[:, allowed])
            cosines.append(found[0])
            indices.append(found[1] + allowed.start)
    return torch.cat(cosines, dim=1), torch.cat(indices, dim=1)


def _nearest(rows: Tensor, columns: Tensor, row_scale: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    best = (torch.bmm(rows, columns.transpose(1, 2)) * column_scale.unsqueeze(1)).max(dim=-1)
    return best.values * row_scale, best.indices


def _nearest_allowed(
    rows: Tensor, columns: Tensor, row_scale: Tensor, column_scale: Tensor, partition: Partition, never: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_nearest` of each window, but none is its own destination, nor one that is `never`, `[batch, columns]`."""
    cosines, indices = [], []
    for window, allowed in window_slices(partition.windows, rows.shape[1], columns.shape[1]):
        cosine = torch.bmm(rows[:, window], columns[:, allowed].transpose(1, 2)) * column_scale[:, None, allowed]
        if partition.all_pairs:
            itself = torch.eye(cosine.shape[1], device=cosine.device).bool()  # at once: onnxruntime has no such EyeLike
            cosine = cosine.masked_fill(itself, -torch.inf)
        if never is not None:
            cosine = cosine.masked_fill(never[:, None, allowed], -torch.inf)
        best = cosine.max(dim=-1)
        cosines.append((best.values * row_scale[:, window]).clamp_min(-1))  # without destinations, −1
        indices.append(best.indices + allowed.start)
    return torch.cat(cosines, dim=1), torch.cat(indices, dim=1)


def window_slices(windows: int, candidates: int, destinations: int) -> list[tuple[slice, slice]]:
    """The candidates and the destinations of each of a partition's windows, as slices of theirs."""
    return [
        (
            slice(candidates * k // windows, candidates * (k + 1) // windows),
            slice(destinations * k // windows, destinations * (k + 1) // windows),
        )
        for k in range(windows)
    ]


def degree_of_candidates(
    redundancy: Tensor,
    semantic: Tensor | None,
    candidates: Index,
    block: int,
    *,
    degree: str | DegreeFunction,
    alpha: float | None,
    seed: int,
    padding: Tensor | None,
) -> Tensor:
    """E of the candidates, `[batch, candidates]`, infinite for padding; the rest as in `rank`.

    Raises:
        ConfigError: see `information_degree`.
    """
    own = None if semantic is None else take_values(over_heads(semantic), candidates)
    e = information_degree(redundancy, own, block, degree=degree, alpha=alpha, seed=seed)
    return e if padding is None else e.masked_fill(take_values(padding, candidates), torch.inf)


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
    """The degree of the candidates, and the choice of r among them.

    Args:
        redundancy, nearest: as `most_similar` gives them.
        semantic: A of all tokens, `[batch, tokens]`, or by head, `[batch, heads, tokens]`; None where nobody asks.
        padding: tokens that are merged before all others, `[batch, tokens]`, bool; none if None.
        r: how many are chosen; None chooses nobody yet.
        partition, block, degree, alpha, seed: as in `rank_candidates`.

    Returns:
        R and E, `[batch, candidates]` each, and what `choose` gives.
    """
    if partition.all_pairs:
        redundancy = same_for_both(redundancy, nearest)
    e = degree_of_candidates(
        redundancy, semantic, partition.candidates, block, degree=degree, alpha=alpha, seed=seed, padding=padding
    )
    return redundancy, e, None if r is None else choose(e, nearest, partition, r)


def choose(degree: Tensor, nearest: Tensor, partition: Partition, r: int) -> Chosen:
    """The r candidates of highest degree, in any order, and the destination of each: token positions, `[batch, r]`.

    Args:
        degree: E, `[batch, candidates]`.
        nearest: the index of each candidate's destination among the destinations, `[batch, candidates]`.
    """
    if partition.all_pairs:
        chosen, into = paired(degree, nearest, r)
        return _positions_at(partition.candidates, chosen), _positions_at(partition.destinations, into)
    chosen = degree.topk(r, dim=1, sorted=False).indices
    return _positions_at(partition.candidates, chosen), _positions_at(partition.destinations, nearest.gather(1, chosen))


def at_once(*merge: Any) -> None:
    """A whole merge, as `turbovlm.ops.whole.merge_whole` asks for it; None, as here, where a path takes it in steps."""
    return


def merge_tokens(
    x: Tensor, sizes: Tensor | None, src: Tensor, dst: Tensor, slots: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The merged tokens of `x`, `[batch, N − r, width]`, what `merge_books` returns, and `log_sizes`.

    Args:
        x: `[batch, N, width]`.
        sizes: patches each token stands for, `[batch, N]`; ones if None.
        src, dst, slots, reduce: as `merge_books` takes them.
    """
    rows, weights, merged_sizes = _places(src, dst, slots, _ones(x, x.shape[1], precise_dtype(x), sizes), reduce)
    merged = average(x, rows, weights, merged_sizes.shape, reduce == "keep_norm")
    return merged, rows, weights, merged_sizes, log_sizes(merged_sizes)


def log_sizes(sizes: Tensor) -> Tensor:
    """`log s` of the patches that each token stands for, `[batch, tokens]`; `LOG_0` for padding, of size 0."""
    return sizes.log().clamp_min(LOG_0)


def merge_books(
    src: Tensor,
    dst: Tensor,
    tokens: int,
    dtype: torch.dtype,
    sizes: Tensor | None,
    slots: Tensor | None,
    reduce: str,
) -> tuple[Tensor, Tensor, Tensor, Bags | None]:
    """Where each of N tokens goes when r of them are merged, and what it weighs there.

    Args:
        src: the tokens that are merged, `[batch, r]`, distinct.
        dst: the token that each is merged into, `[batch, r]`, none of `src`.
        tokens: N.
        dtype: of sizes and weights.
        sizes: patches each token stands for, `[batch, N]`; ones if None.
        slots: the order of the tokens left, as places in the order of all N, `[N]` or `[batch, N]`; theirs if None.
        reduce: as in `TurboConfig`.

    Returns:
        `rows`, `weights`, `sizes` and `bags` of `Merge`.
    """
    rows, weights, merged_sizes = _places(src, dst, slots, _ones(src, tokens, dtype, sizes), reduce)
    return rows, weights, merged_sizes, sort_into_bags(rows, weights, merged_sizes.numel()) if has_bags(src) else None


def _ones(like: Tensor, tokens: int, dtype: torch.dtype, sizes: Tensor | None) -> Tensor:
    return like.new_ones(len(like), tokens, dtype=dtype) if sizes is None else sizes


def _places(
    src: Tensor, dst: Tensor, slots: Tensor | None, sizes: Tensor, reduce: str
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, tokens), r, first = sizes.shape, src.shape[1], row_offsets(sizes)
    src_rows, dst_rows = (src + first).flatten(), (dst + first).flatten()
    # 1 for a token that stays, else 0; out of place and of integers, as `torch.func.vmap` and ONNX's exporters want it
    stays = torch.ones_like(sizes, dtype=torch.int64).flatten().scatter(0, src_rows, torch.zeros_like(src_rows))
    if slots is None:
        rows = stays.cumsum(0) - 1  # a token that stays comes behind those before it that stay
    else:
        places = (slots + first).flatten()
        rows = (stays.scatter(0, places, stays).cumsum(0) - 1).index_select(0, places)
    rows = rows.scatter(0, src_rows, rows.index_select(0, dst_rows))
    counted = sizes.flatten() * stays if reduce == "prune" else sizes.flatten()
    merged_sizes = sizes.new_zeros(batch * (tokens - r)).scatter_add(0, rows, counted)
    if reduce == "prune":
        weights = stays.to(sizes.dtype)
    else:
        weights = counted / merged_sizes.index_select(0, rows).clamp_min(1e-6)  # padding has size 0
    return rows, weights.view(batch, tokens), merged_sizes.view(batch, tokens - r)


def take_tokens(x: Tensor, index: Index) -> Tensor:
    """The indexed tokens of `x`, `[batch, tokens, width]`; a view where the index is a slice."""
    if isinstance(index, slice):
        return x[:, index]
    if index.ndim == 1:
        return x.index_select(1, index)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def take_values(values: Tensor, index: Index) -> Tensor:
    """The indexed entries of a value per token: `[batch, tokens]` to `[batch, k]`."""
    if isinstance(index, slice):
        return values[:, index]
    return values.index_select(1, index) if index.ndim == 1 else values.gather(1, index)


def _positions_at(index: Index, chosen: Tensor) -> Tensor:
    """The token positions at the places `chosen`, `[batch, r]`, of an index."""
    if isinstance(index, slice):
        found: Tensor = chosen * index.step + index.start
        return found
    return index.take(chosen) if index.ndim == 1 else index.gather(1, chosen)


def row_offsets(values: Tensor) -> Tensor:
    """The row at which each image begins when `values`, `[batch, k]`, is flattened, `[batch, 1]`."""
    batch, length = values.shape
    return torch.arange(0, batch * length, length, device=values.device).unsqueeze(1)
