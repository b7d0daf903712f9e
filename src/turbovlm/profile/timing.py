"""Interleaved timing of several versions of one model, and the memory that their forwards take."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Forward = Callable[[], object]

CLOCKS = {"cpu": "process CPU time", "cuda": "CUDA events"}
"""What counts as the time of a forward, by device type; wall-clock time on all others."""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved(
    forwards: Sequence[Forward],
    device: torch.device,
    rounds: int,
    warmup: int,
    progress: Callable[[int], object],
    seconds: float = math.inf,
    fewest: int = 1,
) -> tuple[list[list[float]], list[list[float]]]:
    """Run every forward once per round, in turn forwards and backwards, so that a drift of the machine hits all alike.

    Args:
        forwards: what to time.
        device: where they run: its kind decides the clock (`CLOCKS`).
        rounds, warmup: rounds that count, and rounds before them that do not.
        progress: called with 1 after each run.
        seconds: by the wall's clock, after which no further round begins once `fewest` of them count.

    Returns:
        Per forward, its seconds in every round, by the device's clock and by the wall's.
    """
    clock: list[list[float]] = [[] for _ in forwards]
    wall: list[list[float]] = [[] for _ in forwards]
    started = time.perf_counter()
    with _without_garbage_collection():
        for number in range(-warmup, rounds):
            if number >= fewest and time.perf_counter() - started > seconds:
                break
            order = range(len(forwards)) if number % 2 == 0 else reversed(range(len(forwards)))
            for index in order:
                by_clock, by_wall = _seconds(forwards[index], device)
                if number >= 0:
                    clock[index].append(by_clock)
                    wall[index].append(by_wall)
                progress(1)
            gc.collect()
    return clock, wall


def peak_memory(forward: Forward, device: torch.device) -> int | None:
    """The most bytes that `forward` has allocated at once, weights and inputs not counted.

    On the CPU, what PyTorch's profiler reports of its allocator (not the scratch memory inside BLAS libraries); on a
    GPU, the allocator's own peak; None on devices that report neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        forward()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        record.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return _highest_sum(change for _, change in changes)


def _highest_sum(changes: Iterable[int]) -> int:
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


def mark(device: torch.device) -> Any:
    """A moment on the device's clock, for `elapsed`; free of waiting where the device keeps its own time."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
    if device.type == "mps":
        torch.mps.synchronize()
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def elapsed(start: Any, end: Any) -> float:
    """Seconds between two marks, once the device has passed both."""
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3
    return float(end - start)


def _seconds(forward: Forward, device: torch.device) -> tuple[float, float]:
    """One run's seconds by the device's clock and by the wall's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun, start = time.perf_counter(), mark(device)
    forward()
    end = mark(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return elapsed(start, end), time.perf_counter() - begun


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
