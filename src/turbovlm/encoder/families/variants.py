"""Encoders of `transformers` whose blocks are spelled, but for names, as those of CLIP, ViT or DINOv2."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.families.multimodal import CLIP, SIGLIP
from turbovlm.encoder.families.transformers import DINOV2, MODELS, VIT, inside, native_patches
from turbovlm.encoder.layout import Around, Layout, variant


def _paths(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{MODELS}.{module}.modeling_{module}.{name}" for name in names)


def _with_cls(
    block: nn.Module, q: Tensor, k: Tensor, positions: Tensor | None, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Rotate CLS, whose angles are learned, as the first position, and the patches by theirs."""
    cos, sin = arguments["position_embeddings"]
    if positions is not None:
        index = nn.functional.pad(positions + 1, (1, 0))
        cos, sin = cos[index], sin[index]
    rotate = sys.modules[type(block).__module__].apply_rotary_pos_emb_vision
    cos, sin = (each.expand(len(q), *each.shape[-2:]).float() for each in (cos, sin))
    rotated = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)


def _with_cls_example(block: Any, patches: int) -> dict[str, Any]:
    angles = torch.linspace(0, 3, patches + 1).unsqueeze(1) * torch.linspace(1, 2, block.self_attn.head_dim)
    return {"position_embeddings": [angles.cos(), angles.sin()]}


def _as_clip(family: str, module: str, block: str, *towers: str, **settings: Any) -> Layout:
    """CLIP's block under another name, blocks chosen as for most encoders."""
    paths = {"block": _paths(module, block)[0], "towers": _paths(module, *towers)}
    return variant(CLIP, family=f"transformers {family}", blocks_at=(), **paths, **settings)


def _experts(tower: Any, block: Any, ancestors: Around) -> str | None:
    if tower.config.num_experts > 1:
        return "its MLPs are experts for data sets, which the block is called with"
    return None


META_CLIP_2 = _as_clip(
    "MetaCLIP 2",
    "metaclip_2",
    "MetaClip2EncoderLayer",
    "MetaClip2VisionModel",
    restore=inside("MetaClip2ForImageClassification"),
)
ALT_CLIP = _as_clip("AltCLIP", "altclip", "AltCLIPEncoderLayer", "AltCLIPVisionModel", restore=False)
CHINESE_CLIP = _as_clip(
    "Chinese-CLIP", "chinese_clip", "ChineseCLIPVisionLayer", "ChineseCLIPVisionModel", restore=False
)
OWL_VIT = _as_clip("OWL-ViT", "owlvit", "OwlViTEncoderLayer", "OwlViTVisionTransformer", restore=True)
OWL_V2 = _as_clip("OWLv2", "owlv2", "Owlv2EncoderLayer", "Owlv2VisionTransformer", restore=True)
GIT = _as_clip("GIT", "git", "GitVisionEncoderLayer", "GitVisionTransformer", restore=True)
KOSMOS_2 = _as_clip("Kosmos-2", "kosmos2", "Kosmos2VisionEncoderLayer", "Kosmos2VisionTransformer", restore=True)
MLCD = _as_clip(
    "MLCD",
    "mlcd",
    "MLCDEncoderLayer",
    "MLCDVisionModel",
    restore=False,
    rotary=_with_cls,
    example=_with_cls_example,
    understood=("position_embeddings",),
    arguments=("position_embeddings", "attention_mask"),
    returns_tuple=False,
)
AIMV2 = variant(
    SIGLIP,
    family="transformers AIMv2",
    block=_paths("aimv2", "Aimv2EncoderLayer")[0],
    towers=_paths("aimv2", "Aimv2VisionModel"),
    norm1="rms_norm1",
    project=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    heads="attention.num_heads",
    after_attention=("attention.out_proj",),
    mlp=("rms_norm2", "ffn"),
    patch="embeddings.patch_embed",
    scale="attention.scale",
    dropout="attention.dropout",
)
FLAVA = variant(
    VIT,
    family="transformers FLAVA image",
    block=_paths("flava", "FlavaLayer")[0],
    towers=_paths("flava", "FlavaImageModel"),
    arguments=("attention_mask", "output_attentions"),
    restore=inside("FlavaModel", "FlavaForPreTraining"),
)
VIT_POSE = variant(
    VIT,
    family="transformers ViTPose",
    block=_paths("vitpose_backbone", "VitPoseBackboneLayer")[0],
    towers=_paths("vitpose_backbone", "VitPoseBackbone"),
    mlp=("layernorm_after", "mlp"),
    after_attention=("attention.output.dense", "attention.output.dropout"),
    refuse=_experts,
    prefix=0,
    cls=False,
    restore=True,
)
TIPS_V2 = variant(
    DINOV2,
    family="transformers TIPSv2",
    block=_paths("tipsv2", "Tipsv2VisionLayer")[0],
    towers=_paths("tipsv2", "Tipsv2VisionModel"),
    prefix=lambda tower: 1 + int(getattr(tower.config, "num_register_tokens", 0)),
    patches=native_patches,
    restore=True,
)

LAYOUTS = (
    META_CLIP_2,
    ALT_CLIP,
    CHINESE_CLIP,
    OWL_VIT,
    OWL_V2,
    GIT,
    KOSMOS_2,
    MLCD,
    AIMV2,
    FLAVA,
    VIT_POSE,
    TIPS_V2,
)
