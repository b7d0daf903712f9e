"""The search for settings, the same for every subject: by cost, by drift, or by speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from turbovlm.calibration.bound import upper_bound
from turbovlm.calibration.drift import clearly_less
from turbovlm.calibration.result import Calibration
from turbovlm.calibration.subject import NEAR, Found, Spread, Subject
from turbovlm.errors import ConfigError

ROUNDS, FEW_ROUNDS = 7, 3
"""Rounds of which the median is a measured speed-up: that of what is found, and those by which spreads are compared."""
TIMINGS = 6
"""Times that a speed-up is measured at most for one spread; each measurement comes nearer."""
FIRST = 4
"""Of every so many samples, one is tried first."""
TOLERANCE = 0.02
"""Share by which a measured speed-up may miss the one asked for: about as much as repeated measurements differ."""


@dataclass(frozen=True)
class Asked:
    """Settings to try: how a loss is spread, and how much is left of it, in the subject's unit."""

    config: Any
    spread: Spread
    amount: float


@dataclass(frozen=True)
class Timed:
    """An amount, and the speed-up measured there."""

    amount: float
    speedup: float


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

    Every spread that the subject tries is timed first, and merges as much as makes it that much faster: one with few
    merges saves more time for the same multiply-accumulates, and so need not lose as many tokens. What follows is tried
    at the amount of the best.

    Raises:
        ConfigError: the speed-up is out of reach.
    """
    trials = subject.trials(1 / speedup)
    spreads = [trial for trial in trials if trial.spread is not None] or trials[:1]
    wanted = [Asked(subject.base.changed(**trial.settings), trial.spread or (), 1 / speedup) for trial in spreads]
    best: Found | None = None
    for asked, timed in zip(wanted, _timed(subject, speedup, wanted, FEW_ROUNDS)):
        if timed is not None:
            best = _better(subject, best, replace(asked, amount=timed.amount), samples)
    assert best is not None, "what was timed was configured"
    for trial in trials:
        if trial not in spreads:
            config = best.config.changed(**trial.settings)
            best = _better(subject, best, Asked(config, best.spread, best.amount), samples) or best
    best = subject.refined(best, samples, as_fast=True)
    (timed,) = _timed(subject, speedup, [Asked(best.config, best.spread, best.amount)], ROUNDS)
    assert timed is not None, "a spread alone is reached, or refused"
    return _measured(subject, best.config, best.spread, timed.amount, samples) or best, timed.speedup


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
        measured_on=None if speedup is None else subject.timed_on,
        curve=tuple(sorted({(cost, mean), *points})),
    )


def _best_trial(subject: Subject, amount: float, samples: Sequence[int]) -> Found:
    """The best of what a subject tries at an amount."""
    best: Found | None = None
    for trial in subject.trials(amount):
        config = (subject.base if best is None else best.config).changed(**trial.settings)
        spread = trial.spread if trial.spread is not None else () if best is None else best.spread
        best = _better(subject, best, Asked(config, spread, amount), samples)
    if best is None:
        raise ConfigError(
            f"flops={amount}: no setting comes within {NEAR:.0%} of it: a few tokens are too large a part of the cost"
        )
    return best


def _better(subject: Subject, best: Found | None, asked: Asked, samples: Sequence[int]) -> Found | None:
    """What is asked for where it is clearly better than the best so far, or there is none; else that.

    What is no better on some of the samples is not tried on all.
    """
    merged = subject.configured(asked.config, asked.spread, asked.amount)
    if merged is None:
        return best
    if best is None:
        return Found(merged, asked.spread, asked.amount, subject.drift(merged, samples))
    drift = subject.drift_unless_worse(merged, samples, range(0, len(samples), FIRST), best.drift)
    if drift is None or not clearly_less(drift, best.drift):
        return best
    return Found(merged, asked.spread, asked.amount, drift)


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


def _timed(subject: Subject, speedup: float, wanted: Sequence[Asked], rounds: int) -> list[Timed | None]:
    """The amounts at which settings come nearest to a speed-up; None for those that do not reach it.

    All are timed together, and again those that are not near yet: most are after two or three rounds, as what a forward
    takes is about the multiply-accumulates left and a constant of its merges.

    Raises:
        ConfigError: the speed-up is out of reach for all of them.
    """
    seen: list[list[Timed]] = [[] for _ in wanted]
    missed: set[int] = set()
    least = [subject.least(asked.config, asked.spread) for asked in wanted]
    amounts = {place: _between(least[place], asked.amount) for place, asked in enumerate(wanted)}
    for _ in range(TIMINGS):
        configs = {p: subject.configured(wanted[p].config, wanted[p].spread, amount) for p, amount in amounts.items()}
        missed |= {place for place, config in configs.items() if config is None}
        timing = {place: config for place, config in configs.items() if config is not None}
        if not timing:
            break
        measured = dict(zip(timing, subject.speedups([*timing.values()], rounds)))
        following = {}
        for place, faster in measured.items():
            amount = amounts[place]
            seen[place].append(Timed(amount, faster))
            if abs(faster / speedup - 1) < TOLERANCE:
                continue
            following[place] = _between(least[place], amount + 1 / speedup - 1 / faster)
            if following[place] == amount and faster < speedup:
                missed.add(place)
                del following[place]
        amounts = following
    if len(missed) == len(wanted):
        most = max((timed.speedup for each in seen for timed in each), default=None)
        if most is None:
            raise ConfigError(
                f"speedup={speedup}: no setting comes within {NEAR:.0%} of {wanted[0].amount:.1%} {subject.unit}"
            )
        raise ConfigError(f"speedup={speedup} is out of reach: {most:.2f} is the most that was measured")
    nearest = [min(each, key=lambda timed: abs(timed.speedup / speedup - 1), default=None) for each in seen]
    short = {place for place, timed in enumerate(nearest) if timed and timed.speedup / speedup < 1 - 2 * TOLERANCE}
    if len(missed | short) < len(wanted):  # what is slower than the others would merge less than they, and drift less
        missed |= short
    return [None if place in missed else timed for place, timed in enumerate(nearest)]


def _between(least: float, amount: float) -> float:
    return min(1.0, max(amount, least))
