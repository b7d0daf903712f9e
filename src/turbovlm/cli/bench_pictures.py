"""`turbovlm bench` of a pipeline of `diffusers`, or of its denoiser alone."""

from __future__ import annotations

import argparse
import math
import re
from typing import TYPE_CHECKING, Any

from turbovlm.cli.measuring import (
    check_numbers,
    check_plot,
    console_for_tables,
    device_named,
    progress_bar,
    versions_used,
)
from turbovlm.errors import ConfigError, TurboError

if TYPE_CHECKING:
    from turbovlm.config import TurboConfig
    from turbovlm.profile import Comparison, PictureComparison

DEFAULT_KEEP = (0.7, 0.5)
DEFAULTS = {"batch": 1, "rounds": 3, "warmup": 1}
STEPS, STEPS_PRETRAINED = 4, 20


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    import torch

    from turbovlm.cli.models import write_json
    from turbovlm.cli.pipelines import load_generator

    check_numbers(args, "batch", "rounds", "warmup", "steps")
    check_plot(args.plot)
    configs, sizes = _configs(args), _sizes(args.image_size)
    device, dtype = device_named(args.device), getattr(torch, args.dtype)
    model = load_generator(args.model, device, dtype, args.pretrained)
    about = {
        "model": args.model,
        "pretrained": args.pretrained,
        "settings": {name: getattr(args, name) for name in ("refresh", "components", "prompt", "guidance_scale")},
        "versions": versions_used("diffusers"),
    }
    measured = _denoiser if isinstance(model, torch.nn.Module) else _pictures
    results = measured(model, configs, sizes, args)
    if args.json:
        write_json(args.json, {**about, **results})
    return 0


def _pictures(pipe: Any, configs: dict[str, TurboConfig], sizes: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    from turbovlm.profile.pipelines import check_size

    if args.plot and not args.pretrained:
        raise TurboError(
            "--plot draws the drift of pictures, about which random weights say nothing: give --pretrained"
        )
    for size in sizes:
        if size is not None:
            check_size(pipe, size)
    console = console_for_tables()
    comparisons: dict[str, PictureComparison] = {}
    for size in sizes:
        comparison = _compared(pipe, configs, size, args)
        height, width = comparison.size
        comparisons[f"{width}x{height}"] = comparison
        console.print(
            f"{args.model}, {width}x{height} pixels{_settings(args)}", highlight=False, markup=False, soft_wrap=True
        )
        console.print(picture_table(comparison, drift=args.pretrained), "")
    if args.plot:
        from turbovlm.profile.plot import save_drifts

        save_drifts(comparisons, args.plot, title=f"{args.model}{_settings(args)}")
    return {"pictures": {name: comparison.to_dict() for name, comparison in comparisons.items()}}


def _compared(
    pipe: Any, configs: dict[str, TurboConfig], size: tuple[int, int] | None, args: argparse.Namespace
) -> PictureComparison:
    import turbovlm
    from turbovlm.cli.pipelines import EMOJI, EMOJI_PROMPTS
    from turbovlm.profile.pipelines import takes_classes

    counts = {name: value if getattr(args, name) is None else getattr(args, name) for name, value in DEFAULTS.items()}
    prompt: Any = args.prompt
    if prompt is None and args.model == EMOJI:
        prompt = EMOJI_PROMPTS
    elif prompt is not None and takes_classes(pipe):
        prompt = [int(word) if word.isdecimal() else word for word in prompt]
    try:
        with progress_bar((counts["warmup"] + counts["rounds"]) * (len(configs) + 1)) as progress:
            comparison: PictureComparison = turbovlm.profile.compare_pictures(
                pipe,
                configs,
                size=size,
                steps=args.steps or (STEPS_PRETRAINED if args.pretrained else STEPS),
                seed=args.seed or 0,
                prompt=prompt,
                inputs={} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale},
                compile=args.compile,
                progress=progress,
                **counts,
            )
    except TurboError:
        raise
    except (TypeError, ValueError) as error:  # how a pipeline says that it wants other inputs, such as a picture
        raise TurboError(f"{args.model}: {type(pipe).__name__} made no picture: {error}") from error
    return comparison


def _denoiser(
    model: Any, configs: dict[str, TurboConfig], sizes: list[Any], args: argparse.Namespace
) -> dict[str, Any]:
    from turbovlm.cli.bench_encoders import comparison_table, measured
    from turbovlm.cli.pipelines import denoiser_inputs

    for name in ("steps", "prompt", "seed", "guidance_scale"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ConfigError(
                f"--{option}: {args.model} is a denoiser alone, of which one forward is timed; give the pipeline"
            )
    inputs = [denoiser_inputs(model, size, args.batch or DEFAULTS["batch"]) for size in sizes]
    console = console_for_tables()
    comparisons: dict[str, Comparison] = {}
    for size, given in zip(sizes, inputs):
        name = "own size" if size is None else f"{size[1]}x{size[0]}"
        comparisons[name] = measured(model, given, configs, args)
        shown = "its own size" if size is None else f"{name} pixels"
        console.print(
            f"{args.model}, one forward, {shown}{_settings(args)}", highlight=False, markup=False, soft_wrap=True
        )
        console.print(comparison_table(comparisons[name]))
    if args.plot:
        from turbovlm.profile.plot import save_speedups

        save_speedups(comparisons, args.plot, title=args.model)
    return {"denoiser": {name: comparison.to_dict() for name, comparison in comparisons.items()}}


def picture_table(comparison: PictureComparison, drift: bool) -> Any:
    """Two rows per version: seconds of a picture, and of a denoising step of one.

    Args:
        comparison: what was measured.
        drift: whether to tell how the pictures changed.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    without = "" if drift else "\nrandom weights: of drift and PSNR only --pretrained tells"
    caption = comparison.conditions + without
    table = Table(box=SIMPLE_HEAD, show_edge=False, caption=caption, caption_justify="left", padding=(0, 1, 0, 0))
    for _ in range(2):
        table.add_column("", no_wrap=True)
    columns = ["s", "speed-up", "quartiles", "MACs\nratio", "peak\nMB", *(["drift", "PSNR\ndB"] if drift else [])]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for run in comparison.runs:
        psnr = "same" if math.isinf(run.drift.psnr) else f"{run.drift.psnr:.1f}"
        changed = (f"{run.drift.latent:.4f}", psnr) if drift else ()
        seconds = comparison.seconds_per_picture(run.name), comparison.seconds_per_step(run.name)
        picture, step = comparison.speedup(run.name), comparison.step_speedup(run.name)
        table.add_row(
            run.name, "picture", _short(seconds[0]), *_quartiles(picture), "", _megabytes(run.peak_bytes), *changed
        )
        ratio = f"{comparison.macs_ratio(run.name):.3f}x"
        table.add_row("", "step", _short(seconds[1]), *_quartiles(step), ratio, _megabytes(run.step_peak_bytes))
    return table


def _quartiles(found: Any) -> tuple[str, str]:
    return f"{found.median:.3f}x", f"{found.low:.2f}–{found.high:.2f}"


def _megabytes(count: int | None) -> str:
    return "" if count is None else _short(count / 1e6)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _configs(args: argparse.Namespace) -> dict[str, TurboConfig]:
    """By the share that is kept; what else is set holds for all of them."""
    from turbovlm.config import TurboConfig

    more = {name: getattr(args, name) for name in ("refresh", "components") if getattr(args, name) is not None}
    keeps = DEFAULT_KEEP if args.keep is None else args.keep
    return {f"keep={keep:g}": TurboConfig(keep=keep, **more) for keep in keeps}


def _settings(args: argparse.Namespace) -> str:
    refresh = "" if args.refresh is None else f", refresh={args.refresh}"
    return refresh if args.components is None else f"{refresh}, {' and '.join(args.components)} alone"


def _sizes(given: list[str] | None) -> list[tuple[int, int] | None]:
    """Height and width of each size, as `N` or `WIDTHxHEIGHT`; None for the model's own."""
    sizes: list[tuple[int, int] | None] = []
    for text in dict.fromkeys(given or ()):
        found = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text)
        if found is None or 0 in (width := int(found[1]), height := int(found[2] or found[1])):
            raise ConfigError(f"--image-size {text}: must be N or WIDTHxHEIGHT in pixels, such as 512 or 768x512")
        sizes.append((height, width))
    return sizes or [None]
