"""The books of a merge whose tokens come later: where each token goes, shares and sizes, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.ops import plain
from turbovlm.ops.kernels.common import HAS_TRITON, jit, operator
from turbovlm.ops.kernels.replay import empty

if HAS_TRITON:
    import triton
    import triton.language as tl

MOST_BOOKED = 4096
"""Tokens of an image that one program books, 128 of those that go after the other; of more PyTorch's operators do.
Chosen by count, not timed: up to 24 turns, where those operators are some twenty launches."""


@operator
def merge_books(
    src: Tensor, dst: Tensor, tokens: int, prune: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`plain.merge_books` of tokens that each stand for one patch, in their own order, and the bags of `averaging`.

    Args:
        src: the tokens that are merged, `[batch, r]`, int64, distinct.
        dst: the token that each is merged into, `[batch, r]`, int64, none of `src`.
        tokens: N.
        prune: whether what is merged is dropped instead.

    Returns:
        `rows`, `weights` and `sizes` of `Merge`, and the three of `averaging.Bags`. The kernel's bags begin with the
        token that stays, and those that join it follow in the order of `src`.
    """
    if tokens > MOST_BOOKED:
        reduce = "prune" if prune else "merge"
        rows, weights, sizes, bags = plain.merge_books(src, dst, tokens, torch.float32, None, None, reduce)
        assert bags is not None  # as on every GPU
        return rows, weights, sizes, *bags
    outputs = _books(src, dst, tokens, prune)
    batch, r = src.shape
    counts, places = (empty(src, batch, tokens, dtype=torch.int32) for _ in range(2))
    block = max(triton.next_power_of_2(tokens), 128)
    with torch.cuda.device(src.get_device()):
        _merge_books[(batch,)](
            *(src.contiguous(), dst.contiguous(), counts, places, *outputs, tokens, r),
            PRUNE=prune,
            BLOCK=block,
            BLOCK_R=128,
            num_warps=8,
        )
    return outputs


def _books(src: Tensor, dst: Tensor, tokens: int, prune: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, left = src.shape[0], tokens - src.shape[1]
    rows, bag, starts = (empty(src, batch * each) for each in (tokens, tokens, left))
    weights, sizes, shares = (
        empty(src, *shape, dtype=torch.float32) for shape in ((batch, tokens), (batch, left), (batch * tokens,))
    )
    return rows, weights, sizes, bag, starts, shares


merge_books.operator.register_fake(_books)


@jit
def _merge_books(
    src: tl.tensor, dst: tl.tensor, counts: tl.tensor, places: tl.tensor,
    rows: tl.tensor, weights: tl.tensor, sizes: tl.tensor, bag: tl.tensor, starts: tl.tensor, shares: tl.tensor,
    tokens: tl.tensor, src_count: tl.tensor,
    PRUNE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:  # fmt: skip
    """One program per image. `counts` has, of each token left, how many are in its bag; `places` those of `src`."""
    image = tl.program_id(0).to(tl.int64)
    left = tokens - src_count
    src += image * src_count
    dst += image * src_count
    counts += image * tokens
    places += image * tokens
    rows += image * tokens
    weights += image * tokens
    bag += image * tokens
    shares += image * tokens
    sizes += image * left
    starts += image * left

    token = tl.arange(0, BLOCK)
    there = token < tokens
    tl.store(counts + token, tl.full([BLOCK], 1, tl.int32), mask=there)
    tl.debug_barrier()
    for first in range(0, src_count, BLOCK_R):
        j = first + tl.arange(0, BLOCK_R)
        source = tl.load(src + j, mask=j < src_count, other=0)
        tl.store(counts + source, tl.zeros([BLOCK_R], tl.int32), mask=j < src_count)
    tl.debug_barrier()
    stays = tl.load(counts + token, mask=there, other=0)
    slot = tl.cumsum(stays, axis=0) - 1  # a token that stays comes behind those before it that stay
    tl.debug_barrier()
    tl.store(rows + token, image * left + slot, mask=there)
    tl.store(counts + token, tl.full([BLOCK], 1, tl.int32), mask=there)  # from here on by slot: the token that stays
    tl.debug_barrier()
    for first in range(0, src_count, BLOCK_R):
        j = first + tl.arange(0, BLOCK_R)
        valid = j < src_count
        source = tl.load(src + j, mask=valid, other=0)
        row = tl.load(rows + tl.load(dst + j, mask=valid, other=0), mask=valid, other=0)
        into = (row - image * left).to(tl.int32)
        same = (into[:, None] == into[None, :]) & valid[:, None] & valid[None, :]
        earlier = tl.sum((same & (j[None, :] < j[:, None])).to(tl.int32), axis=1)
        before = tl.load(counts + into, mask=valid, other=0)
        tl.store(places + j, before + earlier, mask=valid)
        tl.debug_barrier()
        tl.store(counts + into, before + tl.sum(same.to(tl.int32), axis=1), mask=valid)
        tl.store(rows + source, row, mask=valid)
        tl.debug_barrier()

    count = tl.load(counts + token, mask=token < left, other=0)
    begin = tl.cumsum(count, axis=0) - count
    tl.store(starts + token, image * tokens + begin, mask=token < left)
    size = tl.full([BLOCK], 1.0, tl.float32) if PRUNE else count.to(tl.float32)
    tl.store(sizes + token, size, mask=token < left)
    tl.debug_barrier()
    kept = there & (stays == 1)
    share = 1.0 / tl.load(sizes + slot, mask=kept, other=1.0)
    at = tl.load(starts + slot, mask=kept, other=0) - image * tokens
    tl.store(bag + at, image * tokens + token, mask=kept)
    tl.store(shares + at, share, mask=kept)
    tl.store(weights + token, share, mask=kept)
    for first in range(0, src_count, BLOCK_R):
        j = first + tl.arange(0, BLOCK_R)
        valid = j < src_count
        source = tl.load(src + j, mask=valid, other=0)
        into = tl.load(rows + source, mask=valid, other=0) - image * left
        part = 1.0 / tl.load(sizes + into, mask=valid, other=1.0)
        if PRUNE:
            part = part * 0.0
        slot_in = (
            tl.load(starts + into, mask=valid, other=0) - image * tokens + tl.load(places + j, mask=valid, other=0)
        )
        tl.store(bag + slot_in, image * tokens + source, mask=valid)
        tl.store(shares + slot_in, part, mask=valid)
        tl.store(weights + source, part, mask=valid)
