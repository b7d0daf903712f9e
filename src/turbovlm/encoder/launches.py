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

    An event is recorded behind the last block but one, and asked behind the last: a GPU that has passed it when the
    last block was only just launched keeps up with Python, so it waits. Neither copied nor pickled: a copy looks anew.
    """

    def __init__(self) -> None:
        self.forwards, self.waits, self.is_over = 0, 0, False
        self._event: torch.cuda.Event | None = None

    def behind(self, block: int, depth: int, x: Tensor) -> None:
        """Called when the `block`-th of `depth` blocks, counted from 1, was launched and has given `x`."""
        if self.is_over or not x.is_cuda or torch.cuda.is_current_stream_capturing():
            return
        if block == depth - 1:
            self.forwards += 1
            if self.forwards >= FIRST:
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._event.record(torch.cuda.current_stream(x.device))
        elif block == depth and self._event is not None:
            self._look(self._event, x)

    def _look(self, event: torch.cuda.Event, x: Tensor) -> None:
        self._event = None
        if not event.query():  # type: ignore[no-untyped-call]
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
