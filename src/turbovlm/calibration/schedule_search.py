"""How many tokens to merge in which block of an encoder: found by drift alone, at one cost."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from turbovlm.calibration.drift import clearly_less
from turbovlm.calibration.subject import NEAR, Found, Spread, Subject
from turbovlm.encoder.schedule import EncoderShape, token_counts

MOST = 0.5
"""Share of its tokens that a block can give up: every candidate has one partner (Turbo, §3.3)."""
SUBSET = 1 / 4
"""Share of the samples that a new schedule is tried on first."""
HALVINGS = 40
"""Halvings of the interval in which a spread's scale is sought: far below the scale that moves one token."""


@dataclass(frozen=True)
class EncoderCost:
    """What amounts per block cost in an encoder.

    Attributes:
        shape: the encoder's; `tokens`: of an image, prefix and suffix included.
        others: of the images of other sizes, each number with how many images have it; a share is over all of them.
        images: how many have `tokens`.
    """

    shape: EncoderShape
    tokens: int
    others: tuple[tuple[int, int], ...] = ()
    images: int = 1

    def amounts(self, spread: Spread, flops: float) -> tuple[int, ...] | None:
        """Tokens merged per block, each block's share of its tokens in proportion to `spread`.

        None where no whole numbers of tokens leave nearly the share `flops` of the multiply-accumulates.
        """
        low, high = 0.0, MOST / max(max(spread), 1e-9)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._share(self._counts(spread, middle)) > flops else (low, middle)
        counts = min((self._counts(spread, scale) for scale in (low, high)), key=lambda c: abs(self._share(c) - flops))
        if abs(self._share(counts) - flops) > NEAR:
            return None
        return tuple(before - after for before, after in itertools.pairwise(counts))

    def share(self, amounts: Sequence[int]) -> float:
        """Share of the multiply-accumulates that amounts per block leave."""
        return self._share(self._left(amounts, self.tokens))

    def least(self, spread: Spread) -> float:
        """The smallest share that a spread can leave."""
        return self._share(self._counts(spread, MOST / max(max(spread), 1e-9)))

    def _counts(self, spread: Spread, scale: float) -> tuple[int, ...]:
        counts = [self.tokens]
        for share in spread:
            patches = counts[-1] - self.shape.protected
            counts.append(counts[-1] - min(round(min(MOST, share * scale) * patches), patches // 2))
        return tuple(counts)

    def _share(self, counts: tuple[int, ...]) -> float:
        """Of the images of `tokens` by their counts; of the others by the same amounts."""
        amounts = [before - after for before, after in itertools.pairwise(counts)]
        sizes = [(self.images, counts), *((images, self._left(amounts, tokens)) for tokens, images in self.others)]
        left = sum(images * self.shape.macs(each) for images, each in sizes)
        return left / sum(images * self.shape.macs((each[0],) * len(each)) for images, each in sizes)

    def _left(self, amounts: Sequence[int], tokens: int) -> tuple[int, ...]:
        return token_counts(amounts, tokens, self.shape.protected, 0)


def schedule_search(
    subject: Subject,
    cost: EncoderCost,
    best: Found,
    samples: Sequence[int],
    budget: int,
    seed: int,
    as_fast: bool = False,
) -> Found:
    """Move tokens between blocks at the same cost, as long as it helps.

    A new schedule is tried on some of the samples first, drawn anew each time, and on all of them if it is no worse
    there; it is taken if it is clearly better on all of them.

    Args:
        budget: samples that may go through the model.
        as_fast: move tokens only between blocks that merge, so that there are no more merges than before.
    """
    chance = random.Random(seed)
    count = len(samples)
    few = max(1, round(count * SUBSET))
    spent = 0
    while spent < budget:
        merging = [block for block, share in enumerate(best.spread) if share > 0 or not as_fast]
        spread = _moved_spread(best.spread, merging, chance)
        some = sorted(chance.sample(range(count), few))
        amounts = cost.amounts(spread, best.amount)
        spent += few
        if amounts is None or amounts == best.config.r:
            continue
        config = replace(best.config, r=amounts)
        drift = subject.drift_unless_worse(config, samples, some, best.drift)
        if drift is None:
            continue
        spent += count - few
        if clearly_less(drift, best.drift):
            best = Found(config, spread, best.amount, drift)
    return best


def _moved_spread(spread: Spread, blocks: Sequence[int], chance: random.Random) -> Spread:
    """Another spread near this one: some of one block's goes to another, or one block's grows, shrinks or ends.

    Args:
        blocks: those whose share may change.
    """
    new = list(spread)
    here, there = chance.sample(blocks, 2) if len(blocks) > 1 else (blocks[0], blocks[0])
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
    return tuple(new) if max(new) > 0 else spread
