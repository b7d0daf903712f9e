"""Five ways to one result, `softmax(QKᵀ·scale + bias) V`: which is fastest depends on device and dtype.

All take queries, keys and values `[batch, heads, tokens, head_dim]`, a finite bias `[batch, 1, 1, tokens]` or None,
and the scale of the scores, and return `[batch, heads, tokens, head_dim]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from turbovlm.ops.backend import fused_kernels, is_exporting

STORED_SCORES = 1 << 20
"""Scores that `stored` holds at a time, at most: 2 MiB, which a core's cache still serves."""

_CPU: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
FAST_BFLOAT16_PRODUCTS = bool(_CPU.get("avx512_bf16")) and not _CPU.get("amx_bf16")
"""Whether this CPU multiplies bfloat16 matrices faster than float32 ones, but not within PyTorch's fused attention.
Read at import, so that compilers see a constant. Releases of PyTorch that do not tell what the CPU has count as no."""

Route = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def fastest(q: Tensor, k: Tensor, v: Tensor) -> Route:
    """`fused` on NVIDIA GPUs in half precision, `stored` for bfloat16 on CPUs where it is known to win, else `masked`.

    On x86 CPUs with bfloat16 products but no tiles for them (AMX), PyTorch's fused attention is no faster in bfloat16
    than in float32, while plain matrix products are (`FAST_BFLOAT16_PRODUCTS`).
    """
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if differentiated:
        return masked
    kernels = fused_kernels(q)
    if kernels is not None and kernels.attends(q, k, v):
        return fused
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not is_exporting():
        return stored if FAST_BFLOAT16_PRODUCTS else masked
    return masked


def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`scaled_dot_product_attention` with the bias as its mask. On CUDA a mask rules FlashAttention out."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """A kernel that adds the bias to the scores in registers; without a bias, what PyTorch has. Not differentiable."""
    if bias is None:
        return masked(q, k, v, None, scale)
    from turbovlm.ops import kernels

    attended: Tensor = kernels.biased_attention(q, k, v, bias, scale)
    return attended


def channel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The bias as channels of the keys against ones in the queries, so that no mask is needed and FlashAttention runs.

    Two channels, the second for what the first loses by rounding; then zeros up to a multiple of 8.
    """
    if bias is None:
        return masked(q, k, v, None, scale)
    head_dim = q.shape[-1]
    precise = torch.promote_types(q.dtype, torch.float32)
    wanted = (bias.to(precise) / scale).clamp_min(torch.finfo(q.dtype).min / 2).transpose(-1, -2)
    high = wanted.to(q.dtype)
    pair = torch.cat([high, (wanted - high).to(q.dtype)], dim=-1).expand(*k.shape[:3], 2)
    padding = -(head_dim + 2) % 8
    q = torch.cat([q, q.new_ones(()).expand(*q.shape[:3], 2), q.new_zeros(()).expand(*q.shape[:3], padding)], dim=-1)
    k = torch.cat([k, pair, k.new_zeros(()).expand(*k.shape[:3], padding)], dim=-1)
    v = F.pad(v, (0, 2 + padding))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :head_dim]


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """FlexAttention, with the bias added by its score modifier."""
    from torch.nn.attention.flex_attention import flex_attention

    def modified(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[batch, 0, 0, key]

    attention: Any = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    attended: Tensor = attention(q, k, v, score_mod=None if bias is None else modified, scale=scale)
    return attended


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def stored(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Matrix products and a softmax in the tensors' own dtype, a few heads or rows of scores at a time.

    Not differentiable. Beside its result it takes the memory of two tensors no larger than the queries, as far as
    one row of scores allows.
    """
    attended: Tensor = _stored(q, k, v, bias, scale)
    return attended


@torch.library.custom_op("turbovlm::stored_attention", mutates_args=())
def _stored(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    out = _like(q)
    _, heads, queries, _ = q.shape
    tokens = k.shape[2]
    limit = min(STORED_SCORES, q.numel())
    several = min(max(limit // (queries * tokens), 1), heads)
    rows = min(max(limit // tokens, 1), queries) if several == 1 else queries
    keys = k.transpose(-1, -2)
    for picture in range(q.shape[0]):
        for head in range(0, heads, several):
            where = slice(head, head + several)
            for row in range(0, queries, rows):
                part = q[picture, where, row : row + rows]
                if bias is None:
                    scores = torch.bmm(part, keys[picture, where]).mul_(scale)
                else:
                    scores = torch.baddbmm(bias[picture], part, keys[picture, where], alpha=scale)
                out[picture, where, row : row + rows] = torch.bmm(scores.softmax(dim=-1), v[picture, where])
    return out


@_stored.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return _like(q)


def _like(q: Tensor) -> Tensor:
    """A tensor of `q`'s shape in which a token's heads lie side by side, as the projection after attention reads it."""
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


@register_flop_formula(torch.ops.turbovlm.stored_attention)
def _(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, head_dim = q
    flops: int = 4 * batch * heads * queries * k[2] * head_dim
    return flops
