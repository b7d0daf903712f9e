"""How much each candidate tells, and which of them go: one launch each for what would be a dozen small ones."""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.ops.kernels.common import HAS_TRITON, by_picture, jit, operator

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
            *by_picture(candidates, batch),
            *(degree, alpha, count),
            BLOCK_C=min(triton.next_power_of_2(count), 1024),
            num_warps=4,
        )
    return degree


@operator
def choose(degree: Tensor, partner: Tensor, candidates: Tensor, partners: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The r candidates of highest degree, highest first, the lower index before its equal, and NaN before all.

    Args:
        degree: E, `[batch, C]`, float32, float16 or bfloat16, C ≤ `MOST_RANKED`.
        partner: of each candidate, its index among the partners, `[batch, C]`, int64.
        candidates: token positions, `[C]` or `[batch, C]`, int64.
        partners: token positions, `[P]` or `[batch, P]`, int64.
        r: how many, at most C.

    Returns:
        The tokens that go, and those that they go into, `[batch, r]` each, int64.
    """
    gone, into = _chosen(degree, partner, candidates, partners, r)
    batch, count = degree.shape
    block = 64
    if r == 0:
        return gone, into
    with torch.cuda.device(degree.get_device()):
        _choose[(triton.cdiv(count, block), batch)](
            *(degree, *degree.stride(), partner, *partner.stride()),
            *by_picture(candidates, batch),
            *by_picture(partners, batch),
            *(gone, into, count, r),
            BLOCK_C=block,
            BLOCK_OTHERS=64,
            num_warps=4,
        )
    return gone, into


def _degree(redundancy: Tensor, semantic: Tensor, candidates: Tensor, alpha: float) -> Tensor:
    return redundancy.new_empty(redundancy.shape, dtype=torch.float32)


weighted_distance.operator.register_fake(_degree)


def _chosen(degree: Tensor, partner: Tensor, candidates: Tensor, partners: Tensor, r: int) -> tuple[Tensor, Tensor]:
    return partner.new_empty(partner.shape[0], r), partner.new_empty(partner.shape[0], r)


choose.operator.register_fake(_chosen)


@jit
def _weighted_distance(
    redundancy: tl.tensor, redundancy_stride: tl.tensor, redundancy_step: tl.tensor,
    semantic: tl.tensor, semantic_stride: tl.tensor, semantic_step: tl.tensor,
    candidates: tl.tensor, candidates_stride: tl.tensor,
    degree: tl.tensor, alpha: tl.tensor, candidate_count: tl.tensor, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """One program per picture."""
    picture = tl.program_id(0).to(tl.int64)
    redundancy += picture * redundancy_stride
    semantic += picture * semantic_stride
    candidates += picture * candidates_stride
    degree += picture * candidate_count
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
    partner: tl.tensor, partner_stride: tl.tensor, partner_step: tl.tensor,
    candidates: tl.tensor, candidates_stride: tl.tensor, partners: tl.tensor, partners_stride: tl.tensor,
    gone: tl.tensor, into: tl.tensor, candidate_count: tl.tensor, gone_count: tl.tensor,
    BLOCK_C: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
) -> None:  # fmt: skip
    """One program per `BLOCK_C` candidates of a picture: each counts those before it, and so knows its place."""
    picture = tl.program_id(1).to(tl.int64)
    degree += picture * degree_stride
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
    goes = in_rows & (rank < gone_count)
    chosen = tl.load(partner + picture * partner_stride + row * partner_step, mask=goes, other=0)
    out = picture * gone_count + rank
    tl.store(gone + out, tl.load(candidates + picture * candidates_stride + row, mask=goes, other=0), mask=goes)
    tl.store(into + out, tl.load(partners + picture * partners_stride + chosen, mask=goes, other=0), mask=goes)
