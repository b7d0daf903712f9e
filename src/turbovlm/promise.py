"""What calibrated settings promise for images that they were not found on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Promise:
    """Measured on images that took no part in the search.

    Attributes:
        flops: share of the encoder's multiply-accumulates left.
        drift: the mean over the images; 1 − cosine of what the model hands on to its own.
        bound: with a probability of 95 %, at least `coverage` of as many other images like these drift no further.
        images: how many it was measured on.
        speedup: times faster, where that was asked for: measured.
        curve: shares of multiply-accumulates, each with its mean drift, of the same settings at other costs, by numbers
            and not by thresholds.
    """

    flops: float
    drift: float
    bound: float
    coverage: float
    images: int
    speedup: float | None
    curve: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Promise:
        """From what JSON has of one."""
        return cls(**{**plain, "curve": tuple((share, drift) for share, drift in plain["curve"])})
