"""Settings for a model, found on images or prompts of a user's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import turbovlm
from turbovlm import Calibration
from turbovlm.calibration.calibrate import check_count, check_target, split
from turbovlm.cli.calibrate import EFFORT, PASSES
from turbovlm.cli.calibrate_pipelines import PASSES as PIPELINE_PASSES
from turbovlm.errors import ConfigError
from turbovlm_lab.studio.image_sets import MOST_IMAGES, ImageSet
from turbovlm_lab.studio.jobs import Report

if TYPE_CHECKING:
    from turbovlm_lab.studio.subjects import Encodes, Subject

TARGETS: Mapping[str, tuple[str, float]] = {
    "flops": ("Share of the multiply-accumulates left", 0.6),
    "max_drift": ("Mean drift that is still allowed", 0.02),
    "speedup": ("Times faster, measured on this machine", 1.5),
}
"""Of each target: its title, and the value at first."""
LOADS: Mapping[str, str] = {
    "clip": "from turbovlm_lab.zoo.clip import load_clip\n\nmodel = load_clip()",
    "saliency": "from turbovlm_lab.zoo import load_saliency_vit\n\nmodel = load_saliency_vit().backbone",
    "emoji": "from turbovlm_lab.zoo import load_emoji_pipeline\n\npipe = load_emoji_pipeline()",
}
"""Lines that load a built-in model, by its key."""
STEPS = 10
"""Denoising steps of an image at first."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Args:
        target: one of `TARGETS`; `value`: of it.
        effort: how often the images go through the model in the search, about.
        per_image: whether images with more redundancy lose more.
        dense: whether every position is there behind the last block.
        steps: denoising steps of an image, of pipelines.
        seed: of the split and the search.
    """

    target: str
    value: float
    effort: int = EFFORT
    per_image: bool = False
    dense: bool = False
    steps: int = STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target={self.target!r}: must be one of {', '.join(TARGETS)}")
        check_target(**{self.target: self.value})


@dataclass(frozen=True)
class Calibrated:
    """What was found.

    Attributes:
        subject: the model; `noun`: what its samples are called.
        searched, held: names of the samples that were searched on, and of those that took no part in it.
        left_out: why others were not read.
    """

    subject: Subject
    noun: str
    wanted: Wanted
    found: Calibration
    searched: tuple[str, ...]
    held: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float


def calibrate_encoder(
    loaded: Encodes, subject: Subject, pictures: ImageSet, wanted: Wanted, report: Report
) -> Calibrated:
    """Find an encoder's settings.

    Raises:
        ConfigError: too few images, too few that differ, or a target that is out of reach.
        Stopped: somebody has asked for it.
    """
    images = [named.image for named in pictures.images]
    check_images(len(images))
    report.begin("preparing the images")
    pixels = loaded.prepare(images)
    report.begin("calibrating", len(images) // 2 * (wanted.effort + PASSES))
    started = time.perf_counter()
    how = {"effort": wanted.effort, "per_image": wanted.per_image, "dense": wanted.dense, **loaded.fixed}
    found = _found(loaded.model, pixels, wanted, {**how, "measure": loaded.encode}, report)
    searched, held = _halves(pictures.names, wanted)
    seconds = time.perf_counter() - started
    return Calibrated(subject, "images", wanted, found, searched, held, pictures.left_out, seconds)


def calibrate_pipeline(
    pipe: Any, subject: Subject, prompts: Sequence[str], wanted: Wanted, report: Report
) -> Calibrated:
    """Find a pipeline's settings.

    Raises:
        ConfigError: too few prompts, or a target that is out of reach.
        Stopped: somebody has asked for it.
    """
    check_count("prompts", len(prompts))
    report.begin("calibrating", len(prompts) // 2 * PIPELINE_PASSES)
    started = time.perf_counter()
    found = _found(pipe, list(prompts), wanted, {"steps": wanted.steps}, report)
    searched, held = _halves(prompts, wanted)
    return Calibrated(subject, "prompts", wanted, found, searched, held, (), time.perf_counter() - started)


def check_images(count: int) -> None:
    """See that there are images enough, and not too many.

    Raises:
        ConfigError: there are not, or too many.
    """
    check_count("images", count)
    if count > MOST_IMAGES:
        raise ConfigError(f"images: {count}; at most {MOST_IMAGES} are taken")


def prompts_in(text: str) -> list[str]:
    """A prompt of each line that has one, different ones."""
    return list(dict.fromkeys(" ".join(line.split()) for line in text.splitlines() if line.strip()))


def lines_of(made: Calibrated, file: str = "turbo.json") -> str:
    """Python that puts the settings to use."""
    name, unknown = ("pipe", "pipeline") if made.noun == "prompts" else ("model", "model")
    loads = LOADS.get(made.subject.key, f"{name} = ...  # your {unknown}: {made.subject.title}")
    return f"""\
import turbovlm
{loads}
handle = turbovlm.apply({name}, turbovlm.{type(made.found.config).__name__}.load("{file}"))
print(handle)
handle.remove()  # and it is what it was
"""


def _found(model: Any, samples: Any, wanted: Wanted, options: Mapping[str, Any], report: Report) -> Calibration:
    asked: dict[str, Any] = {wanted.target: wanted.value, **options}
    return turbovlm.calibrate(model, samples, seed=wanted.seed, progress=report.advance, **asked)


def _halves(names: Sequence[str], wanted: Wanted) -> tuple[tuple[str, ...], tuple[str, ...]]:
    searched, held = split(len(names), wanted.seed)
    return tuple(names[place] for place in searched), tuple(names[place] for place in held)
