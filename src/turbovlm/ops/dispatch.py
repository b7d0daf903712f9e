"""The one place that decides what runs: Triton's kernels on NVIDIA GPUs, NumPy beside PyTorch on CPUs, or PyTorch."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from turbovlm.ops import host, plain
from turbovlm.ops.tracing import is_exporting, is_recorded


def path_for(x: Tensor) -> ModuleType:
    """`turbovlm.ops.fused`, `host` or `plain`, which have the same functions.

    `fused` where kernels take `x`; `host` on CPUs; `plain` on other devices, for subclasses of tensors, and in programs
    that are compiled, exported, traced or transformed, which must see PyTorch's operators.

    Who runs several of the functions asks once, and passes the answer on.
    """
    if is_exporting():
        return plain
    if x.is_cuda:
        from turbovlm.ops import fused  # imports triton

        return fused if fused.usable(x) else plain
    on_host = x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not is_recorded(x)
    return host if on_host else plain
