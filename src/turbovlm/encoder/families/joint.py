"""Single towers that read text and image as one sequence: text tokens in front, which are never merged."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.families.transformers import MODELS, VIT, native_input, native_patches
from turbovlm.encoder.layout import variant
from turbovlm.encoder.state import PREFIX


def joining_forward(embeddings: nn.Module, plan: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of what puts text and image together, with the number of text tokens and CLS attached.

    Returns:
        The library's own `(tokens, mask)`.
    """
    method = type(embeddings).forward
    text = inspect.signature(method).bind(embeddings, *args, **kwargs).arguments["attention_mask"]
    tokens, mask = method(embeddings, *args, **kwargs)
    setattr(tokens, PREFIX, text.shape[1] + 1)
    return tokens, mask


def _longest_text_and_image(tower: Any) -> dict[str, Tensor | None]:
    words = torch.zeros(1, tower.config.max_position_embeddings, dtype=torch.long)
    return {"input_ids": words, **native_input(tower)}


VILT = variant(
    VIT,
    family="transformers ViLT",
    block=f"{MODELS}.vilt.modeling_vilt.ViltLayer",
    towers=(f"{MODELS}.vilt.modeling_vilt.ViltModel",),
    patches=lambda tower: min(native_patches(tower), max(tower.config.max_image_length, 0) or native_patches(tower)),
    prefix=lambda tower: int(tower.config.max_position_embeddings) + 1,
    joint="embeddings",
    arguments=("attention_mask", "output_attentions"),
    restore=False,
    returns_tuple=True,
    inputs=_longest_text_and_image,
)

LAYOUTS = (VILT,)
