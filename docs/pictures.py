"""Draws the figures of docs:  python docs/pictures.py; README's is drawn by benchmarks/demo.py.

emoji.png: what the small text-to-image model makes of eight prompts, each from one seed, at four values of keep.
moving.png: every second frame of what the small text-to-video model makes of two prompts, at three.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

import turbovlm
from turbovlm_lab.zoo.emoji import PLACES, load_emoji_pipeline
from turbovlm_lab.zoo.moving import load_moving_pipeline

IMAGES = Path(__file__).parent / "images"
GAP, SIDE, MARGIN = 6, 128, 84
PROMPTS = ("red apple", "dog face", "tulip", "penguin", "hamburger", "watermelon", "frog", "cactus")
VIDEOS = ("red apple, on white, moving left", "sunflower, on a photo, moving right")
Row = tuple[str, Sequence[Image.Image]]


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, rows in {"emoji": emoji_rows(), "moving": moving_rows()}.items():
        sheet(list(rows)).save(IMAGES / f"{name}.png", optimize=True)


def emoji_rows() -> Iterator[Row]:
    """A row for each share kept; prompts on white and on photographs in turn."""
    pipe = load_emoji_pipeline()
    prompts = [f"{name}, noto, {PLACES[i % 2]}" for i, name in enumerate(PROMPTS)]
    for keep in (1.0, 0.8, 0.7, 0.5):
        with turbovlm.apply(pipe, keep=keep):
            made = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=seeds(len(prompts))).images
        yield f"keep={keep:g}", made


def moving_rows() -> Iterator[Row]:
    """A row for each share kept of every video."""
    pipe = load_moving_pipeline()
    made: dict[float, Any] = {}
    for keep in (1.0, 0.7, 0.5):
        with turbovlm.apply(pipe, keep=keep):
            made[keep] = pipe(list(VIDEOS), output_type="pil", generator=seeds(len(VIDEOS))).frames
    for i in range(len(VIDEOS)):
        for keep, videos in made.items():
            yield f"keep={keep:g}", videos[i][::2]


def seeds(count: int) -> list[torch.Generator]:
    """Generators, the same ones every time."""
    return [torch.Generator().manual_seed(i) for i in range(count)]


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Rows of images behind what they are called."""
    columns = len(rows[0][1])
    whole = Image.new("RGB", (MARGIN + (SIDE + GAP) * columns - GAP, (SIDE + GAP) * len(rows) - GAP), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(size=15)
    for row, (label, images) in enumerate(rows):
        y = row * (SIDE + GAP)
        draw.text((0, y + SIDE // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            large = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            whole.paste(large, (MARGIN + column * (SIDE + GAP), y))
    return whole


if __name__ == "__main__":
    main()
