"""The blocks of `timm`'s VisionTransformer and EVA families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.encoder.layout import IN_THE_MIDDLE, Around, BlocksAt, Layout, native_image, variant


def _patches(tower: Any) -> int:
    return int(tower.patch_embed.num_patches)


def _pools_tokens(tower: Any, ancestors: Around) -> bool:
    return bool(tower.global_pool != "token")


def _has_cls(tower: Any) -> bool:
    return tower.cls_token is not None


def _of_clip(tower: Any) -> BlocksAt:
    """CLIP's towers have a norm in front of their blocks."""
    return () if isinstance(getattr(tower, "norm_pre", None), nn.Identity | None) else IN_THE_MIDDLE


def _refuse(tower: Any, block: Any, ancestors: Around) -> str | None:
    attention = block.attn
    if type(attention).__name__ not in ("Attention", "EvaAttention", "AttentionRope"):
        return f"its attention is a {type(attention).__name__}, whose map is not softmax(QKᵀ)"
    if getattr(attention, "gate", None) is not None:
        return "its attention is gated"
    if getattr(attention, "num_kv_groups", 1) != 1:
        return "its attention shares keys between heads (grouped queries)"
    return None


def _eva_project(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = block.attn
    if attention.qkv is None:
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    if getattr(attention, "q_bias", None) is None:
        qkv = attention.qkv(x)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        separate = attention.qkv_bias_separate
        qkv = attention.qkv(x) + bias if separate else F.linear(x, attention.qkv.weight, bias)
    q, k, v = qkv.chunk(3, dim=-1)
    return q, k, v


def _eva_rotary(
    block: Any, q: Tensor, k: Tensor, positions: Tensor | None, arguments: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    from timm.layers import apply_rot_embed_cat

    rope = arguments.get("rope")
    if rope is None:
        return q, k
    if positions is not None:
        rope = _rope_at(rope, positions)
    prefix, half = block.attn.num_prefix_tokens, getattr(block.attn, "rotate_half", False)

    def rotate(x: Tensor) -> Tensor:
        return torch.cat((x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)), dim=2)

    return rotate(q), rotate(k)


def _rope_at(rope: Tensor, positions: Tensor) -> Tensor:
    """Angles of the patches at `positions`, `[batch, patches]`: `[batch, heads or 1, patches, angles]`.

    Args:
        rope: `[N, angles]`; `[heads, N, angles]` where heads differ; `[batch, heads or 1, N, angles]` where every image
            has patches of its own, as with patch dropout.
        positions: of the patches that are left.
    """
    if rope.ndim == 2:
        return rope[positions].unsqueeze(1)
    if rope.ndim == 3:
        return rope[:, positions].transpose(0, 1)
    return rope.gather(2, positions[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))


def _eva_example(block: Any, patches: int) -> dict[str, Any]:
    angles = torch.linspace(0, 3, patches).unsqueeze(1) * torch.linspace(1, 2, block.attn.head_dim)
    return {"rope": torch.cat((angles.sin(), angles.cos()), dim=-1)}


def _native_input(tower: Any) -> dict[str, Tensor | None]:
    return {"x": native_image(tower, tower.patch_embed.img_size)}


VISION_TRANSFORMER = Layout(
    family="timm VisionTransformer",
    block="timm.models.vision_transformer.Block",
    towers=("timm.models.vision_transformer.VisionTransformer",),
    norm1="norm1",
    project=("attn.qkv",),
    heads="attn.num_heads",
    after_attention=("attn.norm?", "attn.proj", "attn.proj_drop", "ls1", "drop_path1"),
    mlp=("norm2", "mlp", "ls2", "drop_path2"),
    patch="patch_embed.proj",
    patches=_patches,
    prefix=lambda tower: int(tower.num_prefix_tokens),
    cls=_has_cls,
    blocks_at=_of_clip,
    query_norm="attn.q_norm",
    key_norm="attn.k_norm",
    dropout="attn.attn_drop",
    entries=("forward", "forward_features", "forward_intermediates"),
    arguments=("attn_mask", "is_causal"),
    restore=_pools_tokens,
    pools=True,
    refuse=_refuse,
    inputs=_native_input,
)

EVA = variant(
    VISION_TRANSFORMER,
    family="timm EVA",
    block="timm.models.eva.EvaBlock",
    towers=("timm.models.eva.Eva",),
    blocks_at=(),
    project=_eva_project,
    calls=("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj"),
    after_attention=("attn.norm", "attn.proj", "attn.proj_drop", "gamma_1", "drop_path1"),
    mlp=("norm2", "mlp", "gamma_2", "drop_path2"),
    query_norm="attn.q_norm?",
    key_norm="attn.k_norm?",
    rotary=_eva_rotary,
    example=_eva_example,
    understood=("rope",),
    arguments=("rope", "attn_mask", "is_causal"),
)

LAYOUTS = (VISION_TRANSFORMER, EVA)
