"""`calibrate`: from a model and some images to the settings that keep most of it, and what they promise."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.nn as nn

from turbovlm.apply import apply, denoiser_of
from turbovlm.calibration.bound import FEWEST as HELD
from turbovlm.calibration.bound import promise_of
from turbovlm.calibration.drift import Subject
from turbovlm.calibration.handing import Measure, count_of, handed_on
from turbovlm.calibration.per_image import mean_ratio, with_thresholds
from turbovlm.calibration.result import Calibration
from turbovlm.calibration.search import Best, Encoder, Shares, clearly_less, schedule_search, settings_search, tried
from turbovlm.calibration.speed import speedup_of
from turbovlm.calibration.targets import check_targets, nothing
from turbovlm.config import AMOUNTS, TurboConfig
from turbovlm.errors import ConfigError, TurboError
from turbovlm.ops.degree import default_alpha
from turbovlm.patching import patches_on
from turbovlm.profile.compare import check_integers

FEWEST = 2 * HELD
EFFORT = 100
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
STEP = 0.05
"""Of the shares of multiply-accumulates that are walked through for `max_drift`."""
TOLERANCE = 0.02
"""Of a measured speed-up."""
TURNS = 6
"""How often a speed-up is measured at most."""


def calibrate(
    model: nn.Module,
    images: Any,
    *,
    flops: float | None = None,
    max_drift: float | None = None,
    speedup: float | None = None,
    measure: Measure | None = None,
    per_image: bool = False,
    effort: int = EFFORT,
    batch: int = 16,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    **settings: Any,
) -> Calibration:
    """The settings that keep most of what a model hands on, found on unlabelled images.

    Half of the images are searched on: which similarity, degree and partition, then how many tokens in which block. On
    the other half it is measured what can be promised. The model is left as it is, whatever happens.

    Args:
        model: with one vision encoder, or several of one depth, in eval mode.
        images: what the model takes, `[images, 3, height, width]`, or a mapping of tensors by name; at least 30,
            better 64 to 256, of the kind and the size that the model will see.
        flops: share of the encoder's multiply-accumulates to leave, in (0, 1): the least drift at that cost.
        max_drift: the cheapest settings whose mean drift is not above it.
        speedup: the least drift at that speed-up, measured on this device, a batch of images at a time.
        measure: `(model, images) -> features` by which drift is measured, a tensor `[batch, width]` or
            `[batch, tokens, width]`, or several that count alike; what the family hands on if None.
        per_image: find thresholds as well, by which a picture with more redundancy loses more tokens, at the same cost
            on average; for pictures that go through the model one at a time.
        effort: how often the images go through the model in the search, about.
        batch: images in a forward.
        seed: of the split, the search and nothing else; one seed gives one result, but for `speedup`.
        progress: told how many more images went through the model.
        settings: fields of `TurboConfig` that are to stay as given, such as `dense=True`.

    Returns:
        Settings with a list of `r`, for images of that size, and what they promise.

    Raises:
        ConfigError: none or several of the targets, one out of reach (the message says what can be reached), too few
            images, or no images.
        TurboError: a model in training mode or accelerated already, or whose outputs are NaN.
        UnsupportedModelError: nothing in the model can be accelerated.
    """
    check_targets(flops, max_drift, speedup)
    _check(model)
    check_integers(effort=(effort, 1), batch=(batch, 1))
    for name in (*AMOUNTS, "min_tokens", "thresholds", "grid"):
        if name in settings:
            raise ConfigError(f"{name}: calibrate finds how much is merged in the encoder, and nothing beside it")
    if settings.get("partition") == "grid":
        raise ConfigError("partition='grid': calibrate finds amounts for halves")
    if per_image and speedup is not None:
        raise ConfigError("per_image: a speed-up is measured in batches, which thresholds are not for; give flops")
    base = TurboConfig(r=0, **settings)
    count = count_of(images)
    if count < FEWEST:
        raise ConfigError(f"images: {count} are too few, at least {FEWEST} are needed: half of them for the promise")
    subject = Subject(model, images, count, measure or handed_on(model), batch, progress or nothing)
    order = random.Random(seed).sample(range(count), count)
    searched, kept = sorted(order[: count // 2]), sorted(order[count // 2 :])
    encoder = _encoder(subject, base)
    search = _Search(subject, encoder, base, searched, effort, seed)
    measured = None
    if flops is not None:
        best = search.at(flops)
    elif max_drift is not None:
        best = search.within(max_drift)
    else:
        assert speedup is not None
        best, measured = search.as_fast_as(speedup)
    promise = _promise(subject, encoder, best, kept, measured)
    if per_image:
        found = with_thresholds(subject, best.config, searched)
        if clearly_less(subject.drift(found, searched), best.drift):
            cost = mean_ratio(subject, encoder, found, kept)
            held = promise_of(_spelled_out(model, found), subject.drift(found, kept), cost, promise.curve)
            return replace(held, curve=promise.curve)
    return promise


class _Search:
    """The three targets over one subject."""

    def __init__(
        self, subject: Subject, encoder: Encoder, base: TurboConfig, images: Sequence[int], effort: int, seed: int
    ) -> None:
        self.subject, self.encoder, self.base, self.images = subject, encoder, base, images
        self.budget, self.seed = effort * len(images), seed

    def at(self, flops: float) -> Best:
        least = self.encoder.ratio([self.encoder.tokens] * self.encoder.shape.depth)
        if flops < least:
            raise ConfigError(f"flops={flops} is out of reach: {least:.2f} is the least that this encoder can be left")
        best = settings_search(self.subject, self.encoder, self.base, flops, self.images)
        return schedule_search(self.subject, self.encoder, best, flops, self.images, self.budget, self.seed)

    def within(self, max_drift: float) -> Best:
        share = 1 - STEP
        start = settings_search(self.subject, self.encoder, self.base, share, self.images)
        if start.mean > max_drift:
            raise ConfigError(
                f"max_drift={max_drift} is out of reach: with {share:.0%} of the multiply-accumulates left the least "
                f"is {start.mean:.4f}"
            )
        best, steps = start, round((1 - STEP) / STEP)
        while share > STEP:
            share = round(share - STEP, 4)
            found = self._step(best, share, self.budget // steps)
            if found is None or found.mean > max_drift:
                break
            best = found
        for part in (0.75, 0.5, 0.25):
            found = self._step(best, round(share + part * STEP, 4), self.budget // steps)
            if found is None or found.mean > max_drift:
                break
            best = found
        return best

    def _step(self, best: Best, flops: float, budget: int) -> Best | None:
        found = tried(self.subject, self.encoder, best.config, best.shares, flops, self.images)
        if found is None:
            return None
        return schedule_search(self.subject, self.encoder, found, flops, self.images, budget, self.seed)

    def as_fast_as(self, speedup: float) -> tuple[Best, float]:
        flops, _ = self._paced(speedup, self.base, self.encoder.even(), 1 / speedup)
        best = self.at(flops)
        flops, measured = self._paced(speedup, best.config, best.shares, flops)
        found = tried(self.subject, self.encoder, best.config, best.shares, flops, self.images)
        assert found is not None
        return found, measured

    def _paced(self, speedup: float, config: TurboConfig, shares: Shares, flops: float) -> tuple[float, float]:
        """The share of multiply-accumulates whose measured speed-up comes nearest, and that speed-up."""
        seen: list[tuple[float, float]] = []
        while len(seen) < TURNS:
            amounts = self.encoder.amounts(shares, flops)
            if amounts is None:
                most = max((measured for _, measured in seen), default=1.0)
                raise ConfigError(f"speedup={speedup} is out of reach: {most:.2f} is the most that was measured")
            seen.append((flops, speedup_of(self.subject, replace(config, r=amounts))))
            if abs(seen[-1][1] / speedup - 1) < TOLERANCE:
                break
            flops = min(1.0, flops * seen[-1][1] / speedup)
        return min(seen, key=lambda pair: abs(pair[1] / speedup - 1))


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        other = "; pipelines are for turbovlm.calibrate_pictures" if denoiser_of(model) is not None else ""
        raise ConfigError(f"model: must be a torch.nn.Module, got {type(model).__name__}{other}")
    if model.training:
        raise TurboError("the model is in training mode: dropout would be taken for drift; call model.eval() first")
    if any(True for _ in patches_on(model)):
        raise TurboError("this model is accelerated already: calibrate the model itself, after handle.remove()")


def _encoder(subject: Subject, base: TurboConfig) -> Encoder:
    """Read off the model with one token merged."""
    with apply(subject.model, replace(base, r=1, dense=True)) as handle:
        subject.look([0])
        plans: Any = handle.features
    depths = {plan.shape.depth for plan in plans}
    if len(depths) > 1:
        raise ConfigError(f"the model's encoders have {sorted(depths)} blocks: calibrate one of them at a time")
    source = None if plans[0].last is None else plans[0].last.source()
    if source is None:
        raise ConfigError("measure: the model's vision encoder has not run")
    return Encoder(plans[0].shape, source.shape[1])


def _spelled_out(model: nn.Module, config: TurboConfig) -> TurboConfig:
    """With what every `"auto"` came to, so that a later release does the same."""
    with apply(model, config) as handle:
        feature: Any = handle.features[0]
    alpha = config.alpha
    if alpha is None and not callable(config.degree):
        alpha = default_alpha(config.degree)
    return replace(config, similarity=feature.similarity, guidance=feature.guidance, alpha=alpha)


def _promise(
    subject: Subject, encoder: Encoder, best: Best, images: Sequence[int], speedup: float | None
) -> Calibration:
    assert isinstance(best.config.r, tuple)
    curve = []
    for share in CURVE:
        found = tried(subject, encoder, best.config, best.shares, share, images)
        if found is not None:
            curve.append((share, found.mean))
    config = _spelled_out(subject.model, best.config)
    return promise_of(
        config, subject.drift(best.config, images), round(encoder.ratio(best.config.r), 4), curve, speedup
    )
