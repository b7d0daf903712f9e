"""What a part of the GPU benchmark is, and how one cell of its table is measured."""

from __future__ import annotations

import gc
import hashlib
import statistics
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import turbovlm
from turbovlm.profile.timing import interleaved

Cell = dict[str, Any]
"""What was measured of one version; or `{"failed": reason}`; or `{"not_here": reason}` for what this device has not."""
Cells = Generator[tuple[str, Cell], None, None]
"""Cells by their keys, each as soon as it is measured."""

NOT_ON_CPU: Cell = {"not_here": "not on cpu"}
WARMUP = 3


@dataclass(frozen=True)
class Bench:
    """How everything is measured.

    Attributes:
        device: `"cuda"` or `"cpu"`.
        rounds: how often each version is timed, in turn with what it is compared with.
        small: tiny models and shapes, to see that the benchmark runs.
    """

    device: str
    rounds: int
    small: bool


@dataclass(frozen=True)
class Part:
    """A few minutes of work.

    Attributes:
        name: levels with slashes between, such as `"vit-l-384/bf16/graph/64"`.
        cells: keys of what it measures: the name, and one level more.
        measure: measures some of these cells.
    """

    name: str
    cells: tuple[str, ...]
    measure: Callable[[Bench, Sequence[str]], Cells]


def part(name: str, cells: Sequence[str], measure: Callable[[Bench, Sequence[str]], Cells]) -> Part:
    """A part whose cells' names lack their first levels."""
    return Part(name, tuple(f"{name}/{cell}" for cell in cells), measure)


def last(key: str) -> str:
    """The last level of a cell's key."""
    return key.rpartition("/")[2]


def attempt(measure: Callable[[], Cell]) -> Cell:
    """The cell; where it cannot be measured, one that says why, so that the others go on."""
    try:
        return measure()
    except Exception as error:
        return {"failed": reason(error)}


def reason(error: Exception) -> str:
    """What went wrong in one line, for the table; the traceback goes to stderr."""
    traceback.print_exception(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def timed(bench: Bench, base: Callable[[], object], own: Callable[[], object]) -> Cell:
    """Milliseconds of both in turn, medians, without gradients: `ms`, and `base_ms` of what it is compared with."""
    with torch.inference_mode():
        clock, _ = interleaved([base, own], torch.device(bench.device), bench.rounds, WARMUP, lambda _: None)
    base_ms, ms = (1e3 * statistics.median(samples) for samples in clock)
    return {"ms": ms, "base_ms": base_ms}


def stamp() -> Cell:
    """When a cell was measured, and of which code."""
    return {"date": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"), "code": code()}


def code() -> str:
    """Eight digits that change with the library's source."""
    root = Path(turbovlm.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def free(bench: Bench) -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()
