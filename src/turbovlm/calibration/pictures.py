"""`calibrate_pictures`: how much to merge in which resolution and part of a denoiser, found on prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turbovlm.calibration.bound import FEWEST as HELD
from turbovlm.calibration.bound import promise_of
from turbovlm.calibration.result import Calibration
from turbovlm.calibration.search import clearly_less
from turbovlm.calibration.targets import check_targets, nothing
from turbovlm.config import LEAST_KEPT, DenoiseConfig
from turbovlm.errors import ConfigError, TurboError
from turbovlm.profile.compare import check_integers
from turbovlm.profile.images import compare_images
from turbovlm.profile.pipelines import WatchedPipeline, find_denoiser, inputs_of

FEWEST = 2 * HELD
SLOPES = (1.0, 0.5, 0.0, 1.5)
"""How much of what the largest resolution loses each smaller one does, compared with the one before."""
CANDIDATES: tuple[Mapping[str, Any], ...] = (
    {"components": ("attention", "ffn")},
    {"components": ("attention", "cross_attention")},
    {"components": ("attention",)},
    {"components": ("ffn",)},
    {"degree": "redundancy"},
    {"alpha": 20.0},
    {"restore": "copy"},
    {"refresh": 4},
)
"""Settings that are tried, the default first."""
CURVE = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
NEAR = 0.01
"""How far a share of the multiply-accumulates may be from what was asked for."""
START = 0.9
"""The share at which settings are compared where no cost is asked for."""
STEP = 0.025
SOLVING = 4
"""How often a cost is counted at most, between the ends, until it is near."""
TURNS, TOLERANCE = 6, 0.02
"""How often a speed-up is measured at most, and how near it has to come."""


def calibrate_pictures(
    pipe: Any,
    prompts: Sequence[str] | Sequence[int],
    *,
    flops: float | None = None,
    max_drift: float | None = None,
    speedup: float | None = None,
    size: tuple[int, int] | None = None,
    steps: int = 20,
    inputs: Mapping[str, Any] | None = None,
    batch: int = 1,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    **settings: Any,
) -> Calibration:
    """The settings that change a pipeline's pictures least, found on prompts.

    Half of the prompts are searched on: how much to merge in which resolution and in which parts of a block, and what
    goes by what. With the other half it is measured what can be promised. Drift is 1 − cosine of a picture to the one
    that the pipeline itself makes of the same prompt and seed, the mean picture taken off both. The pipeline is left as
    it is.

    Args:
        pipe: a `diffusers` pipeline from text or classes to pictures.
        prompts: at least 30; class numbers where it makes pictures of classes.
        flops: share of the denoiser's multiply-accumulates to leave, in (0, 1): the least drift at that cost.
        max_drift: the cheapest settings whose mean drift is not above it.
        speedup: the least drift at that speed-up of a whole call, measured on this device.
        size: height and width of the pictures in pixels; None for the pipeline's own.
        steps: denoising steps per picture.
        inputs: what else the pipeline's call is given, such as `guidance_scale`.
        batch: pictures in a call.
        seed: of the first prompt's picture (the next has the next) and of the split.
        progress: told how many more pictures were made.
        settings: fields of `DenoiseConfig` that are to stay as given.

    Returns:
        Settings with a list of `keep`, one for each resolution, and what they promise.

    Raises:
        ConfigError: none or several of the targets, one out of reach (the message says what can be reached), too few
            prompts, or no prompts.
        UnsupportedModelError: no pipeline, or a denoiser in which nothing can be accelerated.
        TurboError: the pipeline is accelerated already, or its pictures are not finite.
    """
    check_targets(flops, max_drift, speedup)
    check_integers(steps=(steps, 1), batch=(batch, 1))
    for name in ("keep", "min_tokens"):
        if name in settings:
            raise ConfigError(f"{name}: calibrate_pictures finds how much is merged, and nothing beside it")
    if len(prompts) < FEWEST or isinstance(prompts, str):
        count = 1 if isinstance(prompts, str) else len(prompts)
        raise ConfigError(f"prompts: {count} are too few, at least {FEWEST} are needed: half of them for the promise")
    find_denoiser(pipe)
    subject = PictureSubject(pipe, prompts, size, steps, inputs or {}, batch, seed, progress or nothing)
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))
    half = len(order) // 2
    searched, kept = sorted(order[:half]), sorted(order[half:])
    search = PictureSearch(subject, DenoiseConfig(keep=1.0, **settings), searched, frozenset(settings))
    measured = None
    if flops is not None:
        best = search.at(flops)
    elif max_drift is not None:
        best = search.within(max_drift)
    else:
        assert speedup is not None
        best, measured = search.as_fast_as(speedup)
    return _promise(subject, search, best, kept, measured)


@dataclass(frozen=True)
class _Best:
    """The best so far, how its smaller resolutions compare, and the drift of each prompt searched on."""

    config: DenoiseConfig
    slope: float
    drift: Tensor


class PictureSubject:
    """A pipeline, prompts, and the pictures that it makes of them by itself, `[prompts, values]`."""

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Any],
        size: tuple[int, int] | None,
        steps: int,
        inputs: Mapping[str, Any],
        batch: int,
        seed: int,
        progress: Callable[[int], object],
    ) -> None:
        self.pipe, self.prompts, self.size, self.steps, self.inputs = pipe, prompts, size, steps, inputs
        self.batch, self.seed, self.progress = batch, seed, progress
        self._costs: dict[DenoiseConfig | None, float] = {}
        own = self.pictures(None, range(len(prompts)))
        if not own.isfinite().all():
            raise TurboError("the pipeline's own pictures are NaN or infinite; nothing was calibrated")
        self.mean = own.mean(dim=0)
        self.own = own - self.mean

    def pictures(self, config: DenoiseConfig | None, places: Sequence[int]) -> Tensor:
        made = []
        for start in range(0, len(places), self.batch):
            some = places[start : start + self.batch]
            watched = self._watched(config, some)
            watched.draw()
            made.append(watched.image.float().cpu().flatten(1))
            self.progress(len(some))
        return torch.cat(made)

    def drift(self, config: DenoiseConfig, places: Sequence[int]) -> Tensor:
        """`[len(places)]`."""
        there = self.pictures(config, places) - self.mean
        found = 1 - torch.cosine_similarity(there, self.own[list(places)], dim=-1)
        if not found.isfinite().all():
            raise TurboError(f"the pictures are NaN or infinite with {config.amount}; nothing was calibrated")
        return found

    def ratio(self, config: DenoiseConfig) -> float:
        """Share of the denoiser's multiply-accumulates left, of one picture."""
        for each in (None, config):
            if each not in self._costs:
                refresh = 1 if each is None else each.refresh
                self._costs[each] = self._watched(each, [0]).count(min(self.steps, max(2, refresh)))
        return self._costs[config] / self._costs[None]

    def speedup(self, config: DenoiseConfig) -> float:
        compared = compare_images(
            self.pipe,
            {"merged": config},
            size=self.size,
            batch=self.batch,
            steps=self.steps,
            prompt=self.prompts[: self.batch],
            inputs=self.inputs,
        )
        return compared.speedup("merged").median

    def _watched(self, config: DenoiseConfig | None, places: Sequence[int]) -> WatchedPipeline:
        prompts = [self.prompts[place] for place in places]
        given = inputs_of(self.pipe, self.size, len(places), self.steps, prompts, self.inputs)
        return WatchedPipeline(self.pipe, given, [self.seed + place for place in places], config)


class PictureSearch:
    """The three targets over one subject."""

    def __init__(
        self, subject: PictureSubject, base: DenoiseConfig, places: Sequence[int], given: frozenset[str]
    ) -> None:
        self.subject, self.base, self.places, self.given = subject, base, places, given

    def at(self, flops: float) -> _Best:
        least = self.subject.ratio(_kept(self.base, 0.0, 1.0))
        if flops < least - NEAR:
            raise ConfigError(f"flops={flops} is out of reach: {least:.3f} is the least that this denoiser can be left")
        best = self._tried(self.base, 1.0, flops)
        if best is None:
            raise ConfigError(f"flops={flops}: pictures this small cannot be made within {NEAR:.0%} of it")
        has_resolutions = self.subject.ratio(_kept(self.base, 0.0, 0.0)) > least
        for slope in SLOPES[1:] if has_resolutions else ():
            best = self._better(best, self._tried(best.config, slope, flops))
        for settings in CANDIDATES:
            if not self.given & set(settings):
                best = self._better(best, self._tried(replace(best.config, **settings), best.slope, flops))
        return best

    def within(self, max_drift: float) -> _Best:
        least = self.subject.ratio(_kept(self.base, 0.0, 1.0))
        share = max(START, least)
        best = self.at(share)
        is_near = bool(best.drift.mean() <= max_drift)
        step = -STEP if is_near else STEP
        while least <= share + step < 1:
            share = round(share + step, 4)
            found = self._tried(best.config, best.slope, share)
            if found is None:
                continue
            if bool(found.drift.mean() <= max_drift) != is_near:
                return best if is_near else found
            best = found
        if not is_near:
            raise ConfigError(
                f"max_drift={max_drift} is out of reach: with {share:.1%} of the multiply-accumulates left the least "
                f"is {best.drift.mean():.4f}"
            )
        return best

    def as_fast_as(self, speedup: float) -> tuple[_Best, float]:
        flops, _ = self._paced(speedup, self.base, 1.0, 1 / speedup)
        best = self.at(flops)
        flops, measured = self._paced(speedup, best.config, best.slope, flops)
        found = self._tried(best.config, best.slope, flops)
        return found or best, measured

    def _paced(self, speedup: float, config: DenoiseConfig, slope: float, flops: float) -> tuple[float, float]:
        """The share of multiply-accumulates whose measured speed-up comes nearest, and that speed-up."""
        least = self.subject.ratio(_kept(config, 0.0, slope))
        seen: list[tuple[float, float]] = []
        while len(seen) < TURNS:
            flops = min(1 - NEAR, max(flops, least))
            measured = self.subject.speedup(self.solved(config, slope, flops))
            seen.append((flops, measured))
            if abs(measured / speedup - 1) < TOLERANCE:
                break
            if flops == least and measured < speedup:
                raise ConfigError(f"speedup={speedup} is out of reach: {measured:.2f} is the most that was measured")
            flops *= measured / speedup
        return min(seen, key=lambda pair: abs(pair[1] / speedup - 1))

    def _tried(self, config: DenoiseConfig, slope: float, flops: float) -> _Best | None:
        """With as much kept as makes the cost; None where it cannot be met."""
        solved = self.solved(config, slope, flops)
        if abs(self.subject.ratio(solved) - flops) > NEAR:
            return None
        return _Best(solved, slope, self.subject.drift(solved, self.places))

    def solved(self, config: DenoiseConfig, slope: float, flops: float) -> DenoiseConfig:
        """As much kept as comes nearest to the cost, which is nearly linear in it."""
        ends = [(self.subject.ratio(_kept(config, kept, slope)), kept) for kept in (0.0, 1.0)]
        for _ in range(SOLVING):
            (low, least), (high, most) = ends
            if not low < flops < high:
                break
            kept = least + (most - least) * (flops - low) / (high - low)
            found = (self.subject.ratio(_kept(config, kept, slope)), kept)
            ends = [ends[0], found] if found[0] > flops else [found, ends[1]]
            if abs(found[0] - flops) < NEAR / 4:
                break
        _, kept = min(ends, key=lambda end: abs(end[0] - flops))
        return _kept(config, kept, slope)

    def _better(self, best: _Best, found: _Best | None) -> _Best:
        return found if found is not None and clearly_less(found.drift, best.drift) else best


def _kept(config: DenoiseConfig, kept: float, slope: float) -> DenoiseConfig:
    """From the least that can be kept (0) to everything (1) of the largest resolution, and of three smaller ones."""
    lost = (1 - LEAST_KEPT) * (1 - kept)
    shares = (1 - min(lost * slope**level, 1 - LEAST_KEPT) for level in range(4))
    return replace(config, keep=tuple(round(share, 4) for share in shares))


def _promise(
    subject: PictureSubject, search: PictureSearch, best: _Best, places: Sequence[int], speedup: float | None
) -> Calibration:
    curve = []
    for share in CURVE:
        solved = search.solved(best.config, best.slope, share)
        if abs(subject.ratio(solved) - share) <= NEAR:
            curve.append((share, subject.drift(solved, places).mean().item()))
    return promise_of(
        best.config, subject.drift(best.config, places), round(subject.ratio(best.config), 4), curve, speedup
    )
