"""Pipelines that make images as a subject: how much is merged in which resolution and part of the denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from turbovlm.apply import apply, denoiser_of
from turbovlm.calibration.speed import device_in_words
from turbovlm.calibration.subject import NEAR, Spread, Subject, Trial, solve_amount
from turbovlm.config import DenoiseConfig
from turbovlm.diffusion.levels import is_unet
from turbovlm.errors import ConfigError
from turbovlm.profile.images import compare_images
from turbovlm.profile.pipelines import WatchedPipeline, inputs_of
from turbovlm.registry import family_of
from turbovlm.shares import LEAST_KEPT

SETTINGS: tuple[Mapping[str, Any], ...] = (
    {"scope": "block"},
    {"span": 2},
    {"span": 8},
    {"scope": "part"},
    {"scope": "part", "components": ("attention",)},
    {"scope": "part", "components": ("attention",), "queries_only": True},
    {"scope": "part", "components": ("attention", "ffn")},
    {"restore": "copy"},
    {"refresh": 4},
)
"""Changes of the best settings so far that are tried: those that benchmarks/diffusion_quality.py compares."""
WHOLE_SHARES = (0, 1 / 6, 1 / 3, 1 / 2)
"""Shares of a transformer's blocks, at the front, that are tried to be left whole: how many should be differs more than
all else from model to model (benchmarks/stacks.py)."""
SLOPES = (1.0, 0.5, 0.0, 1.5)
"""Spreads that are tried: how much of what a resolution loses the next smaller one does, the same first."""
ROUNDS = 3
"""Calls of each version that are timed at most."""
RESOLUTIONS = 4
"""Resolutions that have a `keep` of their own: as many as the largest UNets have."""
START, STEP = 0.9, 0.025
"""Cost at which settings are compared for `max_drift`, and the step of the walk from there: of a denoiser much is not
in its blocks, so that all that can be lost is a few tenths."""


@dataclass(eq=False)
class DenoiserSubject(Subject):
    """A pipeline and prompts; an amount is a share of the denoiser's multiply-accumulates, compared are the images.

    Attributes:
        size: height and width of the images in pixels; None for the pipeline's own.
        steps: denoising steps per image.
        inputs: what else the pipeline's call is given.
        batch: images in a call.
    """

    size: tuple[int, int] | None = None
    steps: int = 20
    inputs: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1

    about = "a pipeline that makes images, and prompts: a list of texts or class numbers"
    config, whole = DenoiseConfig, 1.0
    found = ("keep", "min_tokens")
    options = ("size", "steps", "inputs", "batch")
    flat = (1.0,) * RESOLUTIONS
    curve = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)

    def __post_init__(self) -> None:
        self._macs: dict[DenoiseConfig | None, float] = {}
        super().__post_init__()
        least = self.least(self.base, self.flat)
        self.start = max(START, least)
        below = int((self.start - least) / STEP + 1e-9)
        above = int((1 - self.start) / STEP - 1e-9)
        walk = [round(self.start + STEP * step, 4) for step in range(above, -below - 1, -1) if step]
        self.amounts = (*walk[:above], self.start, *walk[above:])

    @staticmethod
    def count_samples(samples: Any) -> int:
        if not isinstance(samples, str) and isinstance(samples, Sequence):
            return len(samples)
        what = repr(samples) if isinstance(samples, str) else f"a {type(samples).__name__}"
        raise ConfigError(f"prompts: must be a list of texts or class numbers, got {what}")

    def outputs(self, config: DenoiseConfig | None, samples: Sequence[int]) -> list[Tensor]:
        """The images, `[len(samples), 1, values]`."""
        images = []
        for start in range(0, len(samples), self.batch):
            some = samples[start : start + self.batch]
            watched = self._watched(config, some)
            watched.draw()
            images.append(watched.image.float().cpu().flatten(1)[:, None])
            self.progress(len(some))
        return [torch.cat(images)]

    def cost(self, config: DenoiseConfig) -> float:
        """Share of the multiply-accumulates left, of the first prompt's image."""
        for each in (None, config):
            if each not in self._macs:
                # Some pipelines take a single step for another method; `refresh` steps share what the first decides.
                steps = min(self.steps, max(2, 1 if each is None else each.refresh))
                self._macs[each] = self._watched(each, [0]).count(steps)
        return self._macs[config] / self._macs[None]

    def speedups(self, configs: Sequence[DenoiseConfig], rounds: int) -> list[float]:
        """Measured on whole calls of the pipeline, in a few rounds at most: each call runs many steps."""
        versions = {str(place): config for place, config in enumerate(configs)}
        compared = compare_images(
            self.model,
            versions,
            size=self.size,
            batch=self.batch,
            steps=self.steps,
            prompt=self.samples[: self.batch],
            inputs=self.inputs,
            rounds=min(rounds, ROUNDS),
        )
        return [compared.speedup(name).median for name in versions]

    @property
    def timed_on(self) -> str:
        denoiser: Any = denoiser_of(self.model)
        images = f"{self.batch} image{'' if self.batch == 1 else 's'}"
        return f"a call for {images} in {self.steps} steps on {device_in_words(denoiser)}"

    def trials(self, amount: float) -> list[Trial]:
        """Each of `SLOPES`, where there are several resolutions, then of `WHOLE_SHARES` and of `SETTINGS`."""
        several = self.least(self.base, _weights(0.0)) > self.least(self.base, self.flat)
        slopes = [Trial(spread=_weights(slope)) for slope in (SLOPES if several else SLOPES[:1])]
        return slopes + [Trial(change) for change in (*self._whole_first(), *SETTINGS) if self._can_try(change)]

    def _whole_first(self) -> list[Mapping[str, Any]]:
        """`WHOLE_SHARES` of this denoiser's blocks; none of a UNet's, which has convolutions in front."""
        denoiser: Any = denoiser_of(self.model)
        blocks = sum(family_of("denoiser", module) is not None for module in denoiser.modules())
        counts = dict.fromkeys(int(blocks * share) for share in WHOLE_SHARES)
        return [] if is_unet(denoiser) else [{"whole_first": count} for count in counts]

    def _can_try(self, change: Mapping[str, Any]) -> bool:
        """Whether a change is one, leaves alone what was given, and the denoiser is of a family that has it."""
        unread = DenoiseConfig.unread({**vars(self.base), **change})
        if self.fixed & {*change, *unread} or {*change} & {*unread}:
            return False
        try:
            with apply(self.model, self.base.changed(**change)):
                return True
        except ConfigError:  # such as parts that merge by themselves
            return False

    def configured(self, config: DenoiseConfig, spread: Spread, amount: float) -> DenoiseConfig | None:
        kept = solve_amount(lambda kept: self.cost(_keeping(config, spread, kept)), amount, 0.0, 1.0)
        solved = _keeping(config, spread, kept)
        return None if abs(self.cost(solved) - amount) > NEAR else solved

    def least(self, config: DenoiseConfig, spread: Spread) -> float:
        return self.cost(_keeping(config, spread, 0.0))

    def _watched(self, config: DenoiseConfig | None, samples: Sequence[int]) -> WatchedPipeline:
        prompts = [self.samples[sample] for sample in samples]
        inputs = inputs_of(self.model, self.size, len(samples), self.steps, prompts, self.inputs)
        return WatchedPipeline(self.model, inputs, [self.seed + sample for sample in samples], config)


def _weights(slope: float) -> Spread:
    """What each resolution loses, compared with the largest."""
    return tuple(slope**level for level in range(RESOLUTIONS))


def _keeping(config: DenoiseConfig, spread: Spread, kept: float) -> DenoiseConfig:
    """From the least that the largest resolution can keep (0) to everything (1), and the smaller ones accordingly."""
    lost = (1 - LEAST_KEPT) * (1 - kept)
    shares = (1 - min(lost * weight, 1 - LEAST_KEPT) for weight in spread)
    return replace(config, keep=tuple(round(share, 4) for share in shares))
