"""`turbovlm calibrate`: settings for a model, found on a folder of images."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbovlm.cli.help import Help
from turbovlm.cli.output import add_json_option
from turbovlm.errors import ConfigError, DataError, TurboError

if TYPE_CHECKING:
    from turbovlm import Calibration
    from turbovlm.loading import ModelSpec

EFFORT, BATCH, MOST_IMAGES = 8, 16, 256
PASSES = 16
"""Passes of the images beside the search for a schedule, about: settings, and what is measured at the end."""
PIPELINES_ONLY = ("steps", "image_size", "frames", "guidance_scale")

_EPILOG = """\
examples:
  turbovlm calibrate zoo:saliency photos --flops 0.6                     a pretrained ViT; writes turbo.json, turbo.png
  turbovlm calibrate openai/clip-vit-large-patch14 photos --speedup 1.5  measured on this device
  turbovlm calibrate timm:vit_base_patch16_224 photos --max-drift 0.02   the cheapest within a tolerance
  turbovlm calibrate ./blip-captioning photos --flops 0.6 --dense --out captions.json
  turbovlm calibrate diffusers:./my-pipeline prompts.txt --flops 0.8 --steps 20    a share for each resolution

  python: turbovlm.apply(model, turbovlm.TurboConfig.load("turbo.json"))        # DenoiseConfig of a pipeline
  turbovlm bench diffusers:./my-pipeline --pretrained --settings turbo.json

Images need no labels: 64 to 256 of the kind that the model will see. Half of them are searched on, the other half says
what can be promised. Drift is 1 − cosine of what the model gives with merging to what it gives without: pooled
features, logits, or tokens; of a pipeline the images that it makes of prompts, one in each line of a text file.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "calibrate",
        help="find the settings that keep most of your model, on your images",
        description="Find which tokens to merge, and how many in which block, on unlabelled images or on prompts.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a hub id, a folder, timm:NAME, zoo:saliency, zoo:pairs, …; a pipeline: diffusers:ID, diffusers:FOLDER, "
        "zoo:emoji, …",
    )
    parser.add_argument(
        "samples",
        metavar="IMAGES",
        help="a folder of images, or of folders of them; for a pipeline a text file with a prompt in each line",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--flops", type=float, metavar="SHARE", help="of the encoder's MACs left")
    target.add_argument("--max-drift", type=float, metavar="D", help="the cheapest settings that drift no further")
    target.add_argument("--speedup", type=float, metavar="X", help="times faster, measured on this device")
    parser.add_argument("--dense", action="store_true", help="every position is there behind the last block")
    parser.add_argument(
        "--per-image", action="store_true", help="images with more redundancy lose more; for images one at a time"
    )
    parser.add_argument("--limit", type=int, default=MOST_IMAGES, metavar="N", help="images, or prompts (default 256)")
    parser.add_argument("--effort", type=int, metavar="N", help=f"passes of the search (default {EFFORT})")
    parser.add_argument(
        "--batch", type=int, metavar="N", help=f"images in a forward (default {BATCH}), or in a pipeline's call (1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of split and search (default 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, mps … (default: cuda where there is one)")
    parser.add_argument("--out", default="turbo.json", metavar="FILE", help="(default turbo.json; a figure beside it)")
    add_json_option(parser)
    making = parser.add_argument_group("image generation only")
    making.add_argument("--steps", type=int, metavar="N", help="denoising steps per image (default 20)")
    making.add_argument("--image-size", metavar="SIZE", help="N or WIDTHxHEIGHT in pixels, instead of the pipeline's")
    making.add_argument("--frames", type=int, metavar="N", help="of a video, instead of the pipeline's own")
    making.add_argument("--guidance-scale", type=float, metavar="X", help="instead of the pipeline's own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, calibrate, print, and write the settings and their figure."""
    import turbovlm
    from turbovlm.calibration.calibrate import FEWEST, check_target
    from turbovlm.calibration.plot import save_calibration
    from turbovlm.cli import calibrate_pipelines
    from turbovlm.cli.measuring import check_file, check_numbers, written
    from turbovlm.cli.output import check_json, console, write_json
    from turbovlm.loading import ModelSpec

    check_numbers(args, "limit", "effort", "batch")
    if not 0 <= args.seed < 2**63:
        raise ConfigError(f"--seed {args.seed}: must be an integer from 0 to {2**63 - 1}")
    if importlib.util.find_spec("matplotlib") is None:
        raise TurboError("the figure needs matplotlib: pip install 'turbovlm[plot]'")
    out, figure = Path(args.out), Path(args.out).with_suffix(".png")
    check_file("--out", args.out, (".json",))
    check_file("--out", str(figure))
    check_json(args)
    if args.limit < FEWEST:
        raise ConfigError(f"--limit {args.limit}: must be at least {FEWEST}, better 64 to 256; on half of them a bound")
    target = {name: getattr(args, name) for name in ("flops", "max_drift", "speedup")}
    check_target(**target)
    makes_images = ModelSpec(args.model).makes_images
    found: turbovlm.Calibration
    found, count = (calibrate_pipelines.find if makes_images else _find)(args, target)
    found.save(out)
    written.append(str(out))
    title = f"{args.model}, calibrated on {count} {'prompts' if makes_images else 'images'} of {args.samples}"
    save_calibration(found, figure, title=title)
    written.append(str(figure))
    shown = console()
    shown.print(str(found))
    shown.print(f"settings: {out}; drift over cost: {figure}", soft_wrap=True)
    if args.json:
        about = {"model": args.model, "samples": args.samples, "count": count, "target": _asked(target)}
        saved = json.loads(out.read_text(encoding="utf-8"))
        write_json(args.json, {**about, "calibration": saved, "files": [str(out), str(figure)]})
    return 0


def _asked(target: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in target.items() if value is not None}


def _find(args: argparse.Namespace, target: Mapping[str, Any]) -> tuple[Calibration, int]:
    """The settings of an encoder, and on how many images they were found."""
    import torch

    import turbovlm
    from turbovlm.calibration.calibrate import FEWEST
    from turbovlm.calibration.outputs import check_different, default_measure, select_images, sizes_of
    from turbovlm.cli.images import image_files, read_images
    from turbovlm.cli.measuring import device_named, progress_bar
    from turbovlm.loading import ModelSpec, running
    from turbovlm.loading.processors import load_for_images

    for name in PIPELINES_ONLY:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} has no place with an encoder: only image generation has it")
    files = image_files(Path(args.samples), args.limit)
    if len(files) < FEWEST:
        raise DataError(
            f"{args.samples}: holds {len(files)} image{'' if len(files) == 1 else 's'}, too few for a bound that holds "
            f"for others; give at least {FEWEST}, better 64 to 256, of the kind that the model will see"
        )
    spec = ModelSpec(args.model, device_named(args.device), getattr(torch, args.dtype))
    pictures = read_images(files)
    _check_fits(spec, args.dense)
    model, prepare = load_for_images(spec)
    with running(args.model, "take these images"):
        images = prepare(pictures)
    check_different(images, FEWEST)
    with running(args.model, "take these images"), torch.inference_mode():
        for places in sizes_of(images).values():
            default_measure(model)(model, select_images(images, places[:1]))
    how = {name: getattr(args, name) for name in ("dense", "per_image", "seed")}
    how |= {"effort": args.effort or EFFORT, "batch": args.batch or BATCH}
    with progress_bar(len(files) // 2 * (how["effort"] + PASSES), "calibrating") as advance:
        found = turbovlm.calibrate(model, images, **target, **how, progress=advance)
    return found, len(files)


def _check_fits(spec: ModelSpec, dense: bool) -> None:
    """Refuse a model in which nothing can be merged before its weights are loaded."""
    import turbovlm
    from turbovlm.loading.models import load_outline

    outline = load_outline(spec)
    if outline is not None:
        turbovlm.apply(outline, r=1, dense=dense).remove()
