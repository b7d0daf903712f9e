"""Which settings, and how many tokens in which block: found by drift alone, at one cost."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turbovlm.calibration.drift import Subject
from turbovlm.config import TurboConfig
from turbovlm.encoder.schedule import EncoderShape, token_counts
from turbovlm.errors import ConfigError

CANDIDATES: tuple[Mapping[str, Any], ...] = (
    {},
    {"alpha": 0.5},
    {"alpha": 2.0},
    {"similarity": "hidden"},
    {"degree": "redundancy"},
    {"degree": "weighted_difference"},
    {"degree": "weighted_difference", "similarity": "keys"},
    {"partition": "alternate"},
    {"reduce": "merge"},
)
"""Settings beside the amounts that are tried, the default first."""
SHAPES: Mapping[str, float] = {"constant": 0.0, "later": 1.0, "earlier": -1.0}
"""Schedules that a search begins with beside the even one: how the share that goes changes from first block to last."""
SUBSET = 1 / 4
"""Of the images that a new schedule is tried on first."""
MOST = 0.5
"""Share of its tokens that a block can give up."""
NEAR = 0.01
"""How far a schedule's share of the multiply-accumulates may be from what was asked for."""

Shares = tuple[float, ...]


@dataclass(frozen=True)
class Encoder:
    """What a schedule is made for.

    Attributes:
        shape: of the encoder; `tokens`: of an image, prefix included.
    """

    shape: EncoderShape
    tokens: int

    def amounts(self, shares: Shares, flops: float) -> tuple[int, ...] | None:
        """Tokens merged per block, in proportion to shares of what there is; None where `flops` cannot be met."""
        low, high = 0.0, MOST / max(max(shares), 1e-9)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._ratio(self._counts(shares, middle)) > flops else (low, middle)
        counts = min((self._counts(shares, scale) for scale in (low, high)), key=lambda c: abs(self._ratio(c) - flops))
        if abs(self._ratio(counts) - flops) > NEAR:
            return None
        return tuple(before - after for before, after in itertools.pairwise(counts))

    def ratio(self, amounts: Sequence[int]) -> float:
        """Share of the multiply-accumulates left."""
        return self._ratio(token_counts(amounts, self.tokens, self.shape.prefix, 0))

    def even(self) -> Shares:
        """Shares that come to about as many tokens in every block."""
        depth = self.shape.depth
        return tuple(1 / (1.4 * depth - block) for block in range(depth))

    def _counts(self, shares: Shares, scale: float) -> tuple[int, ...]:
        counts = [self.tokens]
        for share in shares:
            patches = counts[-1] - self.shape.prefix
            counts.append(counts[-1] - min(round(min(MOST, share * scale) * patches), patches // 2))
        return tuple(counts)

    def _ratio(self, counts: tuple[int, ...]) -> float:
        return self.shape.macs(counts) / self.shape.macs((self.tokens,) * (self.shape.depth + 1))


@dataclass(frozen=True)
class Best:
    """The best so far: the setting with its amounts, their shares, and the drift of each image searched on."""

    config: TurboConfig
    shares: Shares
    drift: Tensor

    @property
    def mean(self) -> float:
        return self.drift.mean().item()


def settings_search(subject: Subject, encoder: Encoder, base: TurboConfig, flops: float, images: Sequence[int]) -> Best:
    """The best of `CANDIDATES` with an even schedule, and of `SHAPES` with the best of them.

    What `base` has that is not the default stays.

    Raises:
        ConfigError: a few tokens are too large a part of the cost to come near to `flops`.
    """
    given = {
        name for name, each in base.__dataclass_fields__.items() if name != "r" and getattr(base, name) != each.default
    }
    depth = encoder.shape.depth
    constant = (1.0,) * depth
    start = encoder.even() if encoder.amounts(encoder.even(), flops) else constant
    best: Best | None = None
    for settings in CANDIDATES:
        if given & set(settings):
            continue
        found = tried(subject, encoder, replace(base, **settings), start, flops, images)
        if found is not None and (best is None or clearly_less(found.drift, best.drift)):
            best = found
    if best is None:
        raise ConfigError(f"flops={flops}: an encoder this small cannot be left within {NEAR:.0%} of it")
    for slope in SHAPES.values():
        shares = tuple(1 + slope * (2 * block / max(depth - 1, 1) - 1) for block in range(depth))
        found = tried(subject, encoder, best.config, shares, flops, images)
        if found is not None and clearly_less(found.drift, best.drift):
            best = found
    return best


def tried(
    subject: Subject, encoder: Encoder, config: TurboConfig, shares: Shares, flops: float, images: Sequence[int]
) -> Best | None:
    """A setting with a schedule of these shares; None where they cannot meet the cost."""
    amounts = encoder.amounts(shares, flops)
    if amounts is None:
        return None
    merged = replace(config, r=amounts, keep=None, flops=None)
    return Best(merged, shares, subject.drift(merged, images))


def schedule_search(
    subject: Subject, encoder: Encoder, best: Best, flops: float, images: Sequence[int], budget: int, seed: int
) -> Best:
    """Moves tokens between blocks at the same cost, as long as it helps.

    A new schedule is tried on some of the images first, drawn anew each time, and on all of them if it is no worse
    there; it is taken if it is clearly better on all of them.

    Args:
        budget: images that may go through the model.
    """
    chance = random.Random(seed)
    count = len(images)
    few = max(1, round(count * SUBSET))
    spent = 0
    while spent < budget:
        shares = _moved(best.shares, chance)
        some = sorted(chance.sample(range(count), few))
        amounts = encoder.amounts(shares, flops)
        spent += few
        if amounts is None or amounts == best.config.r:
            continue
        config = replace(best.config, r=amounts)
        first = subject.drift(config, [images[i] for i in some])
        if first.mean() > best.drift[some].mean():
            continue
        rest = [i for i in range(count) if i not in set(some)]
        drift = torch.empty_like(best.drift)
        drift[some], drift[rest] = first, subject.drift(config, [images[i] for i in rest])
        spent += len(rest)
        if clearly_less(drift, best.drift):
            best = Best(config, shares, drift)
    return best


def clearly_less(drift: Tensor, other: Tensor) -> bool:
    """Whether the mean is less by more than two standard errors of the difference, image by image.

    What is chosen by less is chosen by chance, and does not hold for other images.
    """
    difference = drift - other
    return bool(difference.mean() < -2 * difference.std() / len(difference) ** 0.5)


def _moved(shares: Shares, chance: random.Random) -> Shares:
    """Other shares near these: some of one block's goes to another, or one block's grows, shrinks or ends."""
    new = list(shares)
    here, there = chance.sample(range(len(new)), 2) if len(new) > 1 else (0, 0)
    kind = chance.random()
    if kind < 0.5:
        part = new[here] * chance.uniform(0.1, 0.9)
        new[here] -= part
        new[there] += part
    elif kind < 0.8:
        new[here] = new[here] * math.exp(chance.gauss(0, 0.5)) + 0.02 * max(new)
    elif kind < 0.9:
        new[here] = 0.0
    else:
        new = [share * math.exp(chance.gauss(0, 0.2)) for share in new]
    return tuple(new) if max(new) > 0 else shares
