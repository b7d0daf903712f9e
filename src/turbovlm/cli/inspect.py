"""`turbovlm inspect`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from turbovlm.cli.amounts import pixels_from
from turbovlm.cli.help import Help
from turbovlm.errors import ConfigError

if TYPE_CHECKING:
    import torch.nn as nn
    from rich.console import Console

    from turbovlm.config import ReadConfig
    from turbovlm.encoder.schedule import Schedule

DEFAULT_R = 16

_EPILOG = f"""\
examples:
  turbovlm inspect timm:vit_base_patch16_384 --r 35
  turbovlm inspect torchvision:vit_h_14 --image-size 518 --flops 0.6
  turbovlm inspect open_clip:ViT-B-16
  turbovlm inspect facebook/dinov2-base --keep 0.25       a transformers hub id (only its config is read)
  turbovlm inspect ./my-model --json plan.json            a folder with a config.json
  turbovlm inspect Qwen/Qwen2.5-VL-7B-Instruct --visual-keep 0.5 --image-size 896
  turbovlm inspect diffusers:black-forest-labs/FLUX.1-dev --keep 0.5 --image-size 1024x768
  turbovlm inspect diffusers:./wan/transformer --frames 81    a pipeline's folder, or that of its denoiser alone
  turbovlm inspect diffusers:./my-pipeline --settings turbo.json

Without an amount, r={DEFAULT_R}, and keep=0.5 of a denoiser.
A model that cannot be accelerated is said to be so, with the reason: exit code 2.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    from turbovlm.cli.amounts import add_amount_options
    from turbovlm.cli.generation import SETTINGS_HELP
    from turbovlm.loading.models import MODEL_HELP

    parser = subparsers.add_parser(
        "inspect",
        help="which blocks of a model would be accelerated, and what it would save",
        description="Say which blocks of a model would be accelerated and what it would save, without its weights.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=MODEL_HELP
        + ". Of image generation diffusers:ID or diffusers:FOLDER, of a pipeline or of a denoiser alone",
    )
    add_amount_options(parser, required=False, generation=True)
    parser.add_argument(
        "--visual-keep",
        type=_share_or_count,
        metavar="K",
        help="share (0.5) or count (128) of each image's visual tokens that the language model reads",
    )
    parser.add_argument("--settings", metavar="FILE", help=f"a denoiser's settings: {SETTINGS_HELP}")
    parser.add_argument("--frames", type=int, metavar="N", help="of a video, instead of the model's own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the schedule of every encoder found and what a language model reads of it, and write both as JSON."""
    from turbovlm.cli import inspect_denoisers
    from turbovlm.cli.output import check_json
    from turbovlm.loading import ModelSpec

    check_json(args)
    if ModelSpec(args.model).makes_images:
        return inspect_denoisers.run(args)
    for name in ("settings", "frames"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} has no place with an encoder: only image generation has it")
    args.image_size = pixels_from(args.image_size)
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    import turbovlm
    from turbovlm.cli.amounts import settings_from
    from turbovlm.cli.output import console, write_json
    from turbovlm.loading import ModelSpec
    from turbovlm.loading.models import check_reads, check_runs, load_model
    from turbovlm.workflows import configs_from

    settings = settings_from(args, None if args.visual_keep is not None else DEFAULT_R)
    configs_from(
        (), {**settings, "visual_keep": args.visual_keep}, False, args.model
    )  # refused before a model is built
    model = load_model(ModelSpec(args.model, "meta"), args.image_size if settings else None)
    if settings:
        check_runs(args.model, model, "meta")
    if args.visual_keep is not None:
        check_reads(args.model, model, args.image_size)
    reads = {} if args.visual_keep is None else {"visual_keep": args.visual_keep, **_selection(model)}
    schedules = turbovlm.apply(model, **settings, **reads).schedules
    out = console()
    for schedule in schedules:
        _print_schedule(out, args.model, model, schedule)
    reading = None
    if args.visual_keep is not None:
        reading = _reading(args, model, turbovlm.ReadConfig(**reads), schedules)
        _print_reading(out, reading)
    if args.json:
        encoders = [dataclasses.asdict(schedule) for schedule in schedules]
        write_json(args.json, {"model": args.model, "encoders": encoders, "reading": reading})
    return 0


def _print_schedule(console: Console, name: str, model: nn.Module, schedule: Schedule) -> None:
    from turbovlm.cli.output import print_table
    from turbovlm.encoder.towers import find_towers

    tower = next(tower for tower in find_towers(model) if tower.name == schedule.tower)
    before, after = sum(schedule.macs_before) / 1e9, sum(schedule.macs_after) / 1e9
    rows = []
    for i, block in enumerate(schedule.blocks):
        gmacs = (f"{schedule.macs_before[i] / 1e9:.3f}", f"{schedule.macs_after[i] / 1e9:.3f}")
        rows.append((block, str(schedule.tokens[i]), str(schedule.tokens[i + 1]), *gmacs))
    rows.append(("all blocks", str(schedule.tokens[0]), str(schedule.tokens[-1]), f"{before:.3f}", f"{after:.3f}"))
    title = f"{name}: {schedule.tower or 'the model'} ({tower.layout.family}), {schedule.asked}"
    header = ("block", "tokens before", "tokens after", "GMACs before", "GMACs after")
    print_table(console, title, header, rows, sections=(len(rows) - 1,))
    console.print(
        f"{len(schedule.blocks)} blocks would be accelerated: {schedule.ratio:.1%} of the encoder's "
        f"multiply-accumulates left, at best {1 / schedule.ratio:.2f}x faster."
    )
    if tower.restore:
        console.print(f"Its output is restored to {schedule.tokens[0]} tokens, which the model's head needs.")
    if schedule.note:
        console.print(f"Note: {schedule.note}.")


def _selection(model: nn.Module) -> dict[str, Any]:
    """Settings that go by no attention, for a tower that has no row of it for visual tokens."""
    from turbovlm.registry import family_of

    families = [family_of("vlm", module) for module in model.modules()]
    return {"alpha": 0} if any(each and each.guide is None for each in families) else {}


def _reading(args: argparse.Namespace, model: Any, config: ReadConfig, schedules: Sequence[Schedule]) -> dict[str, Any]:
    """What the language model reads of one image, by words and numbers."""
    from turbovlm.vlm.families import native_pixels, tokens_per_image
    from turbovlm.vlm.install import find_reading
    from turbovlm.vlm.select import kept_count

    feature = find_reading(model, config)
    part = model.get_submodule(feature.part)
    pixels = native_pixels(feature.family, part) if args.image_size is None else args.image_size
    tokens = tokens_per_image(feature.family, part, pixels)
    assert config.visual_keep is not None
    told = {
        "family": feature.family.family,
        "guide": f"{feature.part}.{feature.guide}".lstrip(".") if feature.guide else None,
        "guidance": feature.guidance,
        "pixels": pixels,
        "tokens": None,
    }
    if tokens is None:
        return told
    if tokens < 1:
        raise ConfigError(f"--image-size {pixels}: {args.model} makes no visual token of so small an image")
    if feature.family.cross_attention and schedules:  # merged in the tower, and not restored
        tokens = schedules[0].tokens[-1] - feature.prefix
    return {**told, "tokens": [tokens, kept_count(config.visual_keep, tokens)]}


def _print_reading(console: Console, reading: dict[str, Any]) -> None:
    if reading["guide"] is None:
        before, after = reading["tokens"] or ("an image's", "fewer")
        console.print(
            f"{reading['family']}: {after} of {before} visual tokens would be read, chosen without attention, as its "
            "tower has no row of it for them: apply with alpha=0, or a visual_select that goes by none."
        )
        return
    before, after = reading["tokens"]
    console.print(
        f"{reading['family']}: {after} of the {before} visual tokens would be read of an image of "
        f"{reading['pixels']}x{reading['pixels']} pixels, guided by the {GUIDES[reading['guidance']]} of "
        f"{reading['guide']}."
    )


GUIDES = {"cls": "CLS token's attention", "mean": "mean query's attention"}


def _share_or_count(text: str) -> float | int:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share such as 0.5 nor a count such as 128") from None
