"""Language models that read images as a subject: which visual tokens they read, and how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turbovlm.apply import apply
from turbovlm.calibration.result import Calibration
from turbovlm.calibration.speed import device_in_words, measure_speedups
from turbovlm.calibration.subject import NEAR, Spread, Subject, Trial, solve_amount
from turbovlm.config import READINGS, ReadConfig, TurboConfig
from turbovlm.errors import ConfigError
from turbovlm.profile.macs import macs

SETTINGS: tuple[Mapping[str, Any], ...] = (
    {},
    {"visual_select": "coverage"},
    {"visual_select": "dpp"},
    {"visual_select": "mmr"},
    {"visual_select": "information"},
    {"visual_select": "attention"},
    {"visual_select": "uniform"},
    {"reduce": "prune"},
)
"""Changes of the best settings so far that are tried, none first: the selections that do best where
studies/visual_tokens asks, those before them, and dropping the rest."""


@dataclass(eq=False)
class ReadingSubject(Subject):
    """A language model and prompts with images; an amount is `visual_keep`, compared are the logits behind a prompt.

    Attributes:
        encoder: what the vision encoder merges meanwhile, if anything.

    Raises:
        UnsupportedModelError: nothing reads images in the model.
    """

    encoder: TurboConfig | Calibration | None = None

    about = "a language model that reads images, and prompts: a list of mappings, as its processor gives each"
    unit = "of the visual tokens read"
    config, whole = ReadConfig, 1.0
    found = READINGS
    options = ("visual_keep", "encoder")
    amounts = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1)
    start = 0.5
    curve = amounts

    def __post_init__(self) -> None:
        apply(self.model, *self._configs(self.base)).remove()  # what does not fit is refused before all else
        self._own_macs = macs(self.model, **self.samples[0])
        super().__post_init__()

    @staticmethod
    def count_samples(samples: Any) -> int:
        return len(samples)

    def outputs(self, config: ReadConfig | None, samples: Sequence[int]) -> list[Tensor]:
        """Logits behind the last token of each prompt, `[len(samples), 1, vocabulary]`."""
        if config is None:
            return [self._logits(samples)]
        with apply(self.model, *self._configs(config)):
            return [self._logits(samples)]

    def cost(self, config: ReadConfig) -> float:
        """Share of the multiply-accumulates left, of the first prompt through the whole model."""
        with apply(self.model, *self._configs(config)):
            return macs(self.model, **self.samples[0]) / self._own_macs

    def speedups(self, configs: Sequence[ReadConfig], rounds: int) -> list[float]:
        """Measured on the first prompt, up to its first new token."""
        versions = [self._configs(config) for config in configs]
        return measure_speedups(self.model, versions, lambda model: model(**self.samples[0]), rounds)

    @property
    def timed_on(self) -> str:
        return f"one prompt on {device_in_words(self.model)}"

    def trials(self, amount: float) -> list[Trial]:
        def fits(change: Mapping[str, Any]) -> bool:
            """Whether it has an effect, and what was asked for stays and keeps its own."""
            unread = ReadConfig.unread({**vars(self.base), **change})
            return not self.fixed & {*change, *unread} and not change.keys() & unread.keys()

        return [Trial(change) for change in SETTINGS if not change or fits(change)]

    def configured(self, config: ReadConfig, spread: Spread, amount: float) -> ReadConfig:
        return replace(config, visual_keep=amount)

    def amount_at(self, flops: float) -> float:
        def cost(amount: float) -> float:
            return self.cost(replace(self.base, visual_keep=amount))

        fewest = self.amounts[-1]
        if flops < cost(fewest) - NEAR:
            raise ConfigError(
                f"flops={flops} is out of reach: {cost(fewest):.3f} is left with {fewest:.0%} {self.unit}"
            )
        return round(solve_amount(cost, flops, fewest, 1.0), 4)

    def least(self, config: ReadConfig, spread: Spread) -> float:
        return self.amounts[-1]

    def _configs(self, config: ReadConfig) -> tuple[Any, ...]:
        return (config,) if self.encoder is None else (self.encoder, config)

    @torch.inference_mode()
    def _logits(self, samples: Sequence[int]) -> Tensor:
        found = []
        for sample in samples:
            found.append(self.model(**self.samples[sample]).logits[:, -1:].float().cpu())
            self.progress(1)
        return torch.cat(found)
