"""Attention processors hand the bias of sizes to PyTorch's attention as a mask; on a GPU ours is faster with one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from turbovlm.ops import plain
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.tracing import wants_gradient


def biased_attention_on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it, `scaled_dot_product_attention` with a mask that is alike for all queries runs on our kernel.

    On devices without it, in graphs that are compiled, and where gradients are wanted, nothing changes.
    """
    left_alone = torch.compiler.is_compiling() or kernels_for(x, x) is None
    return contextlib.nullcontext() if left_alone else _OnKernel()


def kernels_for(x: Tensor, *differentiated: Tensor) -> ModuleType | None:
    """The kernels, where they take `x` and no gradient is wanted with respect to one of `differentiated`."""
    if path_for(x) is plain or wants_gradient(*differentiated):
        return None
    from turbovlm.ops import kernels

    return kernels


class _OnKernel(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            attended = _attended(*args, **kwargs)
            if attended is not None:
                return attended
        return func(*args, **kwargs)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """By the kernel, or None where it does not take these."""
    kernels = kernels_for(query)
    if kernels is None or attn_mask is None or dropout_p > 0 or is_causal or enable_gqa:
        return None
    shared = attn_mask.ndim == 4 == query.ndim and attn_mask.shape[2] == 1 and attn_mask.dtype.is_floating_point
    if not shared or not kernels.attends(query, key, value):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attended: Tensor = kernels.biased_attention(query, key, value, attn_mask, scale)
    return attended
