"""How the program at hand runs: in eager, compiled, exported, captured in a CUDA graph, or recorded by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def is_exporting() -> bool:
    """Whether a program is exported, not merely compiled.

    In torch 2.11, unlike 2.13, Dynamo takes `torch.compiler.is_exporting()` for true in all that it compiles, so the
    flag behind it is read. torch 2.6 has neither: there, whatever compiles is treated as if it were exported.
    """
    compiler: Any = torch.compiler
    if hasattr(compiler, "_is_exporting_flag"):
        return bool(compiler._is_exporting_flag)
    return bool(getattr(compiler, "is_exporting", compiler.is_compiling)())


def is_readable(x: Tensor) -> bool:
    """Whether Python may look at the values of `x`: not while a program is traced or a CUDA graph is captured."""
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return x.device.type != "meta" and not captured and not torch.compiler.is_compiling()


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with one of `tensors`."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def constant_in_graphs(function: Function) -> Function:
    """Let compilers call `function` once and take what it returns for a constant of their graph.

    `torch.compiler.assume_constant_result` sets the same attribute, but imports all of Dynamo first: 900 modules.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
