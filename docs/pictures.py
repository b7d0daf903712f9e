"""Draws a figure of docs:  python docs/pictures.py; README's is drawn by benchmarks/demo.py.

emoji.png: what the small text-to-image model makes of eight prompts, each from one seed, at four values of keep.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import turbovlm
from turbovlm_lab.zoo.emoji import PLACES, load_emoji_pipeline

IMAGES = Path(__file__).parent / "images"
GAP = 6
PROMPTS = ("red apple", "dog face", "tulip", "penguin", "hamburger", "watermelon", "frog", "cactus")
KEEPS = (1.0, 0.8, 0.7, 0.5)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    emoji_sheet().save(IMAGES / "emoji.png", optimize=True)


def emoji_sheet() -> Image.Image:
    """Prompts in columns, on white and on photographs in turn; shares kept in rows."""
    side, margin = 128, 84
    pipe = load_emoji_pipeline()
    prompts = [f"{name}, noto, {PLACES[i % 2]}" for i, name in enumerate(PROMPTS)]
    sheet = Image.new("RGB", (margin + (side + GAP) * len(PROMPTS) - GAP, (side + GAP) * len(KEEPS) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for row, keep in enumerate(KEEPS):
        seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        with turbovlm.apply(pipe, keep=keep):
            made = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=seeds).images
        y = row * (side + GAP)
        draw.text((0, y + side // 2), f"keep={keep:g}", fill="black", font=font, anchor="lm")
        for column, image in enumerate(made):
            large = image.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(large, (margin + column * (side + GAP), y))
    return sheet


if __name__ == "__main__":
    main()
