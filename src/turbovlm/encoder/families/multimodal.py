"""The image towers of `transformers`' models that pair images with text, and ViLT, which reads both as one sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.families.transformers import MODELS, VIT, inside, native_input, native_patches
from turbovlm.encoder.layout import IN_THE_MIDDLE, Layout, variant


def _native_patches_in_rows(tower: Any) -> dict[str, Tensor | None]:
    """SigLIP 2 takes the patches of images of any shape, and their rows and columns; here a square."""
    patches = int(tower.config.num_patches)
    return {
        "pixel_values": torch.empty(1, patches, tower.embeddings.patch_embedding.in_features, device="meta"),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.full((1, 2), int(patches**0.5), device="cpu"),
    }


def _longest_text_and_image(tower: Any) -> dict[str, Tensor | None]:
    words = torch.zeros(1, tower.config.max_position_embeddings, dtype=torch.long)
    return {"input_ids": words, **native_input(tower)}


def _internvl_project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = block.attention
    return attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x)), attention.v_proj(x)


CLIP = Layout(
    family="transformers CLIP",
    block=f"{MODELS}.clip.modeling_clip.CLIPEncoderLayer",
    towers=(f"{MODELS}.clip.modeling_clip.CLIPVisionModel", f"{MODELS}.clip.modeling_clip.CLIPVisionTransformer"),
    norm1="layer_norm1",
    project=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    heads="self_attn.num_heads",
    after_attention=("self_attn.out_proj",),
    mlp=("layer_norm2", "mlp"),
    patch="embeddings.patch_embedding",
    patches=native_patches,
    scale="self_attn.scale",
    dropout="self_attn.dropout",
    arguments=("attention_mask", "causal_attention_mask"),
    mask="attention_mask",
    blocks_at=IN_THE_MIDDLE,
    restore=inside("CLIPForImageClassification"),
    inputs=native_input,
)

SIGLIP = variant(
    CLIP,
    family="transformers SigLIP",
    block=f"{MODELS}.siglip.modeling_siglip.SiglipEncoderLayer",
    towers=(
        f"{MODELS}.siglip.modeling_siglip.SiglipVisionModel",
        f"{MODELS}.siglip.modeling_siglip.SiglipVisionTransformer",
    ),
    prefix=0,
    cls=False,
    blocks_at=(),
    restore=True,
)

SIGLIP2 = variant(
    SIGLIP,
    family="transformers SigLIP 2",
    block=f"{MODELS}.siglip2.modeling_siglip2.Siglip2EncoderLayer",
    towers=(
        f"{MODELS}.siglip2.modeling_siglip2.Siglip2VisionModel",
        f"{MODELS}.siglip2.modeling_siglip2.Siglip2VisionTransformer",
    ),
    patches=lambda tower: int(tower.config.num_patches),
    inputs=_native_patches_in_rows,
)

BLIP = variant(
    CLIP,
    family="transformers BLIP",
    block=f"{MODELS}.blip.modeling_blip.BlipEncoderLayer",
    towers=(f"{MODELS}.blip.modeling_blip.BlipVisionModel",),
    project=("self_attn.qkv",),
    after_attention=("self_attn.projection",),
    dropout="self_attn.dropout",
    blocks_at=(),
    restore=False,
)

BLIP_2 = variant(
    BLIP,
    family="transformers BLIP-2",
    block=f"{MODELS}.blip_2.modeling_blip_2.Blip2EncoderLayer",
    towers=(f"{MODELS}.blip_2.modeling_blip_2.Blip2VisionModel",),
    dropout="self_attn.attention_dropout|self_attn.dropout",
)

INSTRUCT_BLIP = variant(
    BLIP_2,
    family="transformers InstructBLIP",
    block=f"{MODELS}.instructblip.modeling_instructblip.InstructBlipEncoderLayer",
    towers=(f"{MODELS}.instructblip.modeling_instructblip.InstructBlipVisionModel",),
)

INTERN_VL = Layout(
    family="transformers InternVL vision",
    block=f"{MODELS}.internvl.modeling_internvl.InternVLVisionLayer",
    towers=(f"{MODELS}.internvl.modeling_internvl.InternVLVisionModel",),
    norm1="layernorm_before",
    project=_internvl_project,
    heads="attention.num_heads",
    after_attention=("attention.projection_layer", "attention.projection_dropout", "lambda_1"),
    mlp=("layernorm_after", "mlp", "dropout", "lambda_2"),
    patch="embeddings.patch_embeddings.projection",
    patches=native_patches,
    dropout="attention.attention_dropout",
    calls=tuple(f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")),
    restore=True,
    inputs=native_input,
)

IDEFICS3 = variant(
    SIGLIP,
    family="transformers Idefics3 vision",
    block=f"{MODELS}.idefics3.modeling_idefics3.Idefics3EncoderLayer",
    towers=(f"{MODELS}.idefics3.modeling_idefics3.Idefics3VisionTransformer",),
)

SMOL_VLM = variant(
    IDEFICS3,
    family="transformers SmolVLM vision",
    block=f"{MODELS}.smolvlm.modeling_smolvlm.SmolVLMEncoderLayer",
    towers=(f"{MODELS}.smolvlm.modeling_smolvlm.SmolVLMVisionTransformer",),
)

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

LAYOUTS = (
    CLIP,
    SIGLIP,
    SIGLIP2,
    BLIP,
    BLIP_2,
    INSTRUCT_BLIP,
    INTERN_VL,
    IDEFICS3,
    SMOL_VLM,
    VILT,
)

FIXED_READERS = ("blip-2", "instructblip", "instructblipvideo")
"""Model types with image placeholders in the prompt whose number does not depend on the tower's tokens."""


def placeholders(module: nn.Module) -> str | None:
    """Why a vision-language model needs a fixed number of visual tokens, or None where it does not."""
    config = getattr(module, "config", None)
    if config is None or getattr(config, "model_type", None) in FIXED_READERS:
        return None
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return (
                f"{type(module).__name__} has one placeholder per visual token in its prompt ({name} in its config): "
                "a shorter tower output would not fit them"
            )
    return None
