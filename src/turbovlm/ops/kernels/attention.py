"""Attention with a bias per key, which FlashAttention does not take, and the attention row of a guide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.ops.kernels.common import HAS_TRITON, LEAST_CAPABILITY, alignment, interpreted, jit, operator, usable
from turbovlm.ops.tracing import constant_in_graphs

if HAS_TRITON:
    import triton
    import triton.language as tl

LARGEST_HEAD = 128
LOG2_E = 1.4426950408889634


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
    batch, heads, queries, head_dim = q.shape
    bias = bias.expand(batch, heads, 1, k.shape[2])
    wide = head_dim > 64
    block = 128 if wide else 64
    with torch.cuda.device(q.get_device()):
        _biased_attention[(triton.cdiv(queries, block), batch * heads)](
            *(q, *q.stride(), k, *k.stride(), v, *v.stride()),
            *(bias, bias.stride(0), bias.stride(1), bias.stride(3), out, *out.stride()),
            *(scale * LOG2_E, heads, queries, k.shape[2]),
            HEAD_DIM=head_dim,
            WIDENED=interpreted(q),
            ALIGNED=alignment(q, k, v),
            BLOCK_Q=block,
            BLOCK_K=32 if wide else 64,
            BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
            num_warps=4,
            num_stages=3,
        )
    return out


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
            ALIGNED=alignment(q, keys),
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
    rows, squares = (keys.new_empty(keys.shape[:3], dtype=torch.float32) for _ in range(2))
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
    HEAD_DIM: tl.constexpr, WIDENED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """One program per `BLOCK_Q` queries of a head; keys come in blocks, the softmax is kept up to date.

    Scores are in powers of 2: `scale` holds log₂e, and so does the bias once it is loaded.
    """
    image, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    query, channel = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    in_queries, in_head = query < queries, channel < HEAD_DIM
    q += tl.multiple_of(image * q_image + head * q_head, ALIGNED)
    k += tl.multiple_of(image * k_image + head * k_head, ALIGNED)
    v += tl.multiple_of(image * v_image + head * v_head, ALIGNED)
    bias += image * bias_image + head * bias_head
    out += image * out_image + head * out_head

    asked = tl.load(
        q + query[:, None] * q_token + channel[None, :] * q_channel,
        mask=in_queries[:, None] & in_head[None, :],
        other=0.0,
    )
    if WIDENED:
        asked = asked.to(tl.float32)
    highest = tl.full([BLOCK_Q], -1e38, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first in range(0, tokens, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        there = key < tokens
        keys = tl.load(
            k + channel[:, None] * k_channel + key[None, :] * k_token, mask=in_head[:, None] & there[None, :], other=0.0
        )
        if WIDENED:
            keys = keys.to(tl.float32)
        more = tl.load(bias + key * bias_token, mask=there, other=float("-inf")).to(tl.float32)
        scores = tl.dot(asked, keys) * scale + (more * 1.4426950408889634)[None, :]
        now = tl.maximum(highest, tl.max(scores, axis=1))
        shares = tl.exp2(scores - now[:, None])
        fade = tl.exp2(highest - now)
        total = total * fade + tl.sum(shares, axis=1)
        values = tl.load(
            v + key[:, None] * v_token + channel[None, :] * v_channel, mask=there[:, None] & in_head[None, :], other=0.0
        )
        if WIDENED:
            values = values.to(tl.float32)
        mixed = tl.dot(shares.to(values.dtype), values, mixed * fade[:, None])
        highest = now
    mixed /= tl.maximum(total, 1e-30)[:, None]
    tl.store(
        out + query[:, None] * out_token + channel[None, :] * out_channel,
        mixed.to(out.dtype.element_ty),
        mask=in_queries[:, None] & in_head[None, :],
    )


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
    in_head = channel < HEAD_DIM
    q += tl.multiple_of(image * q_image + head * q_head, ALIGNED)
    keys += tl.multiple_of(image * image_stride + head * head_stride, ALIGNED)
    rows += tl.program_id(0).to(tl.int64) * tokens
    squares += tl.program_id(0).to(tl.int64) * tokens
    summed = tl.zeros([BLOCK_D], tl.float32)
    weight = 0.0
    for first in range(guides, behind, BLOCK_K):
        token = first + tl.arange(0, BLOCK_K)
        there = token < behind
        pointers = q + token[:, None] * q_token + channel[None, :] * q_channel
        query = tl.load(pointers, mask=there[:, None] & in_head[None, :], other=0.0).to(tl.float32)
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
        pointers = keys + token[:, None] * token_stride + channel[None, :] * channel_stride
        key = tl.load(pointers, mask=there[:, None] & in_head[None, :], other=0.0).to(tl.float32)
        scores = tl.sum(key * guide[None, :], axis=1)
        if bias is not None:
            more = tl.load(bias + image * bias_image + token * bias_token, mask=there, other=0.0)
            scores += more.to(tl.float32)
        tl.store(rows + token, scores, mask=there)
        if content is not None:
            pointers = content + image * content_image + head * content_head
            pointers += token[:, None] * content_token + channel[None, :] * content_channel
            key = tl.load(pointers, mask=there[:, None] & in_head[None, :], other=0.0).to(tl.float32)
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
