"""Tokens taken one after another, all steps in one launch: one program for each image."""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.ops.kernels.common import HAS_TRITON, jit

if HAS_TRITON:
    import triton
    import triton.language as tl

MOST_TAKEN_FROM = 8192
"""Tokens of an image that `take_in_turn` takes: a program holds numbers of each in its registers."""
ELEMENTS = 16384
"""Cosines that a program looks at together."""


def take_in_turn(
    cosines: Tensor,
    log_weights: Tensor,
    sizes: Tensor,
    added: Tensor,
    k: int,
    by: str,
    until: float | None,
    fewest: int,
    least: float,
    tie: float,
    ridge: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of `turbovlm.ops.greedy.take_in_turn`, whose arguments and results these are, but for

    Args:
        log_weights: those of padding, of size 0, as they are to count.
        added: what each token adds to none, `[images, n]`, float64 for `"coverage"`, which sums it in that, else
            float32; of `"coverage"` and `"dpp"`, not its logarithm.
        least: what a token is taken to add at least, of these two.
        tie: how much less than the best counts as much; the first of these is taken.
        ridge: of `"dpp"`, what no choice takes from a token.
    """
    images, n = log_weights.shape
    block = max(triton.next_power_of_2(n), 64)
    order = torch.zeros(images, k, dtype=torch.int64, device=cosines.device)
    nearest, counts = order.new_empty(images, n), order.new_empty(images)
    places = torch.empty(images, n, dtype=torch.int32, device=cosines.device)
    # numbers beside these places, or rows of the Cholesky factor
    beside = torch.empty(images, k if by == "dpp" else 2, n, dtype=torch.float32, device=cosines.device)
    with torch.cuda.device(cosines.get_device()):
        _take_in_turn[(images,)](
            *(cosines.contiguous(), log_weights.contiguous(), sizes.contiguous(), added.contiguous()),
            *(places, beside, order, nearest, counts, 0.0 if until is None else until, n, k, fewest),
            BY=by,
            LEAST=least,
            TIE=tie,
            RIDGE=ridge,
            UNTIL=until is not None,
            BLOCK=block,
            ROWS=max(ELEMENTS // block, 1),
            num_warps=min(max(block // 128, 4), 16),
        )
    return order, nearest, counts


@jit
def _take_in_turn(
    cosines: tl.tensor, log_weights: tl.tensor, sizes: tl.tensor, added: tl.tensor,
    places: tl.tensor, beside: tl.tensor, order: tl.tensor, nearest: tl.tensor, counts: tl.tensor,
    until: tl.tensor, tokens: tl.tensor, src_count: tl.tensor, fewest: tl.tensor,
    BY: tl.constexpr, LEAST: tl.constexpr, TIE: tl.constexpr, RIDGE: tl.constexpr,
    UNTIL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """One program per image."""
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    there = place < tokens
    first = image * tokens
    weight = tl.load(log_weights + first + place, mask=there, other=float("-inf"))
    size = tl.load(sizes + first + place, mask=there, other=0.0)
    adds = tl.load(added + first + place, mask=there, other=0.0)
    closest = tl.full([BLOCK], float("-inf"), tl.float32)
    owner = tl.zeros([BLOCK], tl.int32)
    some = tl.arange(0, ROWS)
    step = 0
    end = src_count
    while step < end:
        if BY == "coverage" or BY == "dpp":
            score = weight + tl.log(tl.maximum(adds, LEAST)).to(tl.float32)
        else:
            score = weight + adds
        token = tl.min(tl.where(score >= tl.max(score, axis=0) - TIE, place, BLOCK), axis=0)
        tl.store(order + image * src_count + step, token.to(tl.int64))
        row = tl.load(cosines + (first + token) * tokens + place, mask=there, other=-1.0)
        owner = tl.where(row > closest, step, owner)
        weight = tl.where(place == token, float("-inf"), weight)
        after = tl.maximum(closest, row)
        if BY == "coverage":
            covered = tl.maximum(closest, 0.0)
            rise = tl.maximum(after, 0.0) - covered
            rises = there & (rise > 0)
            slot = tl.cumsum(rises.to(tl.int32), axis=0) - 1
            count = tl.sum(rises.to(tl.int32), axis=0)
            tl.debug_barrier()
            tl.store(places + first + slot, place, mask=rises)
            tl.store(beside + 2 * first + slot, covered, mask=rises)
            tl.store(beside + 2 * first + tokens + slot, rise, mask=rises)
            tl.debug_barrier()
            for start in range(0, count, ROWS):
                taken = start + some < count
                of = tl.load(places + first + start + some, mask=taken, other=0)
                low = tl.load(beside + 2 * first + start + some, mask=taken, other=0.0)
                most = tl.load(beside + 2 * first + tokens + start + some, mask=taken, other=0.0)
                counted = tl.load(sizes + first + of, mask=taken, other=0.0)
                every = tl.load(
                    cosines + (first + of)[:, None] * tokens + place[None, :],
                    mask=taken[:, None] & there[None, :],
                    other=0.0,
                )
                lost = tl.minimum(tl.maximum(every - low[:, None], 0.0), most[:, None]) * counted[:, None]
                adds -= tl.sum(lost, axis=0).to(tl.float64)
        elif BY == "dpp":
            explained = tl.zeros([BLOCK], tl.float32)
            for start in range(0, step, ROWS):
                taken = start + some < step
                line = beside + (image * src_count + start + some) * tokens
                own = tl.load(line + token, mask=taken, other=0.0)
                known = tl.load(line[:, None] + place[None, :], mask=taken[:, None] & there[None, :], other=0.0)
                explained += tl.sum(own[:, None] * known, axis=0)
            length = tl.sqrt(tl.maximum(tl.sum(tl.where(place == token, adds, 0.0), axis=0), RIDGE))
            new = tl.where(place == token, length, (row - explained) / length)
            tl.store(beside + (image * src_count + step) * tokens + place, new, mask=there)
            tl.debug_barrier()
            adds -= new * new
        else:
            adds = -after
        closest = after
        step += 1
        if UNTIL:
            worst = tl.min(tl.where(there & (size > 0), closest, float("inf")), axis=0)
            if (worst >= until) & (step >= fewest):
                end = step
    tl.store(nearest + first + place, owner.to(tl.int64), mask=there)
    tl.store(counts + image, tl.zeros([], tl.int64) + end)
