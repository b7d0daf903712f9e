"""How the program at hand runs: in eager, compiled, exported, captured in a CUDA graph, or recorded by autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def is_exporting() -> bool:
    """Whether a program is exported, by `torch.export` or by tracing (TorchScript, ONNX), not merely compiled.

    In torch 2.11, unlike 2.13, Dynamo takes `torch.compiler.is_exporting()` for true in all that it compiles, so the
    flag behind it is read. torch 2.6 has neither: there, whatever compiles is treated as if it were exported.
    """
    if not torch.compiler.is_compiling():
        return bool(torch._C._is_tracing())
    compiler: Any = torch.compiler
    if hasattr(compiler, "_is_exporting_flag"):
        return bool(compiler._is_exporting_flag)
    return bool(getattr(compiler, "is_exporting", compiler.is_compiling)())


def is_readable(x: Tensor) -> bool:
    """Whether Python may look at the values of `x`: not while a program is traced or a CUDA graph is captured."""
    return (
        x.device.type != "meta" and not is_captured(x) and not torch.compiler.is_compiling() and not is_transformed(x)
    )


def is_captured(x: Tensor) -> bool:
    """Whether what is done with `x` becomes part of a CUDA graph, which Python captures at present."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_exporting_to_onnx() -> bool:
    """Whether the ONNX exporter of TorchScript traces; that of `torch.export` does not."""
    return not torch.compiler.is_compiling() and bool(torch._C._is_tracing()) and torch.onnx.is_in_onnx_export()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Leave dtypes as they are; on the meta device nothing else changes them."""
    has_it = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_it else contextlib.nullcontext()


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Within it, `torch.jit.trace` records nothing: what is made is a constant of the traced program."""
    tracer: Any = torch._C
    state = tracer._get_tracing_state()
    if state is None:  # and within an operator's own function it cannot be set, not even to None
        yield
        return
    tracer._set_tracing_state(None)
    try:
        yield
    finally:
        tracer._set_tracing_state(state)


def is_transformed(x: Tensor) -> bool:
    """Whether `x` stands for something else within a transform of `torch.func`, such as the whole batch of a `vmap`."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def is_recorded(x: Tensor) -> bool:
    """Whether what is done with `x` becomes part of a program, or stands for the same with other tensors."""
    if torch.compiler.is_compiling() or is_transformed(x):
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with one of `tensors`."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def constant_in_graphs(function: Function) -> Function:
    """Let compilers call `function` once and take what it returns for a constant of their graph.

    `torch.compiler.assume_constant_result` sets the same attribute, but imports all of Dynamo first: 900 modules.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
