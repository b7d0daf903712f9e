"""How far a drift that was seen on some images holds for others, whatever its distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from turbovlm.errors import ConfigError
from turbovlm.promise import Promise

CERTAINTY = 0.95
"""How sure a bound is to cover the share of images that it says."""
COVERAGES = (0.95, 0.9, 0.8)
"""Shares of images, of which the largest is taken that there are images enough for."""


@dataclass(frozen=True)
class Bound:
    """A tolerance limit: with a probability of `CERTAINTY`, at least `coverage` of all images are not above `value`."""

    value: float
    coverage: float


def upper_bound(values: Sequence[float]) -> Bound:
    """The bound that independent images of one distribution allow (Wilks, 1941).

    Args:
        values: of images that nothing was chosen by.

    Raises:
        ConfigError: they are too few for any of `COVERAGES`.
    """
    ordered = sorted(values)
    for coverage in COVERAGES:
        rank = _rank(len(ordered), coverage)
        if rank is not None:
            return Bound(ordered[rank - 1], coverage)
    raise ConfigError(f"{len(ordered)} images allow no bound: at least {fewest()} are needed")


def fewest() -> int:
    """Images that the smallest of `COVERAGES` needs."""
    return next(count for count in range(1, 1000) if _rank(count, COVERAGES[-1]) is not None)


def _rank(count: int, coverage: float) -> int | None:
    """The smallest k such that the k-th smallest of `count` values is a bound; None if not even the largest is."""
    below = 0.0
    for k in range(1, count + 1):
        below += math.comb(count, k - 1) * coverage ** (k - 1) * (1 - coverage) ** (count - k + 1)
        if below >= CERTAINTY:
            return k
    return None


def promise_of(
    drift: Tensor, flops: float, curve: Iterable[tuple[float, float]], speedup: float | None = None
) -> Promise:
    """What settings promise.

    Args:
        drift: of images that took no part in the search, `[images]`.
        flops: share of the multiply-accumulates left.
        curve: other shares, and the mean drift there.
    """
    bound, mean = upper_bound(drift.tolist()), drift.mean().item()
    return Promise(
        flops=flops,
        drift=mean,
        bound=bound.value,
        coverage=bound.coverage,
        images=len(drift),
        speedup=speedup,
        curve=tuple(sorted({(flops, mean), *curve})),
    )
