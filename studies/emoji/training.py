"""What the trainings of both text-to-image models share: averaged weights, and sheets of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn

GAP = 2
COLUMNS = 8


@torch.no_grad()
def blend(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's, by 1 − `decay` of the way."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def tiled(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size in rows of eight, enlarged to 128 pixels."""
    cell = images[0].width + GAP
    rows = -(-len(images) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * cell, rows * cell), "white")
    for i, image in enumerate(images):
        whole.paste(image, (i % COLUMNS * cell, i // COLUMNS * cell))
    scale = 128 // images[0].width
    return whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.NEAREST)
