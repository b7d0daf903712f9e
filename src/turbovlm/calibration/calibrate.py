"""`calibrate`: from a model and some of its inputs to the settings that keep most of what it gives."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import fields
from numbers import Real
from typing import Any

import torch.nn as nn

from turbovlm.apply import denoisers_of
from turbovlm.calibration import bound, search
from turbovlm.calibration.outputs import Measure, check_different, sizes_of
from turbovlm.calibration.result import Calibration
from turbovlm.calibration.subject import Progress, Subject
from turbovlm.calibration.subjects.denoiser import DenoiserSubject
from turbovlm.calibration.subjects.encoder import EncoderSubject
from turbovlm.calibration.subjects.reading import ReadingSubject
from turbovlm.calibration.subjects.thresholds import with_thresholds_if_better
from turbovlm.config import ReadConfig, TurboConfig
from turbovlm.errors import ConfigError, TurboError
from turbovlm.patching import patches_on
from turbovlm.profile.compare import check_integers

FEWEST = 2 * bound.FEWEST
"""Samples that are needed: half of them are searched on, on the others a bound is measured."""
SUBJECTS: tuple[type[Subject], ...] = (EncoderSubject, ReadingSubject, DenoiserSubject)


def calibrate(
    model: Any,
    samples: Any,
    *,
    flops: float | None = None,
    max_drift: float | None = None,
    speedup: float | None = None,
    visual_keep: float | int | None = None,
    measure: Measure | None = None,
    per_image: bool = False,
    effort: int | None = None,
    encoder: TurboConfig | Calibration | None = None,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    batch: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Calibration:
    """Find the settings that change least of what a model gives, on unlabelled samples of what it will see.

    Half of the samples are searched on: which tokens are merged, and how many where. The other half says what can be
    promised for samples like these. Drift is 1 − cosine of what the model gives to what it gives unmerged, the mean
    over the samples taken off both. The model is left as it is, whatever happens. What is calibrated follows from what
    is given:

    - a model with one vision encoder, or several of one depth, and images: `[images, 3, height, width]`, or a mapping
      of tensors by name; or, for a model that takes several sizes, a list of `[3, height, width]`, of which those of
      one size go through the model together, and cost is over all of them. Compared are pooled features, logits or
      tokens, as `measure` says. What is found is a
      `TurboConfig` with a list of `r`, for images of that size or those sizes.
    - a language model that reads images, and prompts: a list of mappings, as its processor gives each. Compared are the
      logits behind each prompt. What is found is a `ReadConfig` with `visual_keep`.
    - a `diffusers` pipeline, and prompts: a list of texts or class numbers. Compared are the images that it makes. What
      is found is a `DenoiseConfig` with a list of `keep`, one for each resolution.

    The three are one function because targets, search and result are the same; an argument that is not for the model
    given is refused by name.

    Args:
        model: in eval mode, or a pipeline.
        samples: at least 30, better 64 to 256.
        flops: share of the multiply-accumulates to leave, in (0, 1), of the vision encoder, of a prompt through the
            whole language model, or of the denoiser: the least drift at that cost.
        max_drift: the cheapest settings whose mean drift is not above it, in (0, 1).
        speedup: the least drift at that speed-up, > 1, measured on this device: of a batch of images, of a prompt up to
            its first new token, or of a whole call of the pipeline. Schedules are compared at the amounts that make
            each of them that much faster, as merges take time beside the multiply-accumulates.
        visual_keep: language models: the least drift with that share or count of an image's tokens read.
        measure: encoders: `(model, images) -> features` by which drift is measured, a tensor `[batch, width]` or
            `[batch, tokens, width]`, or several that count alike; what the family is read by if None.
        per_image: encoders: find thresholds as well, by which an image with more redundancy loses more tokens, at the
            same cost on average; for images that go through the model one at a time.
        effort: encoders: how often the images go through the model in the search, about; None for 8.
        encoder: language models: what the vision encoder merges meanwhile; give both to `turbovlm.apply` then.
        size: pipelines: height and width of the images in pixels; None for the pipeline's own.
        steps: pipelines: denoising steps per image; None for 20.
        inputs: pipelines: what else the call is given, such as `guidance_scale`.
        batch: samples in a forward; None for 16 images, or one image that is made. Prompts of a language model go
            through it one at a time.
        seed: of the split and the search, and of the first prompt's image (the next has the next); one seed gives one
            result, but for `speedup`.
        progress: called with how many more samples went through the model.
        settings: fields of the config that are to stay as given, such as `dense=True`.

    Returns:
        The settings, and what they promise.

    Raises:
        ConfigError: none or several of the targets, one out of reach (the message says what can be reached), an
            argument that is not for this model, too few samples, too few images that differ, or none but of one colour.
        UnsupportedModelError: nothing in the model can be accelerated.
        TurboError: a model in training mode or accelerated already, or whose outputs are NaN.
    """
    kind = _kind_of(model, samples)
    given: dict[str, Any] = {"measure": measure, "effort": effort, "encoder": encoder, "size": size, "steps": steps}
    given |= {"inputs": inputs, "batch": batch}
    options = {name: value for name, value in given.items() if value is not None}
    _check_names(kind, options | ({"per_image": True} if per_image else {}), settings)
    check_integers(**{name: (options[name], 1) for name in ("effort", "steps", "batch") if name in options})
    target, value = _target_of(kind, {"flops": flops, "max_drift": max_drift, "speedup": speedup}, visual_keep)
    if per_image and target == "speedup":
        raise ConfigError("per_image: a speed-up is measured in batches, which thresholds are not for; give flops")
    _check_model(model)
    base, count = kind.config(kind.whole, **settings), kind.count_samples(samples)
    check_count(kind.noun, count)
    if kind is EncoderSubject:
        check_different(samples, FEWEST)
        if per_image and len(sizes_of(samples)) > 1:
            raise ConfigError("per_image: thresholds are found on images of one size; give a tensor of them")
    subject = kind(model, samples, base, frozenset(settings), seed, progress or (lambda _: None), **options)
    searched, held = split(count, seed)
    timed = None
    if target == "max_drift":
        found = search.within_drift(subject, value, searched)
    elif target == "speedup":
        found, timed = search.at_speedup(subject, value, searched)
    else:
        found = search.least_drift(subject, subject.amount_at(value) if target == "flops" else value, searched)
    result = search.calibration_of(subject, found, held, timed)
    if per_image and isinstance(subject, EncoderSubject):
        return with_thresholds_if_better(subject, found, result, searched, held)
    return result


def _kind_of(model: Any, samples: Any) -> type[Subject]:
    if not isinstance(model, nn.Module):
        if denoisers_of(model):
            return DenoiserSubject
        raise ConfigError(f"model: must be a torch.nn.Module or a pipeline of diffusers, got {type(model).__name__}")
    listed = list(samples) if isinstance(samples, list | tuple) else [samples]
    if any(isinstance(sample, str | int) for sample in listed):
        raise ConfigError(
            f"samples: texts and class numbers are for {DenoiserSubject.about}; this is a {type(model).__name__}"
        )
    is_list = isinstance(samples, list | tuple) and bool(samples)
    return ReadingSubject if is_list and all(isinstance(sample, Mapping) for sample in samples) else EncoderSubject


def _check_names(kind: type[Subject], options: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse what is for another kind, what is found, and what nobody knows."""
    for name in options:
        if name not in kind.options:
            owners = " or ".join(other.about for other in SUBJECTS if name in other.options)
            raise ConfigError(f"{name}: is for {owners}; this is {kind.about}")
    known = [field.name for field in fields(kind.config)]
    for name, value in settings.items():
        if name in kind.found:
            raise ConfigError(f"{name}: calibrate finds how much is merged, and nothing beside it")
        if name not in known:
            free = ", ".join(each for each in known if each not in kind.found)
            raise ConfigError(f"{name}={value!r}: is no setting of {kind.config.__name__}; these can be given: {free}")
    if settings.get("partition") == "grid":
        raise ConfigError("partition='grid': calibrate finds amounts for halves")


def _target_of(kind: type[Subject], targets: dict[str, Any], visual_keep: Any) -> tuple[str, Any]:
    """The one target that was asked for, in its range."""
    if "visual_keep" in kind.options or visual_keep is not None:
        _check_names(kind, {"visual_keep": visual_keep}, {})
        targets["visual_keep"] = visual_keep
    asked = {name: value for name, value in targets.items() if value is not None}
    if len(asked) != 1:
        *names, last = targets
        found = ", ".join(asked) or "none of them"
        raise ConfigError(f"give exactly one of {', '.join(names)} and {last}: got {found}")
    name, value = asked.popitem()
    check_target(**{name: value})
    return name, value


def check_count(noun: str, count: int) -> None:
    """See that there are samples enough.

    Args:
        noun: what they are called, `"images"` or `"prompts"`.

    Raises:
        ConfigError: there are not.
    """
    if count < FEWEST:
        raise ConfigError(
            f"{noun}: {count} are too few, at least {FEWEST} are needed: half of them for what is promised"
        )


def split(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Places of the samples that are searched on, and of those that are held out: half each, by chance."""
    order = random.Random(seed).sample(range(count), count)
    return sorted(order[: count // 2]), sorted(order[count // 2 :])


def check_target(**asked: Any) -> None:
    """See that each target that is not None is in its range.

    Raises:
        ConfigError: naming one that is not.
    """
    for name, value in asked.items():
        if value is not None:
            _check_target(name, value)


def _check_target(name: str, value: Any) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise ConfigError(f"{name}={value!r}: must be a number")
    if name == "flops" and not 0 < value < 1:
        raise ConfigError(f"flops={value!r}: must be a share in (0, 1)")
    if name == "max_drift" and not 0 < value < 1:
        raise ConfigError(f"max_drift={value!r}: must be in (0, 1); 0 is the model itself")
    if name == "speedup" and not value > 1:
        raise ConfigError(f"speedup={value!r}: must be more than 1")
    if name == "visual_keep":
        ReadConfig(value)  # raises where it is neither a share nor a count


def _check_model(model: Any) -> None:
    for module in [model] if isinstance(model, nn.Module) else denoisers_of(model).values():
        if module.training:
            raise TurboError("the model is in training mode: dropout would be taken for drift; call model.eval() first")
        if any(True for _ in patches_on(module)):
            raise TurboError("this model is accelerated already: calibrate the model itself, after handle.remove()")
