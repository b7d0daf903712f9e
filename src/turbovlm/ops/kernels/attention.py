"""Attention with a bias per key, which FlashAttention does not take, and the attention row of a guide."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbovlm.ops.kernels.common import (
    HAS_TRITON,
    LEAST_CAPABILITY,
    alignment,
    called,
    interpreted,
    jit,
    operator,
    usable,
)
from turbovlm.ops.kernels.replay import empty
from turbovlm.ops.tracing import constant_in_graphs

if HAS_TRITON:
    import triton
    import triton.language as tl

LARGEST_HEAD = 128

BUSY = 256
"""Programs that occupy a large GPU, two for each of 108 to 132 multiprocessors: a count, not timed."""


@dataclass(frozen=True)
class Tile:
    """How `biased_attention` divides its work: queries of a program, keys of a turn of its loop, warps, and how many
    turns' keys and values are in shared memory."""

    queries: int
    keys: int
    warps: int
    stages: int


SMALL = Tile(queries=64, keys=64, warps=4, stages=2)
LARGE = Tile(queries=128, keys=64, warps=4, stages=2)
WIDE = Tile(queries=128, keys=64, warps=8, stages=2)


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `biased_attention` takes them: half precision, all of one dtype, heads of at most 128 channels."""
    alike = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    return alike and usable(q) and q.shape[-1] == v.shape[-1] <= LARGEST_HEAD and _is_capable(q.device)


@constant_in_graphs
def _is_capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


@operator
def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`softmax(QKᵀ·scale + bias) V`, the map never in memory; not differentiable.

    Args:
        q: `[batch, heads, queries, head_dim]`, float16 or bfloat16, with any strides; head_dim ≤ 128.
        k, v: `[batch, heads, tokens, head_dim]`, likewise.
        bias: `[batch, 1 or heads, 1, tokens]`, finite.
        scale: of the products.

    Returns:
        `[batch, heads, queries, head_dim]`; in memory a token's heads lie side by side.
    """
    out: Tensor = _attended(q, k, v, bias, scale)
    launch(out, q, k, v, bias, scale, tile_of(*q.shape))
    return out


@functools.lru_cache(maxsize=256)
def head_parts(head_dim: int) -> tuple[int, int]:
    """Channels of the two parts that a head is computed in, powers of 2 from 16 on; the second is 0 where two parts are
    no fewer channels than one: 72 is 64 and 16, 112 is 128."""
    whole = max(triton.next_power_of_2(head_dim), 16)
    main = whole // 2
    rest = max(triton.next_power_of_2(head_dim - main), 16)
    return (main, rest) if main + rest < whole else (whole, 0)


def tile_of(batch: int, heads: int, queries: int, head_dim: int) -> Tile:
    """The tile for attention of this shape.

    Not timed yet (`benchmarks/attention_sweep.py` will): chosen by what `tests/compiled_kernels.py` prints for compute
    capability 9.0. Registers allow two programs on a multiprocessor, so that one multiplies while the other takes
    exponentials, or one of 8 warps at 128 channels; no loop uses the stack. 64 keys at a time take a quarter fewer
    instructions for a score than 32; 128 would spill, or waste more in the last block. Programs of 128 queries read
    keys and values half as often as those of 64, but must be enough to occupy the GPU. Shared memory stays within the
    99 KiB of small GPUs.
    """
    if -(-queries // LARGE.queries) * batch * heads < BUSY:
        return SMALL
    return WIDE if head_dim > 96 else LARGE


def launch(out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, tile: Tile) -> None:
    """Write `biased_attention` of these into `out`."""
    batch, heads, queries, head_dim = q.shape
    bias = bias.expand(batch, heads, 1, k.shape[2])
    main, rest = head_parts(head_dim)
    programs = -(-queries // tile.queries) * batch * heads
    with torch.cuda.device(q.get_device()):
        _biased_attention[(programs,)](
            *(q, *q.stride(), k, *k.stride(), v, *v.stride()),
            *(bias, bias.stride(0), bias.stride(1), bias.stride(3), out, *out.stride()),
            *(scale, heads, queries, k.shape[2]),
            HEAD_DIM=head_dim,
            MAIN=main,
            REST=rest,
            WIDENED=interpreted(q),
            ALIGNED=alignment(q, k, v, out),
            BLOCK_Q=tile.queries,
            BLOCK_K=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


@operator
def attention_rows(
    q: Tensor,
    keys: Tensor,
    content: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    guides: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`softmax(g·Kᵀ·scale + bias)` of one query per head, and how long the tokens are; not differentiable.

    Args:
        q: `[batch, heads, tokens, head_dim]`, float32, float16 or bfloat16, with any strides.
        keys: likewise; content: likewise, of their shape, what is compared, if it is not the keys.
        bias: `[batch, 1, 1, tokens]`, or None.
        weights: of the queries in g, `[batch, tokens]`, float32; all alike if None.
        guides: the first of the queries whose mean g is, and the one behind the last.
        scale: of the products.

    Returns:
        The rows, and the squared lengths of the content by head, `[batch, heads, tokens]` each, float32.
    """
    outputs = _rows(q, keys, content, bias, weights, guides, scale)
    batch, heads, tokens, head_dim = keys.shape
    with torch.cuda.device(keys.get_device()):
        _attention_rows[(batch * heads,)](
            *(q, *q.stride(), keys, *keys.stride()),
            *((None, 0, 0, 0, 0) if content is None else (content, *content.stride())),
            *((None, 0, 0) if bias is None else (bias, bias.stride(0), bias.stride(3))),
            *(None if weights is None else weights.contiguous(),),
            *(*outputs, scale, heads, tokens, *guides),
            HEAD_DIM=head_dim,
            ALIGNED=alignment(q, keys, *(() if content is None else (content,))),
            BLOCK_K=128,
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=4,
        )
    return outputs


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    return q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)


biased_attention.operator.register_fake(_attended)


def _rows(q: Tensor, keys: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rows, squares = (empty(keys, *keys.shape[:3], dtype=torch.float32) for _ in range(2))
    return rows, squares


attention_rows.operator.register_fake(_rows)


@jit
def _biased_attention(
    q: tl.tensor, q_image: tl.tensor, q_head: tl.tensor, q_token: tl.tensor, q_channel: tl.tensor,
    k: tl.tensor, k_image: tl.tensor, k_head: tl.tensor, k_token: tl.tensor, k_channel: tl.tensor,
    v: tl.tensor, v_image: tl.tensor, v_head: tl.tensor, v_token: tl.tensor, v_channel: tl.tensor,
    bias: tl.tensor, bias_image: tl.tensor, bias_head: tl.tensor, bias_token: tl.tensor,
    out: tl.tensor, out_image: tl.tensor, out_head: tl.tensor, out_token: tl.tensor, out_channel: tl.tensor,
    scale: tl.tensor, heads: tl.tensor, queries: tl.tensor, tokens: tl.tensor,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, WIDENED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """One program per `BLOCK_Q` queries of a head; keys come in blocks, the softmax is kept up to date.

    A head's channels are `MAIN` and, unless `REST` is 0, up to `REST` more: each part has its own products and sums.
    Blocks of keys that are whole are read without masks, which would be a tenth of the loop's instructions.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    blocks = tl.cdiv(queries, BLOCK_Q)
    image = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    q += tl.multiple_of(image * q_image + head * q_head, ALIGNED)
    k += tl.multiple_of(image * k_image + head * k_head, ALIGNED)
    v += tl.multiple_of(image * v_image + head * v_head, ALIGNED)
    bias += image * bias_image + head * bias_head
    out += tl.multiple_of(image * out_image + head * out_head, ALIGNED)

    query, main = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, MAIN)
    asked = _loaded(q, query, q_token, queries, main, q_channel, HEAD_DIM, ALIGNED, WIDENED)
    mixed = tl.zeros([BLOCK_Q, MAIN], tl.float32)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        asked_rest = _loaded(q, query, q_token, queries, rest, q_channel, HEAD_DIM, ALIGNED, WIDENED)
        mixed_rest = tl.zeros([BLOCK_Q, REST], tl.float32)
    highest = tl.full([BLOCK_Q], -1e38, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    whole = tokens // BLOCK_K * BLOCK_K
    for RAGGED in tl.static_range(2):  # the whole blocks, then the last one if it is not whole
        end = tokens if RAGGED else whole
        limit = tokens if RAGGED else None
        for first in range(whole if RAGGED else 0, end, BLOCK_K):
            key = first + tl.arange(0, BLOCK_K)
            keys = _loaded(k, key, k_token, limit, main, k_channel, HEAD_DIM, ALIGNED, WIDENED)
            scores = tl.dot(asked, tl.trans(keys))
            if REST > 0:
                keys = _loaded(k, key, k_token, limit, rest, k_channel, HEAD_DIM, ALIGNED, WIDENED)
                scores = tl.dot(asked_rest, tl.trans(keys), scores)
            if RAGGED:
                more = tl.load(bias + key * bias_token, mask=key < tokens, other=float("-inf"))
            else:
                more = tl.load(bias + key * bias_token)
            scores = scores * scale + more.to(tl.float32)[None, :]
            now = tl.maximum(highest, tl.max(scores, axis=1))
            shares = tl.exp2(scores * LOG2_E - (now * LOG2_E)[:, None])  # one instruction before the exponential
            fade = tl.exp2((highest - now) * LOG2_E)
            total = total * fade + tl.sum(shares, axis=1)
            values = _loaded(v, key, v_token, limit, main, v_channel, HEAD_DIM, ALIGNED, WIDENED)
            shares = shares.to(values.dtype)
            mixed = tl.dot(shares, values, mixed * fade[:, None])
            if REST > 0:
                values = _loaded(v, key, v_token, limit, rest, v_channel, HEAD_DIM, ALIGNED, WIDENED)
                mixed_rest = tl.dot(shares, values, mixed_rest * fade[:, None])
            highest = now
    per_share = (1.0 / tl.maximum(total, 1e-30))[:, None]
    out += tl.multiple_of(query * out_token, ALIGNED)[:, None]
    inside = (query < queries)[:, None]
    mixed = (mixed * per_share).to(out.dtype.element_ty)
    tl.store(out + main[None, :] * out_channel, mixed, mask=inside & (main < HEAD_DIM)[None, :])
    if REST > 0:
        mixed_rest = (mixed_rest * per_share).to(out.dtype.element_ty)
        tl.store(out + rest[None, :] * out_channel, mixed_rest, mask=inside & (rest < HEAD_DIM)[None, :])


@called
def _loaded(
    x: tl.tensor, token: tl.tensor, token_stride: tl.tensor, tokens: tl.tensor,
    channel: tl.tensor, channel_stride: tl.tensor,
    HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, WIDENED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Channels of tokens of a head, `[tokens, channels]`: 0 beyond `HEAD_DIM`, and beyond `tokens` unless it is None.

    Rows begin at multiples of `ALIGNED` elements, so that one instruction loads as many. `WIDENED`: as float32.
    """
    # as [tokens, 1] the hint would hold for channels too in Triton 3.6, which then loads them one by one
    row = tl.multiple_of(token * token_stride, ALIGNED)
    pointers = x + row[:, None] + channel[None, :] * channel_stride
    mask = (channel < HEAD_DIM)[None, :]
    if tokens is not None:
        mask = mask & (token < tokens)[:, None]
    loaded = tl.load(pointers, mask=mask, other=0.0)
    return loaded.to(tl.float32) if WIDENED else loaded


@jit
def _attention_rows(
    q: tl.tensor, q_image: tl.tensor, q_head: tl.tensor, q_token: tl.tensor, q_channel: tl.tensor,
    keys: tl.tensor, image_stride: tl.tensor, head_stride: tl.tensor, token_stride: tl.tensor,
    channel_stride: tl.tensor,
    content: tl.tensor, content_image: tl.tensor, content_head: tl.tensor, content_token: tl.tensor,
    content_channel: tl.tensor,
    bias: tl.tensor, bias_image: tl.tensor, bias_token: tl.tensor, weights: tl.tensor,
    rows: tl.tensor, squares: tl.tensor, scale: tl.tensor, heads: tl.tensor, tokens: tl.tensor,
    guides: tl.tensor, behind: tl.tensor,
    HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """One program per head of an image: the guide's query, then the scores, then what they are of their softmax."""
    image, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    q += tl.multiple_of(image * q_image + head * q_head, ALIGNED)
    keys += tl.multiple_of(image * image_stride + head * head_stride, ALIGNED)
    if content is not None:
        content += tl.multiple_of(image * content_image + head * content_head, ALIGNED)
    rows += tl.program_id(0).to(tl.int64) * tokens
    squares += tl.program_id(0).to(tl.int64) * tokens
    summed = tl.zeros([BLOCK_D], tl.float32)
    weight = 0.0
    for first in range(guides, behind, BLOCK_K):
        token = first + tl.arange(0, BLOCK_K)
        there = token < behind
        query = _loaded(q, token, q_token, behind, channel, q_channel, HEAD_DIM, ALIGNED, True)
        if weights is None:
            share = there.to(tl.float32)
        else:
            share = tl.load(weights + image * tokens + token, mask=there, other=0.0)
        summed += tl.sum(query * share[:, None], axis=0)
        weight += tl.sum(share, axis=0)
    guide = summed / weight * scale

    highest, total = -1e38, 0.0
    for first in range(0, tokens, BLOCK_K):
        token = first + tl.arange(0, BLOCK_K)
        there = token < tokens
        key = _loaded(keys, token, token_stride, tokens, channel, channel_stride, HEAD_DIM, ALIGNED, True)
        scores = tl.sum(key * guide[None, :], axis=1)
        if bias is not None:
            more = tl.load(bias + image * bias_image + token * bias_token, mask=there, other=0.0)
            scores += more.to(tl.float32)
        tl.store(rows + token, scores, mask=there)
        if content is not None:
            key = _loaded(content, token, content_token, tokens, channel, content_channel, HEAD_DIM, ALIGNED, True)
        tl.store(squares + token, tl.sum(key * key, axis=1), mask=there)
        now = tl.maximum(highest, tl.max(tl.where(there, scores, float("-inf"))))
        total = total * tl.exp(highest - now) + tl.sum(tl.where(there, tl.exp(scores - now), 0.0))
        highest = now
    tl.debug_barrier()
    for first in range(0, tokens, BLOCK_K):
        token = first + tl.arange(0, BLOCK_K)
        there = token < tokens
        scores = tl.load(rows + token, mask=there, other=float("-inf"))
        tl.store(rows + token, tl.exp(scores - highest) / tl.maximum(total, 1e-30), mask=there)
