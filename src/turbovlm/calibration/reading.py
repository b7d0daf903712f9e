"""`calibrate_reading`: which visual tokens, and how many, a language model should read, found on prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.apply import apply
from turbovlm.calibration.bound import FEWEST as HELD
from turbovlm.calibration.bound import promise_of
from turbovlm.calibration.result import Calibration
from turbovlm.calibration.search import clearly_less
from turbovlm.calibration.targets import nothing
from turbovlm.config import READINGS, ReadConfig
from turbovlm.errors import ConfigError, TurboError
from turbovlm.patching import patches_on
from turbovlm.profile.macs import macs

FEWEST = 2 * HELD
CANDIDATES: tuple[Mapping[str, Any], ...] = (
    {"degree": "weighted_distance"},
    {"degree": "redundancy"},
    {"reduce": "prune"},
    {"visual_select": "attention"},
    {"visual_select": "uniform"},
)
"""Settings that are tried, the default first."""
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1)
"""Of the visual tokens, that are walked through for `max_drift`, and along the curve."""
START = 0.5
"""The share at which settings are compared for `max_drift`."""


def calibrate_reading(
    model: nn.Module,
    prompts: Sequence[Mapping[str, Any]],
    *,
    visual_keep: float | int | None = None,
    max_drift: float | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    **settings: Any,
) -> Calibration:
    """The settings of `visual_keep` that change least what a language model says next, found on prompts with images.

    Half of the prompts are searched on, with the other half it is measured what can be promised. Drift is 1 − cosine of
    the logits behind the prompt to those of the model itself, the mean over prompts taken off both.

    Args:
        model: one that reads images, in eval mode; it is left as it is.
        prompts: at least 30 of what the model takes, each a mapping as its processor gives it, of one prompt.
        visual_keep: share or count of each image's tokens: the least drift at that.
        max_drift: the fewest tokens whose mean drift is not above it.
        seed: of the split.
        progress: told how many more prompts went through the model.
        settings: fields of `ReadConfig` that are to stay as given, such as `r` inside the vision tower.

    Returns:
        Settings and their `promise`, whose `flops` are those of a prompt through the whole model.

    Raises:
        ConfigError: none or both of the targets, one out of reach (the message says what can be reached), too few
            prompts, or no prompts.
        UnsupportedModelError: nothing reads images in the model.
        TurboError: a model in training mode or accelerated already, or whose logits are NaN.
    """
    _check(model, prompts, visual_keep, max_drift, settings)
    base = ReadConfig(visual_keep=START if visual_keep is None else visual_keep, **settings)
    apply(model, base).remove()
    subject = _Subject(model, prompts, progress or nothing)
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))
    searched, kept = sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])
    best, drift = base, subject.drift(base, searched)
    for each in CANDIDATES:
        if not set(settings) & set(each):
            found = replace(best, **each)
            other = subject.drift(found, searched)
            if clearly_less(other, drift):
                best, drift = found, other
    if max_drift is not None:
        best = _fewest_within(subject, best, max_drift, searched)
    curve = [
        (subject.ratio(config), subject.drift(config, kept).mean().item())
        for config in (replace(best, visual_keep=share) for share in SHARES)
    ]
    return promise_of(best, subject.drift(best, kept), subject.ratio(best), curve)


def _fewest_within(subject: _Subject, config: ReadConfig, max_drift: float, places: Sequence[int]) -> ReadConfig:
    best = None
    for share in SHARES:
        found = replace(config, visual_keep=share)
        mean = subject.drift(found, places).mean().item()
        if mean > max_drift:
            if best is None:
                raise ConfigError(
                    f"max_drift={max_drift} is out of reach: with {share:.0%} of the visual tokens it is {mean:.4f}"
                )
            break
        best = found
    assert best is not None
    return best


def _check(model: Any, prompts: Any, visual_keep: Any, max_drift: Any, settings: Mapping[str, Any]) -> None:
    if (visual_keep is None) == (max_drift is None):
        given = "none of them" if visual_keep is None else "both"
        raise ConfigError(f"give exactly one of visual_keep and max_drift: got {given}")
    if max_drift is not None and (isinstance(max_drift, bool) or not 0 < max_drift < 1):
        raise ConfigError(f"max_drift={max_drift!r}: must be in (0, 1); 0 is the model itself")
    for name in (name for name in READINGS if name != "visual_keep"):
        if name in settings:
            raise ConfigError(f"{name}: calibrate_reading finds visual_keep, and nothing beside it")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise TurboError("the model is in training mode: dropout would be taken for drift; call model.eval() first")
    if any(True for _ in patches_on(model)):
        raise TurboError("this model is accelerated already: calibrate the model itself, after handle.remove()")
    if isinstance(prompts, Mapping) or not all(isinstance(prompt, Mapping) for prompt in prompts):
        raise ConfigError("prompts: must be a list of what the model takes, each a mapping of one prompt's tensors")
    if len(prompts) < FEWEST:
        raise ConfigError(
            f"prompts: {len(prompts)} are too few, at least {FEWEST} are needed: half of them for the promise"
        )


class _Subject:
    """A model and prompts, with the logits that it gives behind each by itself."""

    def __init__(
        self, model: nn.Module, prompts: Sequence[Mapping[str, Any]], progress: Callable[[int], object]
    ) -> None:
        self.model, self.prompts, self.progress = model, prompts, progress
        own = self._logits(range(len(prompts)))
        if not own.isfinite().all():
            raise TurboError("the model's own logits are NaN or infinite on these prompts; nothing was calibrated")
        self.mean = own.mean(dim=0)
        self.own = own - self.mean

    def drift(self, config: ReadConfig, places: Sequence[int]) -> Tensor:
        """`[len(places)]`."""
        with apply(self.model, config):
            logits = self._logits(places)
        found = 1 - torch.cosine_similarity(logits - self.mean, self.own[list(places)], dim=-1)
        if not found.isfinite().all():
            raise TurboError(f"the model's logits are NaN or infinite with {config.amount}; nothing was calibrated")
        return found

    def ratio(self, config: ReadConfig) -> float:
        """Share of the multiply-accumulates left, of the first prompt through the whole model."""
        own = macs(self.model, **self.prompts[0])
        with apply(self.model, config):
            return round(macs(self.model, **self.prompts[0]) / own, 4)

    @torch.inference_mode()
    def _logits(self, places: Sequence[int]) -> Tensor:
        """Behind the last word of each prompt, `[len(places), vocabulary]`."""
        found = []
        for place in places:
            logits = self.model(**self.prompts[place]).logits
            found.append(logits[:, -1].float().cpu())
            self.progress(1)
        return torch.cat(found)
