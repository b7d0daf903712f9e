"""The vision towers of vLLM that can merge tokens, as data. Imports nothing of vLLM.

Their projections give a tuple, of which the tokens are the first, and queries, keys and values at once. Weights are
vLLM's to pack, so that its own modules are called; attention alone is turbovlm's, as vLLM's takes no bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.encoder.families import multimodal
from turbovlm.encoder.layout import variant

MODELS = "vllm.model_executor.models"
CHANNELS = 3


def _project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = block.self_attn.qkv_proj(x)[0].chunk(3, dim=-1)
    return q, k, v


def _native_input(tower: Any) -> dict[str, Tensor | None]:
    side = int(tower.config.image_size)
    return {"pixel_values": torch.empty(1, CHANNELS, side, side, device="meta")}


CLIP = variant(
    multimodal.CLIP,
    family="vLLM CLIP",
    block=f"{MODELS}.clip.CLIPEncoderLayer",
    towers=(f"{MODELS}.clip.CLIPVisionTransformer",),
    project=_project,
    calls=("self_attn.qkv_proj",),
    heads="self_attn.num_heads_per_partition",
    dropout=None,
    arguments=(),
    mask=None,
    returns_tuple=0,
    restore=True,
    inputs=_native_input,
)

SIGLIP = variant(
    CLIP,
    family="vLLM SigLIP",
    block=f"{MODELS}.siglip.SiglipEncoderLayer",
    towers=(f"{MODELS}.siglip.SiglipVisionTransformer",),
    prefix=multimodal.SIGLIP.prefix,
    cls=multimodal.SIGLIP.cls,
    blocks_at=multimodal.SIGLIP.blocks_at,
    returns_tuple=2,
)

LAYOUTS = (CLIP, SIGLIP)
