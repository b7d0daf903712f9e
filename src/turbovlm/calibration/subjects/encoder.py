"""Encoders as a subject: which tokens are merged, and how many in which block."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from turbovlm.apply import apply
from turbovlm.calibration.drift import Part
from turbovlm.calibration.outputs import Measure, count_images, default_measure, measured_parts, select_images, sizes_of
from turbovlm.calibration.schedule_search import EncoderCost, schedule_search
from turbovlm.calibration.speed import device_in_words, measure_speedups
from turbovlm.calibration.subject import Found, Spread, Subject, Trial
from turbovlm.config import AMOUNTS, TurboConfig
from turbovlm.encoder.schedule import requested_amounts, token_counts
from turbovlm.errors import ConfigError
from turbovlm.ops.degree import default_alpha

SETTINGS: tuple[Mapping[str, Any], ...] = (
    {"alpha": 0.5},
    {"alpha": 2.0},
    {"alpha": 4.0},
    {"similarity": "hidden"},
    {"degree": "redundancy"},
    {"degree": "weighted_difference", "alpha": 10.0},
    {"degree": "weighted_difference", "alpha": 100.0},
    {"reduce": "merge"},
)
"""Changes of the given settings that are tried, each for itself."""
VARIED = ("alpha", "similarity", "degree", "reduce")
"""Fields that `SETTINGS` changes."""
SCHEDULES: tuple[tuple[float, float, int], ...] = (
    (0, 1, 2),
    (1 / 3, 2 / 3, 1),
    (1 / 4, 2 / 3, 1),
    (1 / 6, 1, 1),
    (1 / 4, 1, 1),
)
"""Blocks that are tried beside the default's and all of them: from and up to these shares of the depth, every n-th."""
STEP = 0.05
"""Step of the walk through costs for `max_drift`: each has a schedule search of its own, so that they are few."""


@dataclass(eq=False)
class EncoderSubject(Subject):
    """A model with vision encoders, and images; an amount is a share of the encoder's multiply-accumulates.

    Attributes:
        measure: what is compared; the family's if None.
        batch: images in a forward.
        effort: how often the images go through the model in the search for a schedule.
        encoder: what amounts per block cost.

    Raises:
        ConfigError: encoders of several depths, or one that the measure does not run.
        UnsupportedModelError: nothing in the model can be accelerated.
    """

    measure: Measure | None = None
    batch: int = 16
    effort: int = 8
    encoder: EncoderCost = field(init=False)

    about = "a model with vision encoders, and images: a tensor, or tensors by name, or a list of several sizes"
    noun = "images"
    config, whole = TurboConfig, 0
    found = (*AMOUNTS, "blocks", "min_tokens", "thresholds", "grid")
    options = ("measure", "per_image", "effort", "batch")
    amounts = tuple(round(1 - STEP * step, 4) for step in range(1, 20))
    start, finer = amounts[0], 4
    curve = (0.85, 0.7, 0.55, 0.4)

    def __post_init__(self) -> None:
        self._measured = self.measure or default_measure(self.model)
        self._sizes = sizes_of(self.samples)
        with apply(self.model, self._default(keep=0.5)) as handle:
            features: Any = handle.features
            self._own = features[0].own_blocks
            self._halves = "random" if self.base.partition == "auto" else self.base.partition
            # which "auto" makes hang on the blocks that merge, and those are what is searched
            self.base = self.base.changed(partition=features[0].partition)
        super().__post_init__()
        tokens: dict[int, int] = {}
        with apply(self.model, replace(self.base, r=1, dense=True)) as handle:
            features = handle.features
            depths = {feature.shape.depth for feature in features}
            if len(depths) > 1:
                raise ConfigError(f"the model's encoders have {sorted(depths)} blocks: calibrate one of them at a time")
            for places in self._sizes.values():
                self.run(places[:1], 1)
                source = None if features[0].last is None else features[0].last.source()
                if source is None:
                    raise ConfigError("measure: the model's vision encoder has not run")
                tokens[source.shape[1]] = tokens.get(source.shape[1], 0) + len(places)
        (first, images), *others = tokens.items()
        self.encoder = EncoderCost(features[0].shape, first, tuple(others), images)
        self.flat = (1.0,) * self.encoder.shape.depth

    @staticmethod
    def count_samples(samples: Any) -> int:
        return count_images(samples)

    def outputs(self, config: TurboConfig | None, samples: Sequence[int]) -> Sequence[Part]:
        if config is None:
            return self.run(samples, self.batch)
        with apply(self.model, replace(config, dense=True)):
            return self.run(samples, 1 if config.thresholds else self.batch)

    def run(self, samples: Sequence[int], batch: int) -> Sequence[Part]:
        """What the model, as it is now, gives: per part `[len(samples), tokens, width]`, or one each of a list."""
        if len(self._sizes) == 1:
            return self._run(samples, batch)
        found: dict[int, list[Tensor]] = {}
        for places in self._sizes.values():
            some = sorted({*samples} & {*places})
            if some:
                parts = self._run(some, batch)
                found |= {index: [part[i] for part in parts] for i, index in enumerate(some)}
        return [list(part) for part in zip(*(found[index] for index in samples))]

    @torch.inference_mode()
    def _run(self, samples: Sequence[int], batch: int) -> list[Tensor]:
        """Of images of one size."""
        seen = []
        for start in range(0, len(samples), batch):
            chunk = samples[start : start + batch]
            seen.append(measured_parts(self._measured, self.model, select_images(self.samples, chunk)))
            self.progress(len(chunk))
        return [torch.cat(parts) for parts in zip(*seen)]

    def cost(self, config: TurboConfig) -> float:
        assert isinstance(config.r, tuple)
        return self._cost_with(config).share(config.r)

    def _cost_with(self, config: TurboConfig) -> EncoderCost:
        """The encoder's cost, with what it takes to compare whom these settings compare."""
        return replace(self.encoder, shape=replace(self.encoder.shape, partition=config.partition))

    def speedups(self, configs: Sequence[TurboConfig], rounds: int) -> list[float]:
        """Measured on one batch of images, of the size of most of them."""
        images = select_images(self.samples, self._timed)
        versions = [(config,) for config in configs]
        return measure_speedups(self.model, versions, lambda model: self._measured(model, images), rounds)

    @property
    def timed_on(self) -> str:
        count = len(self._timed)
        return f"a batch of {count} image{'' if count == 1 else 's'} on {device_in_words(self.model)}"

    @property
    def _timed(self) -> Sequence[int]:
        return next(iter(self._sizes.values()))[: self.batch]

    def trials(self, amount: float) -> list[Trial]:
        """The default's blocks, every block, each of `SCHEDULES`; then each of `SETTINGS` with the best of these."""
        depth = self.encoder.shape.depth
        default = {"partition": self.base.partition}
        schedules = [Trial(default, self._spread(amount, "auto"))]
        if self._halves != self.base.partition:
            schedules.append(Trial({"partition": self._halves}, self._spread(amount, "every")))
        sets = {tuple(range(round(first * depth), round(last * depth), step)) for first, last, step in SCHEDULES}
        for blocks in sorted(sets - {()}):
            schedules.append(Trial(default, self._spread(amount, blocks)))
        distinct = [trial for place, trial in enumerate(schedules) if trial not in schedules[:place]]
        given = {name: getattr(self.base, name) for name in VARIED}
        return distinct + [Trial({**given, **change}) for change in SETTINGS if not self.fixed & set(change)]

    def _spread(self, amount: float, blocks: str | tuple[int, ...]) -> Spread:
        """Equally many tokens in each of these blocks; that of equal weights where they have nothing to give."""
        shape, tokens = self.encoder.shape, self.encoder.tokens
        amounts = requested_amounts(self._default(flops=amount, blocks=blocks), shape, tokens, self._own)
        counts = token_counts(amounts, tokens, shape.protected, 0)
        shares = [(before - after) / max(before - shape.protected, 1) for before, after in itertools.pairwise(counts)]
        return tuple(shares) if any(shares) else self.flat

    def _default(self, **amount: Any) -> TurboConfig:
        config: TurboConfig = self.base.changed(r=None, **amount)
        return config

    def configured(self, config: TurboConfig, spread: Spread, amount: float) -> TurboConfig | None:
        amounts = self._cost_with(config).amounts(spread, amount)
        return None if amounts is None else replace(config, r=amounts)

    def least(self, config: TurboConfig, spread: Spread) -> float:
        return self._cost_with(config).least(spread)

    def refined(self, found: Found, samples: Sequence[int], parts: int = 1, *, as_fast: bool = False) -> Found:
        """A schedule at the same cost, found by moving tokens between blocks; as fast, between those that merge."""
        budget = self.effort * len(samples) // parts
        return schedule_search(self, self._cost_with(found.config), found, samples, budget, self.seed, as_fast)

    def finished(self, config: TurboConfig) -> TurboConfig:
        """With what every `"auto"` and an alpha of None came to, so that a later release does the same."""
        with apply(self.model, config) as handle:
            feature: Any = handle.features[0]
        alpha = config.alpha
        if alpha is None and not callable(config.degree):
            alpha = default_alpha(config.degree)
        settled: TurboConfig = config.changed(similarity=feature.similarity, guidance=feature.guidance, alpha=alpha)
        return settled
