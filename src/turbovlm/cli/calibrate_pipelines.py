"""`turbovlm calibrate` of a pipeline of `diffusers`: settings found on a file of prompts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbovlm.cli.generation import frames_for, read_prompts, sizes_from
from turbovlm.cli.measuring import check_making, device_named, progress_bar
from turbovlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from turbovlm import Calibration

PASSES = 20
"""Passes of the searched prompts, about: a trial of each setting, and what is measured at the end."""


def find(args: argparse.Namespace, target: Mapping[str, Any]) -> tuple[Calibration, int]:
    """The settings of a pipeline, and on how many prompts they were found.

    Raises:
        ConfigError: an option that is of encoders, or that the pipeline does not take.
        DataError: no such file, or too few prompts.
    """
    import torch

    import turbovlm
    from turbovlm.calibration.calibrate import FEWEST
    from turbovlm.loading import ModelSpec
    from turbovlm.loading.pipelines import load_pipeline
    from turbovlm.profile.pipelines import takes_classes

    for name in ("dense", "per_image", "effort"):
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} has no place with a pipeline: only encoders have it")
    check_making(args)
    (size,) = sizes_from(None if args.image_size is None else [args.image_size])
    prompts: list[Any] = read_prompts(Path(args.samples), args.limit)
    if len(prompts) < FEWEST:
        raise DataError(
            f"{args.samples}: holds {len(prompts)} prompt{'' if len(prompts) == 1 else 's'}, too few for a bound that "
            f"holds for others; give at least {FEWEST}, better 64 to 256, each in a line"
        )
    spec = ModelSpec(args.model, device_named(args.device), getattr(torch, args.dtype))
    _check_fits(spec)
    pipe = load_pipeline(spec, pretrained=True)
    if takes_classes(pipe):
        prompts = [_class_of(args.samples, line) for line in prompts]
    inputs = frames_for(pipe, args.frames)
    if args.guidance_scale is not None:
        inputs["guidance_scale"] = args.guidance_scale
    given = {"size": size, "steps": args.steps, "inputs": inputs or None, "batch": args.batch, "seed": args.seed}
    with progress_bar(len(prompts) // 2 * PASSES, "calibrating") as advance:
        found = turbovlm.calibrate(pipe, prompts, **target, **given, progress=advance)
    return found, len(prompts)


def _check_fits(spec: Any) -> None:
    """Refuse a denoiser alone, or a pipeline in which nothing can be merged, before weights are loaded."""
    import torch

    import turbovlm
    from turbovlm.loading.pipelines import load_pipeline_outline

    outline = load_pipeline_outline(spec)
    if isinstance(outline, torch.nn.Module):
        raise ConfigError(f"{spec.text}: is a denoiser alone, which makes no images of prompts; give the pipeline")
    if outline is not None:
        turbovlm.apply(outline, keep=0.5).remove()


def _class_of(file: str, line: str) -> int:
    if not line.isdecimal():
        raise DataError(f"{file}: {line!r} is no class number, of which this pipeline makes images")
    return int(line)
