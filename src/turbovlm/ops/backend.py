"""Which operators may be used for a tensor: fused ones where its device has them, plain ones elsewhere."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Whether a program is exported, not merely compiled.

    In torch 2.11, unlike 2.13, Dynamo takes `torch.compiler.is_exporting()` for true in all that it compiles, so the
    flag behind it is read. torch 2.6 has neither: there, whatever compiles is treated as if it were exported.
    """
    compiler: Any = torch.compiler
    if hasattr(compiler, "_is_exporting_flag"):
        return bool(compiler._is_exporting_flag)
    return bool(getattr(compiler, "is_exporting", compiler.is_compiling)())


def fused_kernels(x: Tensor) -> ModuleType | None:
    """`turbovlm.ops.kernels` where its Triton kernels take `x`; None on other devices, and for exported programs."""
    if not x.is_cuda or is_exporting():
        return None
    from turbovlm.ops import kernels

    return kernels if kernels.usable(x) else None


def has_bags(x: Tensor) -> bool:
    """Whether `embedding_bag` is there and fast; exporters and some devices lack it."""
    return x.device.type in ("cpu", "cuda") and not is_exporting()


def is_readable(x: Tensor) -> bool:
    """Whether Python may look at the values of `x`: not while a program is traced or a CUDA graph is captured."""
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return x.device.type != "meta" and not captured and not torch.compiler.is_compiling()
