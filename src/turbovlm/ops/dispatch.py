"""The one place that decides what runs: Triton's kernels where they take the tensors, plain operators elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from turbovlm.ops import plain
from turbovlm.ops.degree import DegreeFunction, default_alpha, information_degree
from turbovlm.ops.partition import Index, Partition, positions, take_values
from turbovlm.ops.tracing import is_exporting

_CPU: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
FAST_BFLOAT16_PRODUCTS = bool(_CPU.get("avx512_bf16")) and not _CPU.get("amx_bf16")
"""Whether this CPU multiplies bfloat16 matrices faster than float32 ones, but not within PyTorch's fused attention.
Read at import, so that compilers see a constant. Releases of PyTorch that do not tell what the CPU has count as no."""

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""`softmax(QKᵀ·scale + bias) V` of queries, keys and values `[batch, heads, tokens, head_dim]`, a finite bias
`[batch, 1, 1, tokens]` or None, and the scale of the scores."""


def kernels_for(x: Tensor, *differentiated: Tensor) -> ModuleType | None:
    """`turbovlm.ops.kernels` where they take `x`; None on other devices, and for exported programs.

    None as well where a gradient is wanted with respect to one of `differentiated`, for kernels that have none.
    """
    if not x.is_cuda or is_exporting() or wants_gradient(*differentiated):
        return None
    from turbovlm.ops import kernels  # imports triton

    return kernels if kernels.usable(x) else None


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with one of `tensors`."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def fastest_attention(q: Tensor, k: Tensor, v: Tensor) -> Attention:
    """The way of attending that is fastest on this device and in this dtype, as `benchmarks/gpu.py` and
    `benchmarks/fidelity.py` measure: a kernel on NVIDIA GPUs in half precision, plain products for bfloat16 on CPUs
    with `FAST_BFLOAT16_PRODUCTS`, elsewhere PyTorch's.
    """
    if wants_gradient(q, k, v):
        return plain.masked_attention
    kernels = kernels_for(q)
    if kernels is not None and kernels.attends(q, k, v):
        return fused_attention
    if FAST_BFLOAT16_PRODUCTS and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not is_exporting():
        return plain.stored_attention
    return plain.masked_attention


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """A kernel that adds the bias to the scores in registers; without a bias, what PyTorch has. Not differentiable."""
    if bias is None:
        return plain.masked_attention(q, k, v, None, scale)
    from turbovlm.ops import kernels

    attended: Tensor = kernels.biased_attention(q, k, v, bias, scale)
    return attended


def attention_rows(guide: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """See `plain.attention_rows`."""
    kernels = kernels_for(keys, keys, guide)
    rows: Tensor = (kernels or plain).attention_rows(guide, keys, bias)
    return rows


def most_similar(features: Tensor, partition: Partition) -> tuple[Tensor, Tensor]:
    """See `plain.most_similar`."""
    kernels = kernels_for(features)
    if kernels is None:
        return plain.most_similar(features, partition)
    candidates = positions(partition.candidates, features.device)
    destinations = positions(partition.destinations, features.device)
    windows = partition.window_slices()
    found = [kernels.most_similar(features, candidates[..., i], destinations[..., j]) for i, j in windows]
    if len(found) == 1:
        return found[0][0], found[0][1]
    indices = [nearest + j.start for (_, nearest), (_, j) in zip(found, windows)]
    return torch.cat([cosines for cosines, _ in found], dim=1), torch.cat(indices, dim=1)


def degree_of_candidates(
    redundancy: Tensor,
    semantic: Tensor | None,
    candidates: Index,
    block: int,
    *,
    degree: str | DegreeFunction,
    alpha: float | None,
    seed: int,
) -> Tensor:
    """`information_degree` of the candidates, with the A of all tokens, `[batch, tokens]`."""
    kernels = kernels_for(redundancy) if degree == "weighted_distance" and semantic is not None else None
    if kernels is None:
        own = None if semantic is None else take_values(semantic, candidates)
        return information_degree(redundancy, own, block, degree=degree, alpha=alpha, seed=seed)
    alpha = default_alpha(degree) if alpha is None else alpha
    e: Tensor = kernels.weighted_distance(redundancy, semantic, positions(candidates, redundancy.device), alpha)
    return e


def choose(degree: Tensor, nearest: Tensor, partition: Partition, r: int) -> tuple[Tensor, Tensor]:
    """See `plain.choose`."""
    kernels = kernels_for(degree)
    if kernels is None or degree.shape[1] > kernels.MOST_RANKED:
        return plain.choose(degree, nearest, partition, r)
    candidates = positions(partition.candidates, degree.device)
    destinations = positions(partition.destinations, degree.device)
    src, dst = kernels.choose(degree.detach(), nearest, candidates, destinations, r)
    return src, dst


def merge_in_one_launch(
    x: Tensor, src: Tensor, dst: Tensor, slots: Tensor | None, sizes: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The merged tokens of `x`, `[batch, N, width]`, and what `plain.merge_books` returns; None without a kernel.

    Args:
        src, dst, slots, reduce: as `plain.merge_books` takes them.
        sizes: patches each token stands for, `[batch, N]`; ones if None.
    """
    kernels = kernels_for(x, x) if reduce == "keep_norm" else kernels_for(x)
    if kernels is None:
        return None
    merged, rows, weights, merged_sizes = kernels.merge_tokens(x, sizes, src, dst, slots, reduce)
    return merged, rows, weights, merged_sizes


def mean_of_bags(x: Tensor, bag: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """See `plain.mean_of_bags`."""
    means: Tensor = (kernels_for(x, x) or plain).mean_of_bags(x, bag, starts, weights)
    return means


def has_bags(x: Tensor) -> bool:
    """Whether `embedding_bag` is there and fast; exporters and some devices lack it."""
    return x.device.type in ("cpu", "cuda") and not is_exporting()
