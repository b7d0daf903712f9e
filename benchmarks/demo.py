"""The demo's output as README shows it:  python benchmarks/demo.py, two minutes on two cores.

Runs what `turbovlm demo --saliency` runs, and writes benchmarks/results/demo.{json,txt}, docs/images/demo.png, and what
stands in README.md between `<!-- written by benchmarks/demo.py -->` and `<!-- end -->`.

demo.png: photographs; which of their patches have become one token after the last block; the likeliest label and its
probability, unmerged in grey and merged in blue.
"""

from __future__ import annotations

import argparse
import io
import re
import textwrap
from pathlib import Path

import torch
from cases import RESULTS, save
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from turbovlm_lab.cli.demo import run_demo, show, texts
from turbovlm_lab.demo.photos import load_photos
from turbovlm_lab.demo.report import machine_line, markdown, to_json
from turbovlm_lab.demo.result import Example, Result, Settings

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "images" / "demo.png"
BLOCK = re.compile(r"(<!-- written by benchmarks/demo\.py -->\n).*?(<!-- end -->)", flags=re.DOTALL)
SIDE, GAP, LINE = 224, 14, 26
GREY, BLUE, RED, INK = "#a4adb8", "#0060a8", "#c2410c", "#1c1c1c"
COLUMNS = 88


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", metavar="PATH", help="labels embedded by CLIP's own text tower; see turbovlm demo")
    parser.add_argument("--threads", type=int, metavar="N", help="threads PyTorch computes with (default: its own)")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    result = run_demo(Settings(), load_photos(), *texts(None, args.names), with_saliency=True)
    printed = io.StringIO()
    show(result, Console(file=printed, width=COLUMNS))
    save(RESULTS / "demo.json", to_json(result))
    (RESULTS / "demo.txt").write_text(printed.getvalue(), encoding="utf-8")
    picture(result).quantize(255).save(PICTURE, optimize=True)
    README.write_text(written_into(README.read_text(encoding="utf-8"), result), encoding="utf-8")
    print(printed.getvalue())


def written_into(page: str, result: Result) -> str:
    """The page with this result's table."""
    labels = f"{len(result.texts.labels)} labels by {result.texts.source}"
    said = textwrap.fill(
        f"CLIP ViT-B/16 on {len(result.found)} photographs and crops, fp32, batch {result.settings.batch}; {labels}. "
        f"{machine_line(result.machine)}.",
        width=120,
        break_on_hyphens=False,
    )
    block, found = BLOCK.subn(lambda match: f"{match[1]}{markdown(result)}\n\n{said}\n{match[2]}", page)
    if found != 1:
        raise SystemExit(f"{README}: {found} places for the table instead of one")
    return block


def picture(result: Result) -> Image.Image:
    """One column for each photograph."""
    step = SIDE + GAP
    sheet = Image.new("RGB", (step * len(result.examples) - GAP, 2 * step + 4 * LINE + 8), "white")
    for column, example in enumerate(result.examples):
        (_, merged) = list(example.groups.values())[-1]
        for row, image in enumerate((example.photo.image, merged)):
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (column * step, row * step))
        _draw_label(ImageDraw.Draw(sheet), column * step, 2 * step, example)
    return sheet


def _draw_label(draw: ImageDraw.ImageDraw, left: int, top: int, example: Example) -> None:
    (label, *probabilities) = example.labels[0]
    merged = max(example.labels, key=lambda entry: entry[2])[0]
    draw.text((left, top), label, fill=INK, font=ImageFont.load_default(size=25))
    small, width = ImageFont.load_default(size=18), SIDE - 70
    for number, (probability, color) in enumerate(zip(probabilities, (GREY, BLUE))):
        y = top + 38 + number * LINE
        draw.rounded_rectangle((left, y, left + max(3, round(width * probability)), y + 13), 3, fill=color)
        draw.text((left + SIDE, y + 6), f"{probability:.1%}", fill=INK, font=small, anchor="rm")
    if merged != label:
        draw.text((left, top + 38 + 2 * LINE), f"merged: {merged}", fill=RED, font=small, anchor="lt")


if __name__ == "__main__":
    main()
