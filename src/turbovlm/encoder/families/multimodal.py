"""The image towers of `transformers`' models that pair images with text, and ViLT, which reads both as one sequence."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.families.transformers import MODELS, VIT, inside, native_input, native_patches
from turbovlm.encoder.layout import IN_THE_MIDDLE, Around, Layout, variant


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


def _needs_grid(tower: Any, block: Any, ancestors: Around) -> str | None:
    return "the squares of patches that its visual tokens are made of need the grid"


def _internvl_project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = block.attention
    return attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x)), attention.v_proj(x)


def _gemma4_project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = block.self_attn
    values = attention.v_proj(x)
    normed = attention.v_norm(values.unflatten(-1, (-1, attention.head_dim)))
    return attention.q_proj(x), attention.k_proj(x), normed.flatten(-2)


def _gemma4_rotary(
    block: nn.Module, q: Tensor, k: Tensor, positions: Tensor | None, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    rotate = sys.modules[type(block).__module__].apply_multidimensional_rope
    (cos, sin), places = arguments["position_embeddings"], arguments["position_ids"]
    return rotate(q, cos, sin, places, unsqueeze_dim=1), rotate(k, cos, sin, places, unsqueeze_dim=1)


def _llama4_rotary(
    block: nn.Module, q: Tensor, k: Tensor, positions: Tensor | None, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    rotate = sys.modules[type(block).__module__].vision_apply_rotary_emb
    rotated = rotate(q.transpose(1, 2), k.transpose(1, 2), freqs_ci=arguments["freqs_ci"])
    return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)


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

OVIS_2 = variant(
    SIGLIP,
    family="transformers Ovis 2 vision",
    block=f"{MODELS}.ovis2.modeling_ovis2.Ovis2VisionEncoderLayer",
    towers=(f"{MODELS}.ovis2.modeling_ovis2.Ovis2VisionTransformer",),
    norm1="rms_norm1",
    project=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    heads="attention.num_heads",
    after_attention=("attention.out_proj",),
    mlp=("rms_norm2", "ffn"),
    patch="embeddings.patch_embedding",
    scale="attention.scale",
    dropout="attention.dropout",
    refuse=_needs_grid,
)

JANUS = variant(
    SIGLIP,
    family="transformers Janus vision",
    block=f"{MODELS}.janus.modeling_janus.JanusVisionEncoderLayer",
    towers=(f"{MODELS}.janus.modeling_janus.JanusVisionModel",),
    after_attention=("self_attn.projection_layer", "self_attn.projection_dropout"),
    dropout="self_attn.attention_dropout",
)

GEMMA_4 = Layout(
    family="transformers Gemma 4 vision",
    block=f"{MODELS}.gemma4.modeling_gemma4.Gemma4VisionEncoderLayer",
    towers=(f"{MODELS}.gemma4.modeling_gemma4.Gemma4VisionModel",),
    norm1="input_layernorm",
    project=_gemma4_project,
    heads="self_attn.config.num_attention_heads",
    after_attention=("self_attn.o_proj", "post_attention_layernorm"),
    mlp=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    patch="patch_embedder.input_proj",
    patches=lambda tower: int(tower.config.position_embedding_size),
    prefix=0,
    cls=False,
    scale="self_attn.scaling",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    calls=tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "v_norm")),
    rotary=_gemma4_rotary,
    understood=("position_embeddings", "position_ids"),
    mask="attention_mask",
    refuse=_needs_grid,
    inputs=native_input,
)

LLAMA_4 = Layout(
    family="transformers Llama 4 vision",
    block=f"{MODELS}.llama4.modeling_llama4.Llama4VisionEncoderLayer",
    towers=(f"{MODELS}.llama4.modeling_llama4.Llama4VisionModel",),
    norm1="input_layernorm",
    project=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    heads="self_attn.num_heads",
    after_attention=("self_attn.o_proj",),
    mlp=("post_attention_layernorm", "mlp"),
    patch="patch_embedding.linear",
    patches=native_patches,
    prefix=0,
    suffix=1,
    cls=False,
    dropout="self_attn.attention_dropout",
    rotary=_llama4_rotary,
    arguments=("freqs_ci", "attention_mask"),
    understood=("freqs_ci",),
    refuse=_needs_grid,
    inputs=native_input,
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
    OVIS_2,
    JANUS,
    GEMMA_4,
    LLAMA_4,
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
