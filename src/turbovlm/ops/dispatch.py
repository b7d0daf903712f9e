"""The one place that decides what runs: Triton's kernels on NVIDIA GPUs, NumPy beside PyTorch on CPUs, or PyTorch."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from turbovlm.ops import plain
from turbovlm.ops.tracing import is_exporting, is_recorded

HAS_NUMPY = find_spec("numpy") is not None


def path_for(x: Tensor) -> ModuleType:
    """`turbovlm.ops.fused`, `host` or `plain`, which have the same functions.

    `fused` where kernels take `x`; `host` on CPUs, where NumPy is installed; `plain` on other devices, for subclasses
    of tensors, and in programs that are compiled, exported, traced or transformed, which must see PyTorch's operators.

    Who runs several of the functions asks once, and passes the answer on.
    """
    if is_exporting():
        return plain
    if x.is_cuda:
        from turbovlm.ops import fused  # imports triton

        return fused if fused.usable(x) else plain
    on_host = HAS_NUMPY and x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)
    if not on_host or is_recorded(x):
        return plain
    from turbovlm.ops import host  # imports numpy

    return host


def path_told(device: torch.device, dtype: torch.dtype) -> str:
    """What `path_for` gives tensors of that device and dtype in eager mode, and where it is not the fastest, why."""
    if device.type == "cpu":
        return "PyTorch and NumPy" if HAS_NUMPY else "PyTorch; index work is faster where numpy is installed"
    if device.type != "cuda":
        return f"PyTorch: there are no kernels for {device.type}"
    from turbovlm.ops import kernels

    if torch.version.hip is not None:
        return "PyTorch: the kernels are tested on NVIDIA's GPUs alone"
    if not kernels.HAS_TRITON:
        return "PyTorch: the kernels need triton, which is not installed"
    if dtype not in kernels.DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in kernels.DTYPES)
        return f"PyTorch: the kernels take {names}"
    if dtype == torch.float32:
        return "Triton's kernels, but for attention in proportion to sizes, which has one in half precision"
    if torch.cuda.get_device_capability(device) < kernels.LEAST_CAPABILITY:
        return "Triton's kernels, but for attention in proportion to sizes, which needs compute capability 8.0"
    return "Triton's kernels"
