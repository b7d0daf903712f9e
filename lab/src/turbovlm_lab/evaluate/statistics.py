"""Means with intervals, alone and in pairs: what a difference between two runs over the same samples is worth."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from turbovlm.errors import ConfigError

DRAWS = 10_000
LEVEL = 0.95
FEW, AT_ONCE = 1_000, 5_000_000
"""Groups whose draws are kept for the next metric; numbers of draws that are in memory together otherwise."""


@dataclass(frozen=True)
class Interval:
    """A value and where 95 % of what it would be on other samples lies: the percentiles of the bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean(scores: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0) -> Interval:
    """The mean of scores.

    Args:
        scores: one per sample.
        groups: samples of one group are drawn together, as questions about one image are; each its own if None.
        seed: of the draws.

    Raises:
        ConfigError: no scores, or not as many groups.
    """
    sums, counts = _grouped(np.asarray([scores], dtype=float), groups)
    total, number = _drawn(np.stack([sums[0], counts]), seed)
    return _interval(float(np.mean(scores)), total / number)


def difference(
    scores: Sequence[float], base: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> Interval:
    """How much higher the mean of `scores` is than that of `base`, over the same samples in the same order.

    Raises:
        ConfigError: not as many of one as of the other; see also `mean`.
    """
    _same_number(scores, base)
    return mean([a - b for a, b in zip(scores, base)], groups, seed)


def kept(
    scores: Sequence[float], base: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> Interval:
    """The mean of `scores` as a share of that of `base`, over the same samples in the same order.

    Raises:
        ConfigError: the mean of `base` is not above 0; see also `difference`.
    """
    _same_number(scores, base)
    if np.mean(base) <= 0:
        raise ConfigError(f"the mean of base is {np.mean(base):g}: a share of it means nothing")
    above, below = _drawn(_grouped(np.asarray([scores, base], dtype=float), groups)[0], seed)
    shares = np.divide(above, below, out=np.full(DRAWS, np.nan), where=below > 0)
    return _interval(float(np.mean(scores) / np.mean(base)), shares)


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of runs with different seeds, and Student's interval; of one run, nothing but its value.

    Raises:
        ConfigError: no values.
    """
    from scipy import stats

    if not values:
        raise ConfigError("no values: there must be one per seed")
    value = float(np.mean(values))
    if len(values) == 1:
        return Interval(value, value, value)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Interval(value, value - reach, value + reach)


def _same_number(scores: Sequence[float], base: Sequence[float]) -> None:
    if len(scores) != len(base):
        raise ConfigError(f"{len(scores)} scores and {len(base)} of base: they must be of the same samples")


def _grouped(scores: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums `[rows, groups]` and counts `[groups]`."""
    samples = scores.shape[1]
    if not samples:
        raise ConfigError("no scores: there must be one per sample")
    if groups is None:
        return scores, np.ones(samples)
    if len(groups) != samples:
        raise ConfigError(f"{len(groups)} groups for {samples} scores: there must be one for each")
    number: dict[Hashable, int] = {}
    index = np.array([number.setdefault(group, len(number)) for group in groups])
    sums = np.stack([np.bincount(index, row, len(number)) for row in scores])
    return sums, np.bincount(index, minlength=len(number)).astype(float)


def _drawn(sums: np.ndarray, seed: int) -> np.ndarray:
    """The sums of all groups in every draw, `[rows, groups]` to `[rows, DRAWS]`.

    Draws of many groups would not fit in memory: they are made and added up some at a time.
    """
    groups = sums.shape[1]
    if groups <= FEW:
        found: np.ndarray = sums @ _draws(groups, seed).T
        return found
    random, chances, some = np.random.default_rng(seed), np.full(groups, 1 / groups), max(1, AT_ONCE // groups)
    sizes = [min(some, DRAWS - start) for start in range(0, DRAWS, some)]
    parts = [sums @ random.multinomial(groups, chances, size).astype(float).T for size in sizes]
    return np.concatenate(parts, axis=1)


@functools.lru_cache(maxsize=4)
def _draws(count: int, seed: int) -> np.ndarray:
    """How often each of `count` is drawn when `count` are, `[DRAWS, count]`."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS).astype(float)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    edge = (1 - LEVEL) / 2
    low, high = np.nanquantile(drawn, [edge, 1 - edge])
    return Interval(value, float(low), float(high))
