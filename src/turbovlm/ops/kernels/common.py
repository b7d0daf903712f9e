"""What the kernels share."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from turbovlm.ops.kernels.replay import recording

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What tokens, features and degrees may be for the kernels to take them."""

COUNTS = (
    *("tokens", "queries", "entries", "src_count", "candidate_count", "destination_count", "windows", "behind"),
    *("candidates_stride", "destinations_stride", "slots_stride", "first_candidate", "first_destination", "step"),
    "fewest",
    *("nearest_stride", "redundancy_stride", "bias_image"),
    *("left", "every", "samples"),
)
"""Arguments that change from block to block: no variant of a kernel is compiled for special values of them."""

LEAST_CAPABILITY = (8, 0)
"""Compute capability from which on GPUs multiply bfloat16 and copy to shared memory in the background."""


def usable(x: Tensor) -> bool:
    """Whether the kernels take `x`: Triton is there, `x` on an NVIDIA GPU and of one of `DTYPES`."""
    return HAS_TRITON and x.dtype in DTYPES and x.is_cuda and torch.version.hip is None


def interpreted(x: Tensor) -> bool:
    """Whether kernels on `x` run in Triton's interpreter, which gets matrix products of bfloat16 wrong."""
    return not x.is_cuda


def alignment(*tensors: Tensor) -> int:
    """Elements that every stride but the last is a multiple of, at most 8: what one instruction can load at once.

    Triton sees by itself what is a multiple of 16; heads of 88 channels are 88 apart.
    """
    return math.gcd(8, *(stride for tensor in tensors for stride in tensor.stride()[:-1]))


def operator(function: Callable[..., Any]) -> Any:
    """`function` as an operator `turbovlm::…`, to be called by position; in eager it runs as it is, `.eager`.

    Compilers, autograd, tracers, tensor subclasses and modes that count or fake see the operator, `.operator`. Without
    them its dispatch would only take longer than the launch of a kernel.
    """
    opaque = torch.library.custom_op(f"turbovlm::{function.__name__}", mutates_args=())(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if (
            traced
            or torch.is_grad_enabled()
            or _get_current_dispatch_mode() is not None
            or not all(map(_is_plain, args))
        ):
            return opaque(*args)
        return function(*args)

    call.operator, call.eager = opaque, function  # type: ignore[attr-defined]
    return call


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor or not isinstance(value, Tensor)


class Kernel:
    """A kernel of Triton's, launched as `kernel[grid](…)`; where launches are recorded, it is, too."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        record = recording()
        launch: Callable[..., Any] = self.kernel[grid]
        return launch if record is None else functools.partial(record.launch, self.kernel, grid)


def called(function: Callable[..., Any]) -> Any:
    """`triton.jit`, of what kernels call; the function itself where there is no Triton."""
    return triton.jit(function) if HAS_TRITON else function


def jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit`, of what is launched; the function itself where there is no Triton."""
    return Kernel(triton.jit(kernel, do_not_specialize=COUNTS)) if HAS_TRITON else kernel


def by_image(table: Tensor | None, batch: int) -> tuple[Tensor | None, int]:
    """`table`, `[k]` or `[batch, k]`, each row of it adjacent in memory, and how far apart rows are: 0 if shared."""
    if table is None:
        return None, 0
    table = table.expand(batch, -1)
    table = table if table.stride(1) == 1 else table.contiguous()
    return table, table.stride(0)


Places = tuple[Tensor | None, int, int]
"""Token positions as arguments of a kernel: a table or None, how far apart its rows are, and the first position."""


def places(table: Tensor | None, first: int, batch: int) -> Places:
    """Positions in a table, `[k]` or `[batch, k]`, or those from `first` on."""
    return *by_image(table, batch), first
