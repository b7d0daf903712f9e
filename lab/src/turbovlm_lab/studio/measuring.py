"""What a run costs: multiply-accumulates as the model runs, and time, the versions in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.profile.macs import counting
from turbovlm.profile.timing import interleaved

T = TypeVar("T")
ROUNDS, SECONDS = (3, 9), 0.4
"""Rounds of timing at least and at most, and seconds after which no further one begins."""


@dataclass(frozen=True)
class Times:
    """Median seconds per run: of the process's CPU time, all threads, and of the clock's."""

    cpu: float
    wall: float
    runs: int


def counted(run: Callable[[], T]) -> tuple[T, float]:
    """What a run gives, and the 10⁹ multiply-accumulates that it took."""
    with counting() as total:
        made = run()
    return made, total() / 1e9


def timed_in_turn(
    versions: Sequence[Callable[[], object]], rounds: tuple[int, int] = ROUNDS, seconds: float = SECONDS
) -> list[Times]:
    """Time each version once per round, in turn, so that a busy machine slows all alike.

    Args:
        versions: what is timed.
        rounds: at least and at most; `seconds`: after which no further one begins.
    """
    fewest, most = rounds
    cpu, wall = interleaved(versions, torch.device("cpu"), most, 0, lambda _: None, seconds, fewest)
    return [Times(statistics.median(c), statistics.median(w), len(c)) for c, w in zip(cpu, wall)]


def drift_of(merged: Tensor, unmerged: Tensor, mean: Tensor | None = None) -> float:
    """1 − cosine of two tensors of one shape, flattened; with a mean taken off both first, if one is given."""
    if mean is not None:
        merged, unmerged = merged - mean, unmerged - mean
    return 1 - F.cosine_similarity(merged.flatten(), unmerged.flatten(), dim=0).item()
