"""The towers of Qwen's vision-language models: all images in one packed sequence, squares of patches joined behind."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.families.transformers import MODELS
from turbovlm.encoder.layout import Around, Layout, variant

NATIVE = 448
"""Side in pixels of the image that costs are told for: the towers take images of any size."""


def _side(tower: Any) -> int:
    """Patches along a side of such an image, in whole squares."""
    square = int(tower.spatial_merge_size)
    return NATIVE // (int(tower.config.patch_size) * square) * square


def _patches(tower: Any) -> int:
    return _side(tower) ** 2


def _cell(tower: Any) -> int:
    return int(tower.spatial_merge_size)


def _packed_image(tower: Any) -> dict[str, Tensor | None]:
    """Patches of one square image, and their rows and columns."""
    side = _side(tower)
    values = tower.patch_embed.proj.weight[0].numel()
    grid = torch.tensor([[1, side, side]], device="cpu")
    return {"hidden_states": torch.empty(side * side, values, device="meta"), "grid_thw": grid}


def _rotary(
    block: nn.Module, q: Tensor, k: Tensor, positions: Tensor | None, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    cos, sin = arguments["position_embeddings"]
    if positions is not None:
        cos, sin = cos[positions[0]], sin[positions[0]]
    rotate = sys.modules[type(block).__module__].apply_rotary_pos_emb_vision
    q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _two_segments(block: Any, patches: int) -> dict[str, Any]:
    angles = torch.linspace(0, 3, patches).unsqueeze(1) * torch.linspace(1, 2, block.attn.head_dim // 2).repeat(2)
    bounds = torch.tensor([0, patches // 3, patches], dtype=torch.int32)
    return {"cu_seqlens": bounds, "position_embeddings": (angles.cos(), angles.sin())}


def _windows(tower: Any) -> tuple[int, ...]:
    tokens = (int(tower.window_size) // int(tower.patch_size)) ** 2
    return tuple(0 if block in tower.fullatt_block_indexes else tokens for block in range(len(tower.blocks)))


def window_order(tower: Any, grid: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The square of patches at each place where Qwen2.5-VL's tower has put them for its windowed attention."""
    from transformers.vision_utils import get_vision_window_index

    side, window, patch = (getattr(tower, name) for name in ("spatial_merge_size", "window_size", "patch_size"))
    index: Tensor = get_vision_window_index(
        grid, spatial_merge_size=side, window_size=window, patch_size=patch, kwargs=arguments
    )[0]
    return index


def _windows_alone(tower: Any, block: Any, ancestors: Around) -> str | None:
    if all(_windows(tower)):
        return "all of its blocks attend within windows, and none to whole images"
    return None


QWEN2_VL = Layout(
    family="transformers Qwen2-VL vision",
    block=f"{MODELS}.qwen2_vl.modeling_qwen2_vl.Qwen2VLVisionBlock",
    towers=(f"{MODELS}.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",),
    norm1="norm1",
    project=("attn.qkv",),
    heads="attn.num_heads",
    after_attention=("attn.proj",),
    mlp=("norm2", "mlp"),
    patch="patch_embed.proj",
    patches=_patches,
    prefix=0,
    cls=False,
    scale="attn.scaling",
    dropout="attn.attention_dropout",
    rotary=_rotary,
    arguments=("cu_seqlens", "position_embeddings"),
    understood=("cu_seqlens", "position_embeddings"),
    packed=True,
    cell=_cell,
    restore=True,
    example=_two_segments,
    inputs=_packed_image,
)

QWEN2_5_VL = variant(
    QWEN2_VL,
    family="transformers Qwen2.5-VL vision",
    block=f"{MODELS}.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionBlock",
    towers=(f"{MODELS}.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",),
    windows=_windows,
    order=window_order,
    refuse=_windows_alone,
)

QWEN3_VL = variant(
    QWEN2_VL,
    family="transformers Qwen3-VL vision",
    block=f"{MODELS}.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionBlock",
    towers=(f"{MODELS}.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",),
    reads=lambda tower: tower.deepstack_visual_indexes,
)

LAYOUTS = (QWEN2_VL, QWEN2_5_VL, QWEN3_VL)
