"""Models around one that reads images, which encode them and fill the placeholders themselves."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from turbovlm.patching import Patch
from turbovlm.registry import class_paths
from turbovlm.vlm.marks import ENCODED

MODELS = "transformers.models"
COL_QWEN2 = f"{MODELS}.colqwen2.modeling_colqwen2.ColQwen2ForRetrieval"


def fills_itself(around: nn.Module) -> bool:
    """Whether a module is a ColQwen2, whose images `encode_apart` encodes."""
    return COL_QWEN2 in class_paths(around)


def encode_apart(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run ColQwen2's forward on embeddings with open placeholders, which bring along what is to stand there."""
    pixels, grid, ids = (inputs.get(name) for name in ("pixel_values", "image_grid_thw", "input_ids"))
    if pixels is None or grid is None or ids is None or inputs.get("inputs_embeds") is not None:
        return original(**inputs)
    if pixels.ndim == 3:  # its processor pads images to a batch, `[images, patches, values]`
        counts = grid[:, 1] * grid[:, 2]
        pixels = pixels[counts.new_tensor(range(pixels.shape[1])) < counts.unsqueeze(1)]
    encoded = model.vlm.get_image_features(pixels, grid, return_dict=True)
    embeds = model.vlm.get_input_embeddings()(ids)
    setattr(embeds, ENCODED, {"image": encoded})
    return original(**{**inputs, "input_ids": None, "inputs_embeds": embeds, "pixel_values": None})
