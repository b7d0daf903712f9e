"""The degree of the candidates and the choice among them, in one launch: one program for all tokens of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.ops.kernels.common import HAS_TRITON, jit, operator, places
from turbovlm.ops.kernels.replay import empty
from turbovlm.ops.pairs import STEPS_DOUBLED

if HAS_TRITON:
    import triton
    import triton.language as tl

MOST_RANKED = 16384
"""Candidates that `choose` takes: a program holds those of an image in its registers."""

RANKED = ("redundancy", "weighted_difference", "weighted_distance")
"""Degrees that `choose` computes."""


@operator
def choose(
    redundancy: Tensor,
    nearest: Tensor,
    rows: Tensor | None,
    candidates: Tensor | None,
    destinations: Tensor | None,
    strided: list[int],
    degree: str,
    alpha: float,
    all_pairs: bool,
    r: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank the candidates and take r of them; not differentiable.

    Args:
        redundancy: R of the candidates, `[batch, C]`, float32, float16 or bfloat16, C ≤ `MOST_RANKED`; with the degree
            `"given"`, E.
        nearest: of each candidate, its index among the destinations, `[batch, C]`, int64.
        rows: the guide's attention to all tokens, by head, `[batch, heads, tokens]`, float32; None for a degree that
            does not need A.
        candidates, destinations: token positions, `[k]` or `[batch, k]`, int64; None for those of `strided`.
        strided: the first candidate, the first destination, and the step from one to the next.
        degree: one of `RANKED`, or `"given"`; `alpha`: as in `TurboConfig`.
        all_pairs: whether the candidates are the destinations too, and those go that
            `turbovlm.ops.pairs.paired` chooses.
        r: how many go, at most C; with `all_pairs`, C // 2.

    Returns:
        R, the same for two that are each other's most similar (E again if it was given), and E, `[batch, C]`, float32;
        of the candidates of highest E, in ascending order, the tokens that go and the destinations that they go into,
        `[batch, r]`, int64. The lower index comes before its equal, and NaN before all.
    """
    outputs = _chosen(redundancy, nearest, rows, candidates, destinations, strided, degree, alpha, all_pairs, r)
    batch, count = redundancy.shape
    block = max(triton.next_power_of_2(count), 64)
    heads, tokens = (0, 0) if rows is None else rows.shape[1:]
    marks = empty(nearest, batch, count, dtype=torch.int32) if all_pairs else None
    with torch.cuda.device(redundancy.get_device()):
        _choose[(batch,)](
            *(redundancy, *redundancy.stride(), nearest, *nearest.stride()),
            *(None if rows is None else rows.contiguous(), heads, tokens),
            *places(candidates, strided[0], batch),
            *places(destinations, strided[1], batch),
            *(strided[2], marks, *outputs, alpha, count, r),
            DEGREE=degree,
            ALL_PAIRS=all_pairs,
            STEPS_DOUBLED=STEPS_DOUBLED,
            BLOCK=block,
            num_warps=min(max(block // 256, 1), 16),
        )
    return outputs


def _chosen(redundancy: Tensor, nearest: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r = others[-1]
    of_each = [empty(redundancy, *redundancy.shape, dtype=torch.float32) for _ in range(2)]
    of_chosen = [empty(nearest, nearest.shape[0], r) for _ in range(2)]
    return of_each[0], of_each[1], of_chosen[0], of_chosen[1]


choose.operator.register_fake(_chosen)


@jit
def _choose(
    redundancy: tl.tensor, redundancy_stride: tl.tensor, redundancy_step: tl.tensor,
    nearest: tl.tensor, nearest_stride: tl.tensor, nearest_step: tl.tensor,
    rows: tl.tensor, heads: tl.tensor, tokens: tl.tensor,
    candidates: tl.tensor, candidates_stride: tl.tensor, first_candidate: tl.tensor,
    destinations: tl.tensor, destinations_stride: tl.tensor, first_destination: tl.tensor,
    step: tl.tensor, marks: tl.tensor,
    r_out: tl.tensor, e_out: tl.tensor, src: tl.tensor, dst: tl.tensor,
    alpha: tl.tensor, candidate_count: tl.tensor, src_count: tl.tensor,
    DEGREE: tl.constexpr, ALL_PAIRS: tl.constexpr, STEPS_DOUBLED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per image. The names of the trees are those of `paired`."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    there = place < candidate_count
    e = tl.load(redundancy + image * redundancy_stride + place * redundancy_step, mask=there, other=0.0).to(tl.float32)
    partner = tl.load(nearest + image * nearest_stride + place * nearest_step, mask=there, other=0).to(tl.int32)
    if candidates is None:
        token = first_candidate + place * step
    else:
        token = tl.load(candidates + image * candidates_stride + place, mask=there, other=0).to(tl.int32)

    if ALL_PAIRS:
        partner = tl.where(there, partner, place)
        mutual = tl.gather(partner, partner, 0) == place
    if ALL_PAIRS and DEGREE != "given":  # the same for both, whatever rounding says
        e = tl.where(mutual, tl.maximum(e, tl.gather(e, partner, 0)), e)
    tl.store(r_out + image * candidate_count + place, e, mask=there)
    if DEGREE == "weighted_difference" or DEGREE == "weighted_distance":
        semantic = tl.zeros([BLOCK], tl.float32)
        for head in range(heads):
            semantic += tl.load(rows + (image * heads + head) * tokens + token, mask=there, other=0.0)
        semantic /= heads
        if DEGREE == "weighted_difference":
            e = e - alpha * semantic
        else:
            mean = tl.maximum(tl.sum(semantic, axis=0) / candidate_count, 1.1754943508222875e-38)
            e = (e - 1) * (1 + alpha * tl.sqrt(semantic / mean))
    tl.store(e_out + image * candidate_count + place, e, mask=there)
    e = tl.where(e == e, e, float("inf"))

    # whole numbers that order like E
    bits = e.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    if ALL_PAIRS:
        e_partner = tl.gather(e, partner, 0)
        lower = (e < e_partner) | ((e == e_partner) & (place > partner))
        root = mutual & (lower | (partner == place))
        parent = tl.where(root, place, partner)
        odd = tl.where(root, 0, 1)
        ahead = parent
        for _ in tl.static_range(STEPS_DOUBLED):
            odd = odd ^ tl.gather(odd, ahead, 0)
            ahead = tl.gather(ahead, ahead, 0)
        goes = odd & (1 - tl.gather(odd, parent, 0))
        mark = marks + image * candidate_count
        tl.store(mark + place, tl.zeros([BLOCK], tl.int32), mask=there)
        tl.debug_barrier()
        tl.store(mark + parent, tl.full([BLOCK], 1, tl.int32), mask=there & (goes == 1))
        tl.debug_barrier()
        stays = tl.load(mark + place, mask=there, other=1)
        follows = tl.where(root | (odd == 1) | (stays == 1), 0, tl.gather(goes, parent, 0))
        padding = (follows == 1) & (e == float("inf"))
        kind = tl.where((goes == 1) | padding, 3, tl.where(follows == 1, 2, tl.where(stays == 1, 0, 1)))
        key += kind.to(tl.int64) * 4294967296
        lowest = tl.min(tl.where(there, key, 17179869184), axis=0)
        last = tl.max(tl.where(there & (key == lowest), place, 0), axis=0)  # it never goes
        into = tl.where(follows == 1, tl.gather(parent, parent, 0), parent)
        into = tl.where(kind == 1, last, into)
    else:
        into = partner

    # the r-th highest, by halving what it can be: from the lowest of kind 0 to above the highest of kind 3
    key = tl.where(there, key, -4294967296)
    low = tl.full([], -2147483648, tl.int64)
    high = tl.full([], 17179869184, tl.int64)
    for _ in range(35):
        middle = low + (high - low) // 2
        enough = tl.sum((key >= middle).to(tl.int32), axis=0) >= src_count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = (key > low).to(tl.int32)
    equal = (key == low).to(tl.int32)
    chosen = (above == 1) | ((equal == 1) & (tl.cumsum(equal, axis=0) <= src_count - tl.sum(above, axis=0)))
    slot = image * src_count + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    if destinations is None:
        target = (first_destination + into * step).to(tl.int64)
    else:
        target = tl.load(destinations + image * destinations_stride + into, mask=chosen, other=0)
    tl.store(src + slot, token.to(tl.int64), mask=chosen)
    tl.store(dst + slot, target, mask=chosen)
