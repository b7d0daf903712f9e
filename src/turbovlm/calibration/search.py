"""The search for settings, the same for every subject: by cost, by drift, or by speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turbovlm.calibration.bound import upper_bound
from turbovlm.calibration.drift import clearly_less
from turbovlm.calibration.result import Calibration
from turbovlm.calibration.subject import NEAR, Found, Spread, Subject
from turbovlm.errors import ConfigError

TIMINGS = 6
"""Settings whose speed-up is measured at most; each measurement comes nearer, as time is about linear in the amount."""
FIRST = 4
"""Of every so many samples, one is tried first."""
TOLERANCE = 0.02
"""Share by which a measured speed-up may miss the one asked for: about as much as repeated measurements differ."""


def least_drift(subject: Subject, amount: float, samples: Sequence[int]) -> Found:
    """The settings of least drift at an amount.

    Raises:
        ConfigError: no setting comes near that amount.
    """
    return subject.refined(_best_trial(subject, amount, samples), samples)


def within_drift(subject: Subject, max_drift: float, samples: Sequence[int]) -> Found:
    """The smallest amount whose mean drift is at most `max_drift`, found by walking through the subject's amounts.

    Raises:
        ConfigError: not even the largest amount drifts so little.
    """
    best = _best_trial(subject, subject.start, samples)
    start = subject.amounts.index(subject.start)
    if best.mean > max_drift:
        return _first_within(subject, best, max_drift, subject.amounts[:start][::-1], samples)
    best = _last_within(subject, best, max_drift, subject.amounts[start + 1 :], samples)
    smaller = [amount for amount in subject.amounts if amount < best.amount]
    if not smaller or subject.finer == 1:
        return best
    step = best.amount - smaller[0]
    between = [smaller[0] + step * part / subject.finer for part in range(subject.finer - 1, 0, -1)]
    return _last_within(subject, best, max_drift, [round(amount, 4) for amount in between], samples)


def at_speedup(subject: Subject, speedup: float, samples: Sequence[int]) -> tuple[Found, float]:
    """The settings of least drift at a measured speed-up, and what was measured.

    Raises:
        ConfigError: the speed-up is out of reach.
    """
    first = subject.trials(1 / speedup)[0]
    amount, _ = _timed_amount(subject, speedup, subject.base.changed(**first.settings), first.spread or (), 1 / speedup)
    best = least_drift(subject, amount, samples)
    amount, measured = _timed_amount(subject, speedup, best.config, best.spread, amount)
    return _measured(subject, best.config, best.spread, amount, samples) or best, measured


def calibration_of(subject: Subject, found: Found, samples: Sequence[int], speedup: float | None) -> Calibration:
    """What can be said of settings, measured on samples that took no part in the search."""
    curve = [_measured(subject, found.config, found.spread, amount, samples) for amount in subject.curve]
    points = [(round(subject.cost(point.config), 4), point.mean) for point in curve if point is not None]
    drift, cost = subject.drift(found.config, samples), round(subject.cost(found.config), 4)
    bound, mean = upper_bound(drift.tolist()), drift.mean().item()
    return Calibration(
        subject.finished(found.config),
        flops=cost,
        drift=mean,
        bound=bound.value,
        coverage=bound.coverage,
        images=len(drift),
        speedup=speedup,
        curve=tuple(sorted({(cost, mean), *points})),
    )


def _best_trial(subject: Subject, amount: float, samples: Sequence[int]) -> Found:
    """The best of what a subject tries; what is no better on some of the samples is not tried on all."""
    best: Found | None = None
    some = list(range(0, len(samples), FIRST))
    for trial in subject.trials(amount):
        config = (subject.base if best is None else best.config).changed(**trial.settings)
        spread = trial.spread if trial.spread is not None else () if best is None else best.spread
        merged = subject.configured(config, spread, amount)
        if merged is None:
            continue
        if best is None:
            best = Found(merged, spread, amount, subject.drift(merged, samples))
            continue
        drift = subject.drift_unless_worse(merged, samples, some, best.drift)
        if drift is not None and clearly_less(drift, best.drift):
            best = Found(merged, spread, amount, drift)
    if best is None:
        raise ConfigError(
            f"flops={amount}: no setting comes within {NEAR:.0%} of it: a few tokens are too large a part of the cost"
        )
    return best


def _measured(subject: Subject, config: Any, spread: Spread, amount: float, samples: Sequence[int]) -> Found | None:
    """Settings at an amount and their drift; None where the amount cannot be met."""
    merged = subject.configured(config, spread, amount)
    return None if merged is None else Found(merged, spread, amount, subject.drift(merged, samples))


def _first_within(
    subject: Subject, best: Found, max_drift: float, amounts: Sequence[float], samples: Sequence[int]
) -> Found:
    """The first of ascending amounts that drifts no further than `max_drift`."""
    for amount in amounts:
        found = _measured(subject, best.config, best.spread, amount, samples)
        if found is not None and found.mean <= max_drift:
            return found
        best = found or best
    raise ConfigError(
        f"max_drift={max_drift} is out of reach: with {best.amount:.1%} {subject.unit} the least is {best.mean:.4g}"
    )


def _last_within(
    subject: Subject, best: Found, max_drift: float, amounts: Sequence[float], samples: Sequence[int]
) -> Found:
    """The last of descending amounts before one that drifts further than `max_drift`; `best` if the first one does."""
    for amount in amounts:
        found = _measured(subject, best.config, best.spread, amount, samples)
        if found is None:
            continue
        found = subject.refined(found, samples, len(subject.amounts))
        if found.mean > max_drift:
            break
        best = found
    return best


def _timed_amount(subject: Subject, speedup: float, config: Any, spread: Spread, amount: float) -> tuple[float, float]:
    """The amount whose measured speed-up comes nearest, and that speed-up."""
    least = subject.least(config, spread)
    timed: list[tuple[float, float]] = []
    while len(timed) < TIMINGS:
        amount = min(1.0, max(amount, least))
        merged = subject.configured(config, spread, amount)
        if merged is None:
            raise ConfigError(f"speedup={speedup}: no setting comes within {NEAR:.0%} of {amount:.1%} {subject.unit}")
        measured = subject.speedup(merged)
        timed.append((amount, measured))
        if abs(measured / speedup - 1) < TOLERANCE:
            break
        if amount == least and measured < speedup:
            most = max(faster for _, faster in timed)
            raise ConfigError(f"speedup={speedup} is out of reach: {most:.2f} is the most that was measured")
        amount *= measured / speedup
    return min(timed, key=lambda pair: abs(pair[1] / speedup - 1))
