"""The blocks built on `nn.MultiheadAttention`: `torchvision`'s VisionTransformer and `open_clip`'s image tower."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.encoder.layout import IN_THE_MIDDLE, Around, Layout, native_image


def _packed(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    return q, k, v


def _torchvision_project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _packed(block.self_attention, x)


def _open_clip_project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _packed(block.attn, x)


def _open_clip_pools_tokens(tower: Any, ancestors: Around) -> bool:
    return bool(tower.attn_pool is not None or tower.pool_type != "tok")


def _open_clip_refuse(tower: Any, block: nn.Module, ancestors: Around) -> str | None:
    if not getattr(tower.transformer, "batch_first", True):
        return "its tokens come before its batch (batch_first=False)"
    return None


def _native_input(tower: Any) -> dict[str, Tensor | None]:
    return {"x": native_image(tower, tower.image_size)}


TORCHVISION = Layout(
    family="torchvision VisionTransformer",
    block="torchvision.models.vision_transformer.EncoderBlock",
    towers=("torchvision.models.vision_transformer.VisionTransformer",),
    norm1="ln_1",
    project=_torchvision_project,
    heads="self_attention.num_heads",
    after_attention=("self_attention.out_proj", "dropout"),
    mlp=("ln_2", "mlp"),
    patch="conv_proj",
    patches=lambda tower: (tower.image_size // tower.patch_size) ** 2,
    dropout="self_attention.dropout",
    weights_only=("self_attention.out_proj",),
    arguments=(),
    pools=True,
    inputs=_native_input,
)

OPEN_CLIP = Layout(
    family="open_clip VisionTransformer",
    block="open_clip.transformer.ResidualAttentionBlock",
    towers=("open_clip.transformer.VisionTransformer",),
    norm1="ln_1",
    project=_open_clip_project,
    heads="attn.num_heads",
    after_attention=("attn.out_proj", "ls_1"),
    mlp=("ln_2", "mlp", "ls_2"),
    patch="conv1",
    patches=lambda tower: int(tower.grid_size[0] * tower.grid_size[1]),
    dropout="attn.dropout",
    weights_only=("attn.out_proj",),
    entries=("forward", "forward_intermediates"),
    arguments=("k_x", "v_x", "attn_mask"),
    blocks_at=IN_THE_MIDDLE,
    restore=_open_clip_pools_tokens,
    pools=lambda tower: not tower.output_tokens,
    refuse=_open_clip_refuse,
    inputs=_native_input,
)

LAYOUTS = (TORCHVISION, OPEN_CLIP)
