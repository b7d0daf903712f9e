"""A bound of a drift that was seen on some samples, images or prompts, for others, whatever its distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from turbovlm.errors import ConfigError

CERTAINTY = 0.95
"""Probability with which a bound holds for the share of samples that it names: the usual one."""
COVERAGES = (0.95, 0.9, 0.8)
"""Shares of samples that a bound may hold for; the largest is taken that there are samples enough for."""
FEWEST = 15
"""Samples that a bound of the smallest coverage needs; with 31 it holds for 90 %, with 61 for 95 %. It follows from the
two above."""


@dataclass(frozen=True)
class Bound:
    """With a probability of `CERTAINTY`, at least `coverage` of as many other samples are not above `value`.

    The share is rounded down to whole samples.
    """

    value: float
    coverage: float


def upper_bound(values: Sequence[float]) -> Bound:
    """The bound that exchangeable samples allow, whatever their distribution is.

    The number of m other samples that are not above the k-th smallest of n is distributed as negative hypergeometric.

    Args:
        values: of samples that nothing was chosen by.

    Raises:
        ConfigError: they are too few for any of `COVERAGES`.
    """
    ordered = sorted(values)
    for coverage in COVERAGES if len(ordered) >= FEWEST else ():
        rank = _rank(len(ordered), coverage)
        if rank is not None:
            return Bound(ordered[rank - 1], coverage)
    raise ConfigError(f"{len(ordered)} values allow no bound: at least {FEWEST} are needed")


def _rank(count: int, coverage: float) -> int | None:
    """The smallest k such that the k-th smallest of `count` is a bound for as many; None if not even the largest is."""
    wanted, ways = round(100 * coverage) * count // 100, math.comb(2 * count, count)
    for k in range(1, count + 1):
        enough = (math.comb(j + k - 1, j) * math.comb(2 * count - j - k, count - j) for j in range(wanted, count + 1))
        if sum(enough) >= CERTAINTY * ways:
            return k
    return None
