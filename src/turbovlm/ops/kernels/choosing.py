"""The degree of the candidates, and the choice among them: one launch each for what would be a dozen small ones."""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.ops.kernels.common import HAS_TRITON, by_image, jit, operator

if HAS_TRITON:
    import triton
    import triton.language as tl

MOST_RANKED = 8192
"""Candidates that `choose` takes: each is compared with all others."""


@operator
def weighted_distance(redundancy: Tensor, semantic: Tensor, candidates: Tensor, alpha: float) -> Tensor:
    """`(R − 1)(1 + alpha·√(A / mean A))`, the mean over the candidates; not differentiable.

    Args:
        redundancy: R of the candidates, `[batch, C]`, float32, float16 or bfloat16.
        semantic: A of all tokens, `[batch, tokens]`, likewise.
        candidates: token positions, `[C]` or `[batch, C]`, int64.
        alpha: as in `TurboConfig`.

    Returns:
        `[batch, C]`, float32.
    """
    degree: Tensor = _degree(redundancy, semantic, candidates, alpha)
    batch, count = redundancy.shape
    with torch.cuda.device(redundancy.get_device()):
        _weighted_distance[(batch,)](
            *(redundancy, *redundancy.stride(), semantic, *semantic.stride()),
            *by_image(candidates, batch),
            *(degree, alpha, count),
            BLOCK_C=min(triton.next_power_of_2(count), 1024),
            num_warps=4,
        )
    return degree


@operator
def choose(degree: Tensor, nearest: Tensor, candidates: Tensor, destinations: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The r candidates of highest degree, highest first, the lower index before its equal, and NaN before all.

    Args:
        degree: E, `[batch, C]`, float32, float16 or bfloat16, C ≤ `MOST_RANKED`.
        nearest: of each candidate, its index among the destinations, `[batch, C]`, int64.
        candidates: token positions, `[C]` or `[batch, C]`, int64.
        destinations: token positions, `[P]` or `[batch, P]`, int64.
        r: how many, at most C.

    Returns:
        The tokens that go, and the destinations that they go into, `[batch, r]` each, int64.
    """
    src, dst = _chosen(degree, nearest, candidates, destinations, r)
    batch, count = degree.shape
    block = 64
    if r == 0:
        return src, dst
    with torch.cuda.device(degree.get_device()):
        _choose[(triton.cdiv(count, block), batch)](
            *(degree, *degree.stride(), nearest, *nearest.stride()),
            *by_image(candidates, batch),
            *by_image(destinations, batch),
            *(src, dst, count, r),
            BLOCK_C=block,
            BLOCK_OTHERS=64,
            num_warps=4,
        )
    return src, dst


def _degree(redundancy: Tensor, semantic: Tensor, candidates: Tensor, alpha: float) -> Tensor:
    return redundancy.new_empty(redundancy.shape, dtype=torch.float32)


weighted_distance.operator.register_fake(_degree)


def _chosen(degree: Tensor, nearest: Tensor, candidates: Tensor, destinations: Tensor, r: int) -> tuple[Tensor, Tensor]:
    return nearest.new_empty(nearest.shape[0], r), nearest.new_empty(nearest.shape[0], r)


choose.operator.register_fake(_chosen)


@jit
def _weighted_distance(
    redundancy: tl.tensor, redundancy_stride: tl.tensor, redundancy_step: tl.tensor,
    semantic: tl.tensor, semantic_stride: tl.tensor, semantic_step: tl.tensor,
    candidates: tl.tensor, candidates_stride: tl.tensor,
    degree: tl.tensor, alpha: tl.tensor, candidate_count: tl.tensor, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """One program per image."""
    image = tl.program_id(0).to(tl.int64)
    redundancy += image * redundancy_stride
    semantic += image * semantic_stride
    candidates += image * candidates_stride
    degree += image * candidate_count
    total = 0.0
    for first in range(0, candidate_count, BLOCK_C):
        row = first + tl.arange(0, BLOCK_C)
        there = row < candidate_count
        token = tl.load(candidates + row, mask=there, other=0)
        total += tl.sum(tl.load(semantic + token * semantic_step, mask=there, other=0.0).to(tl.float32))
    mean = tl.maximum(total / candidate_count, 1.1754943508222875e-38)
    for first in range(0, candidate_count, BLOCK_C):
        row = first + tl.arange(0, BLOCK_C)
        there = row < candidate_count
        token = tl.load(candidates + row, mask=there, other=0)
        value = tl.load(semantic + token * semantic_step, mask=there, other=0.0).to(tl.float32)
        similar = tl.load(redundancy + row * redundancy_step, mask=there, other=0.0).to(tl.float32)
        tl.store(degree + row, (similar - 1) * (1 + alpha * tl.sqrt(value / mean)), mask=there)


@jit
def _choose(
    degree: tl.tensor, degree_stride: tl.tensor, degree_step: tl.tensor,
    nearest: tl.tensor, nearest_stride: tl.tensor, nearest_step: tl.tensor,
    candidates: tl.tensor, candidates_stride: tl.tensor, destinations: tl.tensor, destinations_stride: tl.tensor,
    src: tl.tensor, dst: tl.tensor, candidate_count: tl.tensor, src_count: tl.tensor,
    BLOCK_C: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
) -> None:  # fmt: skip
    """One program per `BLOCK_C` candidates of an image: each counts those before it, and so knows its place."""
    image = tl.program_id(1).to(tl.int64)
    degree += image * degree_stride
    row = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = row < candidate_count
    own = tl.load(degree + row * degree_step, mask=in_rows, other=0.0).to(tl.float32)
    own = tl.where(own == own, own, float("inf"))
    rank = tl.zeros([BLOCK_C], tl.int32)
    for first in range(0, candidate_count, BLOCK_OTHERS):
        column = first + tl.arange(0, BLOCK_OTHERS)
        there = column < candidate_count
        other = tl.load(degree + column * degree_step, mask=there, other=0.0).to(tl.float32)
        other = tl.where(other == other, other, float("inf"))[None, :]
        before = (other > own[:, None]) | ((other == own[:, None]) & (column[None, :] < row[:, None]))
        rank += tl.sum((before & there[None, :]).to(tl.int32), axis=1)
    goes = in_rows & (rank < src_count)
    chosen = tl.load(nearest + image * nearest_stride + row * nearest_step, mask=goes, other=0)
    out = image * src_count + rank
    tl.store(src + out, tl.load(candidates + image * candidates_stride + row, mask=goes, other=0), mask=goes)
    tl.store(dst + out, tl.load(destinations + image * destinations_stride + chosen, mask=goes, other=0), mask=goes)
