"""Draws the pictures of README and docs:  python docs/pictures.py

Each row: the photograph; which patches have become one token after blocks 3, 6, 9 and 12; the saliency map of the full
model; the saliency map from the merged tokens, restored to the grid. White lines enclose the salient region.
"""

from pathlib import Path

import torch
from PIL import Image

import turbovlm
from turbovlm.demo.photos import load_photos
from turbovlm.visualize import groups, heatmap
from turbovlm.zoo import load_saliency_vit, preprocess

SHOWN = ("chelsea", "coffee", "flower")
BLOCKS = (2, 5, 8, 11)
GAP = 6


@torch.inference_mode()
def main() -> None:
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
        rows.append([picture.resize((224, 224)) for picture in (photo.image, *drawn, *maps)])
    step = 224 + GAP
    sheet = Image.new("RGB", (step * len(rows[0]) - GAP, step * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * step, y * step))
    target = Path(__file__).parent / "images" / "groups.png"
    target.parent.mkdir(exist_ok=True)
    sheet.quantize(255).save(target, optimize=True)


if __name__ == "__main__":
    main()
