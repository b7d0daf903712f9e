"""Triton's host side without a GPU: arguments are bound, variants compiled and looked up, and nothing is launched."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from turbovlm.ops.kernels import attention, similarity


class Absent:
    """Stands for Triton's driver of a GPU of compute capability 9.0 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def unlaunched() -> Iterator[Counter[str]]:
    """Within it, kernels take tensors on the CPU, and compute nothing; how often each would have been launched."""
    launches: Counter[str] = Counter()
    before, run, launcher_before = driver._active, JITFunction.run, CompiledKernel.__getitem__
    interpreted = attention.interpreted, similarity.interpreted

    def bound(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launches[self.fn.__name__] += 1
        return run(self, *args, grid=grid, warmup=True, **options)

    def launcher(self: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            driver.active.get_current_stream(driver.active.get_current_device())
            launches[self.name] += 1

        return launch

    driver.set_active(Absent())
    JITFunction.run, CompiledKernel.__getitem__ = bound, launcher
    attention.interpreted = similarity.interpreted = lambda x: False
    try:
        yield launches
    finally:
        JITFunction.run, CompiledKernel.__getitem__ = run, launcher_before
        attention.interpreted, similarity.interpreted = interpreted
        driver._active = before  # None where none was asked for; `reset_active` would look for a GPU
