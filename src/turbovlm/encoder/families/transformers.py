"""The blocks of `transformers`' vision encoders; those that come with a language, or read text, are in `multimodal`."""

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


def inside(*names: str) -> Any:
    """Whether the tower is, or is part of, one of `transformers`' classes `names`."""

    def found(tower: Any, ancestors: Around) -> bool:
        bases = [cls for module in ancestors for cls in type(module).__mro__]
        return any(cls.__name__ in names and cls.__module__.startswith(MODELS) for cls in bases)

    return found


def _positions_between_blocks(tower: Any, block: Any, ancestors: Around) -> str | None:
    if tower.config.use_mid_position_embeddings:
        return "it adds position embeddings between its blocks, to tokens that would be merged by then"
    return None


def _relative_positions(tower: Any, block: Any, ancestors: Around) -> str | None:
    if tower.config.use_relative_position_bias or tower.config.use_shared_relative_position_bias:
        return (
            "its relative position bias is a table over pairs of grid positions, in which merged tokens have no place; "
            "gathering it for every image would build the N×N map that attention avoids"
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
    restore=inside("ViTForMaskedImageModeling"),
    inputs=native_input,
)

DEIT = variant(
    VIT,
    family="transformers DeiT",
    block=f"{MODELS}.deit.modeling_deit.DeiTLayer",
    towers=(f"{MODELS}.deit.modeling_deit.DeiTModel",),
    prefix=2,
    restore=inside("DeiTForMaskedImageModeling"),
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
    restore=inside("ViTMAEForPreTraining"),
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
    restore=inside("Dinov2ForImageClassification", "Dinov2Backbone"),
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
    restore=inside("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersBackbone"),
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
    restore=inside("DINOv3ViTBackbone"),
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
    YOLOS,
)
