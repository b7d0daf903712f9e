"""What the examples share: options, images, and running a model with and without turbovlm."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import turbovlm

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}


def parser_of(doc: str, model: str, r: int | None = None, visual_keep: float | None = None) -> argparse.ArgumentParser:
    """A parser with the options that every example has; `r` and `visual_keep` are its defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model, help=f"hub id or local folder (default: {model})")
    parser.add_argument(
        "--r", type=int, default=r, help=f"tokens merged per block of the tower on average (default: {r})"
    )
    parser.add_argument(
        "--visual-keep",
        type=share_or_count,
        default=visual_keep,
        help=f"share (0.5) or count (128) of the visual tokens that are read (default: {visual_keep})",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3, help="how often each version is timed (default: 3)")
    return parser


def share_or_count(text: str) -> float | int:
    """What `--visual-keep` says."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share such as 0.5 nor a count such as 128") from None


def load(parser: argparse.ArgumentParser, args: argparse.Namespace, auto: Any) -> tuple[Any, Any]:
    """The model, in eval mode, and its processor."""
    from transformers import AutoProcessor

    try:
        model = auto.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        return model.eval().to(args.device), AutoProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model {args.model}: {' '.join(str(error).split())}")


def images(parser: argparse.ArgumentParser, paths: list[Path]) -> dict[str, Image.Image]:
    """The images at `paths`, by name; of a folder, all in it."""
    files = []
    for path in paths:
        if not path.exists():
            parser.error(f"{path}: there is no such file or folder")
        files += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES) if path.is_dir() else [path]
    if not files:
        parser.error(f"{', '.join(map(str, paths))}: no image ({', '.join(sorted(IMAGES))}) in there")
    try:
        return {str(file): Image.open(file).convert("RGB") for file in files}
    except OSError as error:
        parser.error(f"no image: {error}")


def side_by_side(
    parser: argparse.ArgumentParser, args: argparse.Namespace, model: Any, answer: Callable[[], list[str]]
) -> None:
    """Print what `answer` says without turbovlm and with it, and how long each takes, run in turn."""
    settings = {name: getattr(args, name) for name in ("r", "visual_keep") if getattr(args, name) is not None}
    said: dict[str, list[str]] = {}
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    with torch.inference_mode():
        for turn in range(args.repeat + 1):
            for version in seconds:
                try:
                    handle = turbovlm.apply(model, **settings) if version == "with" else None
                except turbovlm.TurboError as error:
                    parser.error(str(error))
                start = time.perf_counter()
                said[version] = answer()
                if turn > 0:
                    seconds[version].append(time.perf_counter() - start)
                if handle is not None:
                    handle.remove()
    for version, lines in said.items():
        took = statistics.median(seconds[version]) if args.repeat else float("nan")
        amount = f" ({', '.join(f'{name}={value}' for name, value in settings.items())})" if version == "with" else ""
        print(f"{version} turbovlm{amount}: {took:.2f} s")
        for line in lines:
            print(f"  {line}")
