"""Draws the figures of README and docs:  python docs/pictures.py

groups.png, each row: the photograph; which patches have become one token after blocks 3, 6, 9 and 12; the saliency map
of the full model; that from the merged tokens, restored to the grid. White lines enclose the salient region.

emoji.png: what the small text-to-image model makes of eight prompts, each from one seed, at four values of keep.
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import turbovlm
from turbovlm.visualize import groups, heatmap
from turbovlm_lab.demo.photos import load_photos
from turbovlm_lab.zoo import load_saliency_vit, preprocess
from turbovlm_lab.zoo.emoji import PLACES, load_emoji_pipeline

IMAGES = Path(__file__).parent / "images"
SHOWN = ("chelsea", "coffee", "flower")
BLOCKS = (2, 5, 8, 11)
GAP = 6
PROMPTS = ("red apple", "dog face", "tulip", "penguin", "hamburger", "watermelon", "frog", "cactus")
KEEPS = (1.0, 0.8, 0.7, 0.5)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    groups_sheet().quantize(255).save(IMAGES / "groups.png", optimize=True)
    emoji_sheet().save(IMAGES / "emoji.png", optimize=True)


@torch.inference_mode()
def groups_sheet() -> Image.Image:
    model = load_saliency_vit()
    photos = [photo for photo in load_photos() if photo.name in SHOWN]
    pixels = preprocess([photo.image for photo in photos])
    full = model(pixels)
    with turbovlm.apply(model.backbone, r=16, trace=True) as handle:
        tokens = model.backbone(pixel_values=pixels).last_hidden_state
        merged = model.head(handle.restore(tokens)[:, 1:])
        trace = handle.trace
    rows = []
    for i, photo in enumerate(photos):
        drawn = [groups(trace, photo.image, block=b, batch_index=i, cell=14) for b in BLOCKS]
        maps = [heatmap(heat[i, 0], photo.image, high=1.0, outline=0.5) for heat in (full, merged)]
        rows.append([image.resize((224, 224)) for image in (photo.image, *drawn, *maps)])
    step = 224 + GAP
    sheet = Image.new("RGB", (step * len(rows[0]) - GAP, step * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * step, y * step))
    return sheet


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
