"""`turbovlm bench` of a pipeline of `diffusers`, or of its denoiser alone."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from turbovlm.cli.amounts import shown_keep
from turbovlm.cli.measuring import check_making, check_numbers, device_named, progress_bar
from turbovlm.errors import ConfigError, TurboError

if TYPE_CHECKING:
    from turbovlm.config import DenoiseConfig
    from turbovlm.loading import ModelSpec
    from turbovlm.profile import Comparison

Size = tuple[int, int] | None
"""Height and width in pixels; None for the model's own."""

DEFAULT_KEEP = (0.7, 0.5)
DEFAULTS = {"batch": 1, "rounds": 3, "warmup": 1}
STEPS, STEPS_PRETRAINED = 4, 20
PIPELINES_ONLY = ("steps", "prompt", "seed", "guidance_scale")
"""Options that mean nothing to a denoiser alone."""


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    import torch

    from turbovlm.loading import ModelSpec
    from turbovlm.loading.pipelines import load_pipeline, load_pipeline_outline

    check_numbers(args, "batch", "rounds", "warmup")
    check_making(args)
    configs, sizes = _configs(args), _sizes(args.image_size)
    spec = ModelSpec(args.model, device_named(args.device), getattr(torch, args.dtype))
    _check_fits(load_pipeline_outline(spec), configs, sizes, args)
    model = load_pipeline(spec, pretrained=args.pretrained)
    if isinstance(model, torch.nn.Module):
        _bench_denoiser(model, configs, sizes, args)
    else:
        _bench_pipeline(model, spec, configs, sizes, args)
    return 0


def _check_fits(
    outline: Any | None, configs: dict[str, DenoiseConfig], sizes: list[Size], args: argparse.Namespace
) -> None:
    """Refuse what cannot be done with a pipeline or a denoiser before it is built.

    Args:
        outline: on the meta device; None for a pipeline that another package brings.
    """
    import torch

    import turbovlm
    from turbovlm.profile.pipelines import check_size

    alone = isinstance(outline, torch.nn.Module)
    for name in PIPELINES_ONLY if alone else ():
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ConfigError(
                f"--{option}: {args.model} is a denoiser alone, of which one forward is timed; give the pipeline"
            )
    if args.plot and not args.pretrained and not alone:
        raise TurboError("--plot draws the drift of images, about which random weights say nothing: give --pretrained")
    for size in sizes if outline is not None and not alone else ():
        if size is not None:
            check_size(outline, size)
    for config in configs.values() if outline is not None else ():
        turbovlm.apply(outline, config).remove()


def _bench_pipeline(
    pipe: Any, spec: ModelSpec, configs: dict[str, DenoiseConfig], sizes: list[Size], args: argparse.Namespace
) -> None:
    from turbovlm.cli.bench import Results

    prompt = _prompt(pipe, spec, args.prompt)
    results = Results(args, "images", _settings(args), ("diffusers",), _shown(args))
    for size in sizes:
        comparison = _compare_pipeline(pipe, configs, size, prompt, args)
        assert comparison.generation is not None
        height, width = comparison.generation.size
        results.add(f"{width}x{height}", comparison, f"{width}x{height} pixels", drift=args.pretrained)
    if not args.pretrained:
        print("random weights: of drift and PSNR only --pretrained tells")
    results.write()


def _compare_pipeline(
    pipe: Any, configs: dict[str, DenoiseConfig], size: Size, prompt: Any, args: argparse.Namespace
) -> Comparison:
    import torch

    import turbovlm
    from turbovlm.loading import running
    from turbovlm.profile.images import FEW_STEPS
    from turbovlm.profile.pipelines import inputs_of

    counts = {name: value if getattr(args, name) is None else getattr(args, name) for name, value in DEFAULTS.items()}
    given = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    inputs = inputs_of(pipe, size, counts["batch"], FEW_STEPS, prompt, given)
    pipe.set_progress_bar_config(disable=True)  # there is one for all rounds
    with running(args.model, f"make an image as {type(pipe).__name__}"):  # it may want an image to begin with
        pipe(**inputs, generator=torch.Generator().manual_seed(args.seed or 0))
    with progress_bar((counts["warmup"] + counts["rounds"]) * (len(configs) + 1)) as progress:
        comparison: Comparison = turbovlm.profile.compare_images(
            pipe,
            configs,
            size=size,
            steps=args.steps or (STEPS_PRETRAINED if args.pretrained else STEPS),
            seed=args.seed or 0,
            prompt=prompt,
            inputs=given,
            compile=args.compile,
            progress=progress,
            **counts,
        )
    return comparison


def _prompt(pipe: Any, spec: ModelSpec, given: list[str] | None) -> Any:
    """The texts or class numbers that were given; else those that the model knows; else None."""
    from turbovlm.profile.pipelines import takes_classes

    if given is None:
        return spec.added.prompts or None if spec.added is not None else None
    return [int(word) if word.isdecimal() else word for word in given] if takes_classes(pipe) else given


def _bench_denoiser(model: Any, configs: dict[str, DenoiseConfig], sizes: list[Size], args: argparse.Namespace) -> None:
    import torch

    from turbovlm.cli.bench import Results
    from turbovlm.cli.bench_encoders import compare_shown
    from turbovlm.diffusion.inputs import denoiser_inputs
    from turbovlm.loading import running

    inputs = [denoiser_inputs(model, size, args.batch or DEFAULTS["batch"]) for size in sizes]
    for given in inputs:
        with running(args.model), torch.no_grad():
            model(**given)
    results = Results(args, "denoiser", _settings(args), ("diffusers",), _shown(args))
    for size, given in zip(sizes, inputs):
        name = "own size" if size is None else f"{size[1]}x{size[0]}"
        shown = "its own size" if size is None else f"{name} pixels"
        results.add(name, compare_shown(model, given, configs, args), f"one forward, {shown}")
    results.write()


def _configs(args: argparse.Namespace) -> dict[str, DenoiseConfig]:
    """By the share that is kept; what else is set holds for all of them."""
    from turbovlm.config import DenoiseConfig

    more = {name: getattr(args, name) for name in ("refresh", "components") if getattr(args, name) is not None}
    keeps = DEFAULT_KEEP if args.keep is None else args.keep
    return {f"keep={shown_keep(keep)}": DenoiseConfig(keep=keep, **more) for keep in keeps}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """For JSON: what was asked for beside the shares."""
    return {"settings": {name: getattr(args, name) for name in ("refresh", "components", "prompt", "guidance_scale")}}


def _shown(args: argparse.Namespace) -> str:
    refresh = "" if args.refresh is None else f", refresh={args.refresh}"
    return refresh if args.components is None else f"{refresh}, {' and '.join(args.components)} alone"


def _sizes(given: list[str] | None) -> list[Size]:
    """Read each size, `N` or `WIDTHxHEIGHT`; the model's own where none is given."""
    sizes: list[Size] = []
    for text in dict.fromkeys(given or ()):
        found = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text)
        if found is None or 0 in (width := int(found[1]), height := int(found[2] or found[1])):
            raise ConfigError(f"--image-size {text}: must be N or WIDTHxHEIGHT in pixels, such as 512 or 768x512")
        sizes.append((height, width))
    return sizes or [None]
