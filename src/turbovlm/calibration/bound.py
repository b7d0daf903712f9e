"""How far a drift that was seen on some images holds for others, whatever its distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from turbovlm.calibration.result import Calibration
from turbovlm.config import Config
from turbovlm.errors import ConfigError

CERTAINTY = 0.95
"""How sure a bound is to hold for the share of images that it says."""
COVERAGES = (0.95, 0.9, 0.8)
"""Shares of images, of which the largest is taken that there are images enough for."""


FEWEST = 15
"""Images that a bound needs; those of 31 and more hold for 90 %, of 61 and more for 95 %."""


@dataclass(frozen=True)
class Bound:
    """With a probability of `CERTAINTY`, at least `coverage` of as many other images are not above `value`.

    The share is rounded down to whole images.
    """

    value: float
    coverage: float


def upper_bound(values: Sequence[float]) -> Bound:
    """The bound that exchangeable images allow, whatever their distribution is.

    The number of m other images that are not above the k-th smallest of n is distributed as negative hypergeometric.

    Args:
        values: of images that nothing was chosen by.

    Raises:
        ConfigError: they are too few for any of `COVERAGES`.
    """
    ordered = sorted(values)
    for coverage in COVERAGES if len(ordered) >= FEWEST else ():
        rank = _rank(len(ordered), coverage)
        if rank is not None:
            return Bound(ordered[rank - 1], coverage)
    raise ConfigError(f"{len(ordered)} images allow no bound: at least {FEWEST} are needed")


def _rank(count: int, coverage: float) -> int | None:
    """The smallest k such that the k-th smallest of `count` is a bound for as many; None if not even the largest is."""
    wanted, ways = round(100 * coverage) * count // 100, math.comb(2 * count, count)
    for k in range(1, count + 1):
        enough = (math.comb(j + k - 1, j) * math.comb(2 * count - j - k, count - j) for j in range(wanted, count + 1))
        if sum(enough) >= CERTAINTY * ways:
            return k
    return None


def promise_of(
    config: Config, drift: Tensor, flops: float, curve: Iterable[tuple[float, float]], speedup: float | None = None
) -> Calibration:
    """What settings promise.

    Args:
        drift: of images that took no part in the search, `[images]`.
        flops: share of the multiply-accumulates left.
        curve: other shares, and the mean drift there.
    """
    bound, mean = upper_bound(drift.tolist()), drift.mean().item()
    return Calibration(
        config,
        flops=flops,
        drift=mean,
        bound=bound.value,
        coverage=bound.coverage,
        images=len(drift),
        speedup=speedup,
        curve=tuple(sorted({(flops, mean), *curve})),
    )
