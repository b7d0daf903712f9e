"""`turbovlm evaluate`: what merging costs on a task, beside what it saves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbovlm.cli.help import Help
from turbovlm.cli.measuring import QUANTIZATIONS
from turbovlm.cli.output import add_json_option
from turbovlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from turbovlm_lab.evaluate.data import Data
    from turbovlm_lab.evaluate.run import Predictor, Setting
    from turbovlm_lab.evaluate.study import Metric, Study

TASKS = ("classification", "retrieval", "captioning", "vqa", "nlvr2", "saliency", "text-to-image")
CONTROLS = ("paper", "ToMe", "semantics", "random", "uniform", "smaller")
AMOUNTS = ("r", "keep", "flops", "visual_keep")
DEFAULT_FLOPS, DEFAULT_KEEP = 0.6, 0.7

_EPILOG = """\
examples:
  turbovlm evaluate saliency                                   a pretrained ViT and drawings on photographs: no download
  turbovlm evaluate saliency --flops 0.5 --controls --plot saliency.png
  turbovlm evaluate saliency --settings turbo.json             what `turbovlm calibrate` found, beside the default
  turbovlm evaluate saliency --quantize int8 nf4               weights in 8 and in 4 bits, with and without merging
  turbovlm evaluate captioning --model Salesforce/blip-image-captioning-base \
--data dataset_coco.json --images coco --split test --r 16 --batch 32 --dtype bfloat16
  turbovlm evaluate vqa --model ./blip-vqa --data questions.json annotations.json --images val2014 --limit 5000
  turbovlm evaluate retrieval --model openai/clip-vit-base-patch32 --data datasets:nlphuji/flickr30k --keep 0.5
  turbovlm evaluate classification --model timm:vit_base_patch16_224 --data imagenet --split val --r 13
  turbovlm evaluate nlvr2 --data dev.json --images images --check        are all files there, do all images decode?

Data are in the field's own formats, told apart by what is in them:
{formats}

Every sample's prediction is kept in --out, a file for each setting, whose name says it; a run that was stopped goes on
where it was, and other settings share the unmerged model's predictions. Intervals hold 95 % of the
bootstrap's draws over images; "kept" compares with the unmerged model over the same samples.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="what merging costs on a task, beside what it saves",
        description="Ask a model with and without Turbo, and compare official metrics over the same samples.",
        epilog=_EPILOG.format(formats=_formats()),
        formatter_class=Help,
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--model", metavar="MODEL", help="a hub id, a folder, timm:NAME, … (default: the built-in one)")
    given = parser.add_argument_group("data (default: built in)")
    given.add_argument("--data", nargs="+", metavar="FILE", help="annotations, a folder, or datasets:ID")
    given.add_argument("--images", metavar="FOLDER", help="where the images are that annotations name")
    given.add_argument("--split", metavar="NAME", help="which part, where one file, folder or data set has several")
    given.add_argument("--limit", type=int, metavar="N", help="that many samples, evenly spaced (default: all)")
    given.add_argument("--check", action="store_true", help="open every image, list what is wrong, and stop there")
    given.add_argument("--skip-bad", action="store_true", help="go on without what is wrong")
    amount = parser.add_argument_group("how much is merged")
    exclusive = amount.add_mutually_exclusive_group()
    exclusive.add_argument("--r", type=int, metavar="N", help="tokens merged per block on average")
    exclusive.add_argument("--keep", type=float, metavar="SHARE", help="share of the tokens left")
    exclusive.add_argument(
        "--flops", type=float, metavar="SHARE", help=f"share of the encoder's MACs left (default {DEFAULT_FLOPS})"
    )
    amount.add_argument(
        "--settings", nargs="+", metavar="FILE", help="also these, as `turbovlm calibrate` writes them: turbo.json"
    )
    amount.add_argument(
        "--visual-keep", type=float, metavar="SHARE", help="share of an image's tokens that a language model reads"
    )
    amount.add_argument(
        "--controls",
        nargs="*",
        choices=CONTROLS,
        metavar="NAME",
        help=f"beside the default also {', '.join(CONTROLS)}, at the same cost; all of them if none is named",
    )
    amount.add_argument(
        "--quantize",
        nargs="+",
        choices=QUANTIZATIONS,
        metavar="KIND",
        help=f"beside these the model quantised, {', '.join(QUANTIZATIONS)}, alone and merging",
    )
    amount.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of the random control (default 1)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--batch", type=int, default=16, metavar="N", help="samples in a forward (default 16)")
    how.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default 0)")
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    how.add_argument("--device", metavar="DEVICE", help="cpu, cuda, mps … (default: cuda where there is one)")
    how.add_argument("--prompt", metavar="TEXT", help="what the model is asked, {} standing for question or class")
    how.add_argument(
        "--names",
        metavar="PATH",
        help="embeddings of the classes' names, for zoo:clip: a folder or .npy (default: mapped from MiniLM's)",
    )
    how.add_argument(
        "--out", metavar="FOLDER", help="of predictions (default turbovlm-evaluate/TASK-MODEL, and what else was given)"
    )
    add_json_option(how)
    how.add_argument("--plot", metavar="FILE", help="also draw score against cost: .png, .svg or .pdf")
    made = parser.add_argument_group("text-to-image only")
    made.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the pipeline's)")
    made.add_argument("--guidance-scale", type=float, metavar="X", help="instead of the pipeline's own")
    made.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="begin with the real images, noised as far as this share of the steps takes away (default: with noise)",
    )
    made.add_argument("--seed", type=int, metavar="N", help="of the first image; the next has the next (default 0)")
    made.add_argument(
        "--features",
        choices=("inception", "vit"),
        help="that images are compared by (default inception: FID; vit of built-in data)",
    )
    made.add_argument("--pictures", metavar="FOLDER", help="where the images made are kept")
    parser.set_defaults(run=run, kept=kept)


def kept(args: argparse.Namespace) -> str | None:
    """What an interrupted run leaves behind, in words; None if nothing."""
    folder = _folder(args)
    if not any(folder.glob("*.jsonl")):
        return None
    return f"predictions so far are kept in {folder}, and the same command goes on from there"


def run(args: argparse.Namespace) -> int:
    """Read, check, ask, compare, print, and write what was asked for."""
    from turbovlm.cli.measuring import check_numbers
    from turbovlm.cli.output import console, print_table, write_json
    from turbovlm_lab.evaluate.asking import beginning
    from turbovlm_lab.evaluate.study import run_study

    check_numbers(args, "batch", "seeds")
    _check_outputs(args)
    _check_options(args)
    out = console()
    data = _checked(args, _data(args))
    if args.strength is not None:
        data = beginning(data)
    if args.check:
        out.print(f"{data.name}: {len(data.samples)} samples, all of which can be read")
        if args.json:
            write_json(args.json, {"task": args.task, "data": data.name, "samples": len(data.samples)})
        return 0
    model = args.model or _builtin_model(args)
    settings = _settings(args, model)
    _check_fits(args, model, settings)
    predictor, scoring = _predictor(args, model, data)
    settings += _smaller(args, predictor, data, settings)
    folder = _folder(args)
    options = {"batch": args.batch, "workers": args.workers, "scoring": scoring}
    with _progress(len(data.samples) * len(settings)) as advance:
        study = run_study(args.task, model, predictor, data, settings, folder, **options, on_progress=advance)
    print_table(out, f"{study.task}: {study.model} on {study.data}, {study.samples} samples", *study_columns(study))
    if predictor.note:
        out.print(predictor.note)
    out.print(f"predictions: {folder}", soft_wrap=True)
    if args.json:
        write_json(args.json, study.to_dict() | ({"note": predictor.note} if predictor.note else {}))
    if args.plot:
        from turbovlm_lab.evaluate.plot import save_study

        save_study(study, args.plot)
    return 0


def study_columns(study: Study) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each setting, for a terminal."""
    first = study.rows[0]
    weighed = any(row.weights != first.weights for row in study.rows)
    header = ["setting", "MACs", *(["weights"] if weighed else []), *(metric.name for metric in first.metrics)]
    rows = []
    for row in study.rows:
        kept = row.metrics[0].kept
        cells = [
            row.setting if row.image_size is None else f"{row.setting}, {row.image_size} pixels",
            f"{row.macs / 1e9:.2f} G, {row.ratio:.0%}",
            *([f"{row.weights / 1e6:.1f} MB"] if weighed else []),
            *(_value(metric) for metric in row.metrics),
            "" if kept is None else f"{kept.value:.1%} [{kept.low:.1%}, {kept.high:.1%}]",
            "" if row.same is None else f"{row.same.value:.1%}",
        ]
        rows.append(cells)
    return [*header, f"{first.metrics[0].name} kept", "same answer"], rows


def _value(metric: Metric) -> str:
    value = metric.value
    if value.low == value.high:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _formats() -> str:
    from turbovlm_lab.evaluate.readers import formats_of

    return "\n".join(f"  {task}: {formats_of(task)}" for task in TASKS)


def _check_outputs(args: argparse.Namespace) -> None:
    from turbovlm.cli.measuring import check_folder, check_plot
    from turbovlm.cli.output import check_json

    check_plot(args.plot)
    check_json(args)
    check_folder("--out", str(_folder(args)))
    if args.pictures is not None:
        check_folder("--pictures", args.pictures)


def _check_options(args: argparse.Namespace) -> None:
    from turbovlm.cli.measuring import check_making, check_workers

    check_workers(args.workers)
    if args.data is None:
        for name in ("images", "split"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name} says where --data are; the built-in data have none")
    elif args.model is None and not args.check:
        raise ConfigError("--data without --model: the built-in models read the built-in data; give --model")
    if (args.model or _builtin_model(args)).startswith("zoo:"):
        for name, usual in (("dtype", ("float32",)), ("device", (None, "cpu")), ("prompt", (None,))):
            if getattr(args, name) not in usual:
                raise ConfigError(
                    f"--{name} {getattr(args, name)}: built-in models run in float32 on the CPU, asked as they were "
                    "trained; give --model"
                )
    check_making(args)
    if args.task != "text-to-image":
        for name in ("steps", "guidance_scale", "strength", "seed", "features", "pictures"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: only text-to-image has it")


def _data(args: argparse.Namespace) -> Data:
    from turbovlm_lab.evaluate.builtin_data import DATA, IMAGES
    from turbovlm_lab.evaluate.readers import read

    if args.data is not None:
        return read(args.task, args.data, args.images, args.split, args.limit)
    if args.task not in DATA:
        raise ConfigError(f"{args.task}: has no built-in data; give --data and --model")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"limit={args.limit}: must be an integer ≥ 1")
    return DATA[args.task](args.limit or IMAGES)


def _builtin_model(args: argparse.Namespace) -> str:
    from turbovlm_lab.evaluate.builtin_models import MODELS

    return MODELS[args.task]


def _checked(args: argparse.Namespace, data: Data) -> Data:
    """Without what is wrong, where that was asked for. Built-in data are right."""
    from turbovlm.cli.measuring import progress_bar
    from turbovlm_lab.evaluate.check import check

    if args.data is None:
        return data
    with progress_bar(len(data.samples) + len(data.real), "checking") as advance:
        good, bad = check(data, advance)
    for line in bad:
        print(line, file=sys.stderr)
    if not good.samples:
        raise DataError(f"{data.name}: none of its samples can be used")
    if bad and not args.skip_bad:
        raise DataError(f"{data.name}: what is listed above, {len(bad)}, cannot be used; --skip-bad goes on without")
    return good


def _predictor(args: argparse.Namespace, model: str, data: Data) -> tuple[Predictor, Any]:
    import torch

    from turbovlm.cli.measuring import device_named
    from turbovlm_lab.evaluate.asked_model import AskedModel
    from turbovlm_lab.evaluate.asking import asked
    from turbovlm_lab.evaluate.predictors.images import Making

    folder = None if args.pictures is None else Path(args.pictures)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    spec = AskedModel(model, device_named(args.device), getattr(torch, args.dtype), args.prompt, args.names)
    making = Making(args.steps, args.guidance_scale, args.seed or 0, folder, args.strength)
    return asked(args.task, spec, data, making, args.features or ("inception" if args.data else "vit"))


def _settings(args: argparse.Namespace, model: str) -> list[Setting]:
    """The model itself, and all that merges in it or quantises it; known before the model is loaded."""
    from turbovlm.workflows import configs_from
    from turbovlm_lab.evaluate.run import Setting
    from turbovlm_lab.evaluate.settings import OWN, methods, on_quantized

    denoises = args.task == "text-to-image"
    default = {"keep": DEFAULT_KEEP} if denoises else {"flops": DEFAULT_FLOPS}
    given = {name: getattr(args, name) for name in AMOUNTS if getattr(args, name) is not None}
    amounts = configs_from((), given or default, denoises, model)
    controls = _controls(args)
    if denoises and controls:
        raise ConfigError("--controls: text-to-image has none; benchmarks/diffusion_quality.py compares matchings")
    named = ("turbovlm", *(name for name in controls if name != "smaller"))
    found = [Setting(OWN), *methods(amounts, named, args.seeds), *_from_files(args)]
    found += on_quantized(args.quantize or (), [each for each in found if each.configs])
    names = [each.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--settings: several rows would be called {twice!r}; rename a file")
    return found


def _controls(args: argparse.Namespace) -> tuple[str, ...]:
    return CONTROLS if args.controls == [] else tuple(args.controls or ())


def _smaller(
    args: argparse.Namespace, predictor: Predictor, data: Data, settings: Sequence[Setting]
) -> tuple[Setting, ...]:
    """The control of smaller images, where it is asked for, at what the first setting that merges costs."""
    from turbovlm_lab.evaluate.settings import encoder_macs, smaller

    if "smaller" not in _controls(args):
        return ()
    if predictor.image_sizes:
        macs = encoder_macs(predictor, data.samples[0], settings[1])
        return (smaller(predictor, data.samples[0], macs, "smaller"),)
    if args.controls:
        raise ConfigError("--controls smaller: this model takes images of one size only")
    return ()


def _from_files(args: argparse.Namespace) -> list[Setting]:
    from turbovlm import config
    from turbovlm.settings_file import read_content
    from turbovlm_lab.evaluate.run import Setting

    kinds = {file: getattr(config, read_content(file)["kind"]) for file in args.settings or ()}
    found = [Setting(Path(file).stem, (kind.load(file),)) for file, kind in kinds.items()]
    for setting in found:
        if setting.per_image and args.batch > 1:
            raise ConfigError(f"--batch {args.batch}: {setting.name} has thresholds, which are for --batch 1")
    return found


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], object]]:
    from turbovlm.cli.measuring import progress_bar

    with progress_bar(total, "evaluating") as advance:
        yield lambda _, done: advance(done)


ALL_CHANGE = ("split", "limit", "dtype", "prompt", "names", "steps", "guidance_scale", "strength", "seed", "features")
"""Options that change every prediction, the unmerged ones too: each of their values has a default folder of its own."""


def _folder(args: argparse.Namespace) -> Path:
    """Of the predictions."""
    from turbovlm_lab.evaluate.study import file_name

    if args.out is not None:
        return Path(args.out)
    usual = {"dtype": "float32"}
    changed = [name for name in ALL_CHANGE if getattr(args, name) != usual.get(name)]
    data = [Path(name).stem for name in args.data or ()]
    parts = [args.task, args.model or _builtin_model(args), *data, *(f"{n}={getattr(args, n)}" for n in changed)]
    return Path("turbovlm-evaluate") / file_name("-".join(parts))


def _check_fits(args: argparse.Namespace, model: str, settings: Sequence[Setting]) -> None:
    """Refuse settings that a model from a folder or the hub does not fit before its weights are loaded."""
    import turbovlm
    from turbovlm.config import TurboConfig
    from turbovlm.loading import ModelSpec
    from turbovlm.loading.models import check_runs, load_model

    spec = ModelSpec(model, "meta")
    if spec.library not in ("transformers", "timm") or args.task == "text-to-image":
        return
    outline = load_model(spec)
    merging = [setting.configs for setting in settings if setting.configs]
    if any(isinstance(config, TurboConfig) for configs in merging for config in configs):
        check_runs(model, outline, "meta")
    for configs in merging:
        turbovlm.apply(outline, *configs).remove()
