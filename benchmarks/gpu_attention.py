"""Attention with a bias on a GPU: every exact way to do it, against attention without one.

What is fastest here belongs in `turbovlm.ops.fused.attend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cases import DTYPES
from gpu_part import NOT_ON_CPU, Bench, Cell, Cells, Part, attempt, part, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

from turbovlm.ops import kernels, size_bias

Route = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]

WIDTHS = (64, 72, 80, 88, 128)
"""Channels of a head: of most encoders; of SigLIP-so400m; of ViT-H and Qwen2.5-VL; of EVA-g; of language models."""
LENGTHS = (577, 1025, 2048, 4096)
HEADS = 16
TOKENS = 2**15
"""About how many tokens a batch has in all, at every length."""


def attention_parts(dtype: str, small: bool) -> list[Part]:
    """One part for each width of a head."""
    widths, lengths = ((16,), (65,)) if small else (WIDTHS, LENGTHS)
    return [
        part(
            f"routes/{dtype}/{width}",
            [f"{length}/{name}" for length in lengths for name in ("no bias", *ROUTES)],
            functools.partial(_measure, dtype=dtype, width=width),
        )
        for width in widths
    ]


def _measure(bench: Bench, keys: Sequence[str], *, dtype: str, width: int) -> Cells:
    tensors = functools.lru_cache(maxsize=1)(functools.partial(heads, width=width, dtype=dtype, device=bench.device))

    def cell(length: int, name: str) -> Cell:
        q, k, v, sizes = tensors(2 if bench.small else TOKENS // length, length)
        bias, scale = size_bias(sizes, q.dtype), q.shape[-1] ** -0.5
        plain = functools.partial(masked_attention, q, k, v, None, scale)
        own = plain if name == "no bias" else functools.partial(ROUTES[name], q, k, v, bias, scale)
        return timed(bench, plain, own)

    for key in keys:
        length, name = key.split("/")[-2:]
        if bench.device == "cpu" and name in CUDA_ROUTES:
            yield key, NOT_ON_CPU
            continue
        yield key, attempt(functools.partial(cell, int(length), name))
        torch.compiler.reset()


def heads(
    batch: int, length: int, *, width: int, dtype: str, device: str, count: int = HEADS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values as one projection gives them, and sizes of 1 to 8."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(batch, length, 3, count, width, generator=generator).to(device, DTYPES[dtype])
    q, k, v = flat.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, torch.randint(1, 9, (batch, length), generator=generator).to(device, torch.float32)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """PyTorch's attention with the bias as its mask, by the backend that PyTorch chooses."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _on(backend: SDPBackend) -> Route:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        with sdpa_kernel(backend):
            return masked_attention(q, k, v, bias, scale)

    return attention


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Our kernel; PyTorch's where there is no bias."""
    if bias is None:
        return masked_attention(q, k, v, None, scale)
    attended: Tensor = kernels.biased_attention(q, k, v, bias, scale)
    return attended


def channel_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The bias as channels of the keys against ones in the queries, so that no mask is needed and FlashAttention runs.

    Two channels, the second for what the first loses by rounding; then zeros up to a multiple of 8.
    """
    if bias is None:
        return masked_attention(q, k, v, None, scale)
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


def flex_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """FlexAttention, with the bias added by its score modifier."""

    def modified(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[batch, 0, 0, key]

    attention: Any = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex.flex_attention
    attended: Tensor = attention(q, k, v, score_mod=None if bias is None else modified, scale=scale)
    return attended


@functools.cache
def _compiled_flex() -> Any:
    # for one shape, and an error instead of a silent eager run where it was compiled too often
    return torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)


ROUTES: dict[str, Route] = {
    "SDPA": masked_attention,
    "efficient": _on(SDPBackend.EFFICIENT_ATTENTION),
    "cuDNN": _on(SDPBackend.CUDNN_ATTENTION),
    "flex": flex_attention,
    "channel": channel_attention,
    "kernel": kernel_attention,
}
"""Exact ways to attend with a bias, by name."""
CUDA_ROUTES = ("efficient", "cuDNN", "kernel")
"""Those that CPUs do not have."""
