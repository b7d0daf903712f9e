"""The blocks of `transformers`' vision encoders."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.layout import Around, Layout, native_image, variant

MODELS = "transformers.models"


def native_patches(tower: Any) -> int:
    """Patches of an image of the size in the tower's config."""
    config: Any = tower.config
    height, width = _pair(config.image_size)
    rows, columns = _pair(config.patch_size)
    return int((height // rows) * (width // columns))


def _video_patches(tower: Any) -> int:
    return native_patches(tower) * int(tower.config.num_frames // tower.config.tubelet_size)


def _visible_patches(tower: Any) -> int:
    return int(native_patches(tower) * (1 - tower.config.mask_ratio))


def _registers(tower: Any) -> int:
    return 1 + int(tower.config.num_register_tokens)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


def native_input(tower: Any) -> dict[str, Tensor | None]:
    """One image of the size in the tower's config."""
    return {"pixel_values": native_image(tower, tower.config.image_size)}


def _native_video(tower: Any) -> dict[str, Tensor | None]:
    return {"pixel_values": native_image(tower, tower.config.image_size, tower.config.num_frames)}


def _native_patches_in_rows(tower: Any) -> dict[str, Tensor | None]:
    """SigLIP 2 takes the patches of images of any shape, and their rows and columns; here a square."""
    patches = int(tower.config.num_patches)
    return {
        "pixel_values": torch.empty(1, patches, tower.embeddings.patch_embedding.in_features, device="meta"),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.full((1, 2), int(patches**0.5), device="cpu"),
    }


def _inside(*names: str) -> Any:
    """Whether the tower is, or is part of, one of `transformers`' classes `names`."""

    def inside(tower: Any, ancestors: Around) -> bool:
        bases = [cls for module in ancestors for cls in type(module).__mro__]
        return any(cls.__name__ in names and cls.__module__.startswith(MODELS) for cls in bases)

    return inside


def _backbone(tower: Any, block: Any, ancestors: Around) -> str | None:
    around: tuple[Any, ...] = ancestors
    for module in around:
        if type(module).__name__.endswith("Backbone") and list(module.out_features) != list(module.stage_names)[-1:]:
            return f"{type(module).__name__} hands out the grids of several blocks ({', '.join(module.out_features)})"
    return None


def _longest_text_and_image(tower: Any) -> dict[str, Tensor | None]:
    words = torch.zeros(1, tower.config.max_position_embeddings, dtype=torch.long)
    return {"input_ids": words, **native_input(tower)}


def _positions_between_blocks(tower: Any, block: Any, ancestors: Around) -> str | None:
    if tower.config.use_mid_position_embeddings:
        return "it adds position embeddings between its blocks, to tokens that would be merged by then"
    return None


def _relative_positions(tower: Any, block: Any, ancestors: Around) -> str | None:
    if tower.config.use_relative_position_bias or tower.config.use_shared_relative_position_bias:
        return (
            "its relative position bias is a table over pairs of grid positions, in which merged tokens have no place; "
            "gathering it for every picture would build the N×N map that attention avoids"
        )
    return None


def _rotary(
    block: nn.Module, q: Tensor, k: Tensor, positions: Tensor | None, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    cos, sin = arguments["position_embeddings"]
    if positions is not None:
        cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    rotated: tuple[Tensor, Tensor] = sys.modules[type(block).__module__].apply_rotary_pos_emb(q, k, cos, sin)
    return rotated


def _rotary_example(block: Any, patches: int) -> dict[str, Any]:
    angles = torch.linspace(0, 3, patches).unsqueeze(1) * torch.linspace(1, 2, block.attention.head_dim)
    return {"position_embeddings": (angles.cos(), angles.sin())}


VIT = Layout(
    family="transformers ViT",
    block=f"{MODELS}.vit.modeling_vit.ViTLayer",
    towers=(f"{MODELS}.vit.modeling_vit.ViTModel",),
    norm1="layernorm_before",
    project=(
        "attention.q_proj|attention.attention.query",
        "attention.k_proj|attention.attention.key",
        "attention.v_proj|attention.attention.value",
    ),
    heads="attention.num_attention_heads|attention.attention.num_attention_heads",
    after_attention=("attention.o_proj|attention.output.dense", "dropout|attention.output.dropout"),
    mlp=("layernorm_after", "mlp|intermediate", "output.dense?", "dropout|output.dropout"),
    patch="embeddings.patch_embeddings.projection",
    patches=native_patches,
    dropout="attention.attention_dropout|attention.attention.dropout_prob|attention.attention.dropout",
    scale="attention.scaling|attention.attention.scaling?",
    mask="attention_mask",
    restore=_inside("ViTForMaskedImageModeling"),
    inputs=native_input,
)

DEIT = variant(
    VIT,
    family="transformers DeiT",
    block=f"{MODELS}.deit.modeling_deit.DeiTLayer",
    towers=(f"{MODELS}.deit.modeling_deit.DeiTModel",),
    prefix=2,
    restore=_inside("DeiTForMaskedImageModeling"),
)

YOLOS = variant(
    VIT,
    family="transformers YOLOS",
    block=f"{MODELS}.yolos.modeling_yolos.YolosLayer",
    towers=(f"{MODELS}.yolos.modeling_yolos.YolosModel",),
    suffix=lambda tower: int(tower.config.num_detection_tokens),
    restore=False,
    refuse=_positions_between_blocks,
)

VIT_MSN = variant(
    VIT,
    family="transformers ViT-MSN",
    block=f"{MODELS}.vit_msn.modeling_vit_msn.ViTMSNLayer",
    towers=(f"{MODELS}.vit_msn.modeling_vit_msn.ViTMSNModel",),
    restore=False,
)

IJEPA = variant(
    VIT,
    family="transformers I-JEPA",
    block=f"{MODELS}.ijepa.modeling_ijepa.IJepaLayer",
    towers=(f"{MODELS}.ijepa.modeling_ijepa.IJepaModel",),
    prefix=0,
    cls=False,
    restore=True,
)

VIT_MAE = variant(
    VIT,
    family="transformers ViT-MAE",
    block=f"{MODELS}.vit_mae.modeling_vit_mae.ViTMAELayer",
    towers=(f"{MODELS}.vit_mae.modeling_vit_mae.ViTMAEModel",),
    patches=_visible_patches,
    restore=_inside("ViTMAEForPreTraining"),
)

VIDEO_MAE = variant(
    VIT,
    family="transformers VideoMAE",
    block=f"{MODELS}.videomae.modeling_videomae.VideoMAELayer",
    towers=(f"{MODELS}.videomae.modeling_videomae.VideoMAEModel",),
    patches=_video_patches,
    prefix=0,
    cls=False,
    restore=True,
    inputs=_native_video,
)

DINOV2 = Layout(
    family="transformers DINOv2",
    block=f"{MODELS}.dinov2.modeling_dinov2.Dinov2Layer",
    towers=(f"{MODELS}.dinov2.modeling_dinov2.Dinov2Model", f"{MODELS}.dinov2.modeling_dinov2.Dinov2Backbone"),
    norm1="norm1",
    project=VIT.project,
    heads=VIT.heads,
    after_attention=(
        "attention.o_proj|attention.output.dense",
        "attention.output.dropout?",
        "layer_scale1",
        "drop_path",
    ),
    mlp=("norm2", "mlp", "layer_scale2", "drop_path"),
    patch="embeddings.patch_embeddings.projection",
    patches=native_patches,
    scale=VIT.scale,
    dropout=VIT.dropout,
    mask="attention_mask",
    restore=_inside("Dinov2ForImageClassification", "Dinov2Backbone"),
    refuse=_backbone,
    inputs=native_input,
)

DINOV2_WITH_REGISTERS = variant(
    DINOV2,
    family="transformers DINOv2 with registers",
    block=f"{MODELS}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer",
    towers=(
        f"{MODELS}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
        f"{MODELS}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersBackbone",
    ),
    prefix=_registers,
    restore=_inside("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersBackbone"),
)

DINOV3 = variant(
    DINOV2,
    family="transformers DINOv3 ViT",
    block=f"{MODELS}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer",
    towers=(
        f"{MODELS}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel",
        f"{MODELS}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTBackbone",
    ),
    project=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    heads="attention.num_heads",
    after_attention=("attention.o_proj", "layer_scale1", "drop_path"),
    patch="embeddings.patch_embeddings",
    prefix=_registers,
    dropout="attention.dropout",
    rotary=_rotary,
    example=_rotary_example,
    understood=("position_embeddings",),
    arguments=("attention_mask", "position_embeddings"),
    restore=_inside("DINOv3ViTBackbone"),
)

BEIT = variant(
    VIT,
    family="transformers BEiT",
    block=f"{MODELS}.beit.modeling_beit.BeitLayer",
    towers=(f"{MODELS}.beit.modeling_beit.BeitModel",),
    after_attention=(
        "attention.o_proj|attention.output.dense",
        "dropout|attention.output.dropout",
        "lambda_1",
        "drop_path",
    ),
    mlp=("layernorm_after", "mlp|intermediate", "output.dense?", "dropout|output.dropout", "lambda_2", "drop_path"),
    arguments=("attention_mask", "interpolate_pos_encoding", "resolution"),
    understood=("interpolate_pos_encoding", "resolution"),
    restore=True,
    refuse=_relative_positions,
)

DATA2VEC = variant(
    BEIT,
    family="transformers Data2Vec vision",
    block=f"{MODELS}.data2vec.modeling_data2vec_vision.Data2VecVisionLayer",
    towers=(f"{MODELS}.data2vec.modeling_data2vec_vision.Data2VecVisionModel",),
)

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
    restore=_inside("CLIPForImageClassification"),
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


def _needs_grid(tower: Any, block: Any, ancestors: Around) -> str | None:
    return (
        "the squares of patches that its visual tokens are made of need the grid; visual_keep shortens what the "
        "language model reads"
    )


def _internvl_project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = block.attention
    return attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x)), attention.v_proj(x)


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
    refuse=_needs_grid,
    inputs=native_input,
)

IDEFICS3 = variant(
    SIGLIP,
    family="transformers Idefics3 vision",
    block=f"{MODELS}.idefics3.modeling_idefics3.Idefics3EncoderLayer",
    towers=(f"{MODELS}.idefics3.modeling_idefics3.Idefics3VisionTransformer",),
    refuse=_needs_grid,
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
    VIT,
    DEIT,
    VIT_MSN,
    IJEPA,
    VIT_MAE,
    VIDEO_MAE,
    DINOV2,
    DINOV2_WITH_REGISTERS,
    DINOV3,
    BEIT,
    DATA2VEC,
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
    YOLOS,
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
                "a shorter tower output would not fit them; visual_keep shortens what the language model reads"
            )
    return None
