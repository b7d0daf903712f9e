"""Whether a GPU waits for Python, which merging makes no faster: it makes tensors smaller, not launches fewer."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

FIRST = 3
"""The forward that is looked at first: in those before, kernels are compiled and algorithms are chosen."""

IN_A_ROW = 3
"""Forwards that must all have kept the GPU waiting: in one alone, Python may have been busy with something else."""


class LaunchWatch:
    """Looks at a few eager forwards of an encoder on a GPU, and warns once if Python was behind in all of them.

    An event is recorded behind the middle block, and asked at the end: a GPU that has long passed it when the last
    block was only just launched had nothing to do in between. Neither copied nor pickled: a copy looks anew.
    """

    def __init__(self) -> None:
        self.forwards, self.waits, self.is_over = 0, 0, False
        self._middle: torch.cuda.Event | None = None

    def behind(self, block: int, depth: int, x: Tensor) -> None:
        """Called when the `block`-th of `depth` blocks, counted from 1, was launched and has given `x`."""
        if self.is_over or not x.is_cuda or torch.cuda.is_current_stream_capturing():
            return
        self.forwards += block == 1
        if self.forwards < FIRST:
            return
        if block == depth // 2:
            self._middle = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._middle.record(torch.cuda.current_stream(x.device))
        elif block == depth and self._middle is not None:
            self._look(self._middle, x)

    def _look(self, middle: torch.cuda.Event, x: Tensor) -> None:
        self._middle = None
        if not middle.query():  # type: ignore[no-untyped-call]
            self.is_over = True
            return
        self.waits += 1
        if self.waits < IN_A_ROW:
            return
        self.is_over = True
        warnings.warn(
            f"{x.device} waits for Python to launch kernels (a batch of {x.shape[0]} in eager mode), so merging cannot "
            "make this encoder faster, and may make it slower: use torch.compile(model, mode='reduce-overhead') or a "
            "CUDA graph, or larger batches",
            stacklevel=2,
        )

    def __deepcopy__(self, memo: dict[int, object]) -> LaunchWatch:
        return LaunchWatch()

    def __reduce__(self) -> tuple[type[LaunchWatch], tuple[()]]:
        return LaunchWatch, ()
