"""Vision-language models whose tower runs all images as one sequence of patches, of which squares become tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.vlm.families.family import Packed, VlmFamily, library

AS_QWEN = Packed()


def _side(model: Any) -> int:
    return int(model.visual.spatial_merge_size)


def _last_full_attention(model: Any) -> int:
    """The last block of Qwen2.5-VL with full attention; its last one, where all attend within windows."""
    depth = len(model.visual.blocks)
    return max((block for block in model.visual.fullatt_block_indexes if 0 <= block < depth), default=depth - 1)


def _windows(tower: Any, grid: Tensor) -> Tensor:
    """Where Qwen2.5-VL's tower has put each token for its windowed attention."""
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(
        grid, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )
    return torch.argsort(index)


def _packed(family: str, module: str, name: str, packed: Packed = AS_QWEN, **settings: Any) -> VlmFamily:
    """A family of Qwen2-VL's kind, all of whose blocks attend to whole images."""
    return VlmFamily(family, library(module, name), "visual", cell=_side, packed=packed, **settings)


QWEN2_VL = _packed("Qwen2-VL", "qwen2_vl", "Qwen2VLModel")
QWEN2_5_VL = VlmFamily(
    "Qwen2.5-VL",
    library("qwen2_5_vl", "Qwen2_5_VLModel"),
    "visual",
    _last_full_attention,
    _side,
    packed=AS_QWEN,
    order=_windows,
)
QWEN3_VL = _packed("Qwen3-VL", "qwen3_vl", "Qwen3VLModel")
QWEN3_VL_MOE = _packed("Qwen3-VL-MoE", "qwen3_vl_moe", "Qwen3VLMoeModel")
QWEN3_5 = _packed("Qwen3.5", "qwen3_5", "Qwen3_5Model")
QWEN3_5_MOE = _packed("Qwen3.5-MoE", "qwen3_5_moe", "Qwen3_5MoeModel")
GLM_4V = _packed("GLM-4V", "glm4v", "Glm4vModel", video_token="image_token_id")
GLM_4V_MOE = _packed("GLM-4.5V", "glm4v_moe", "Glm4vMoeModel", video_token="image_token_id")
GLM_46V = _packed("GLM-4.6V", "glm46v", "Glm46VModel", video_token="image_token_id")
GLM_OCR = _packed("GLM-OCR", "glm_ocr", "GlmOcrModel", Packed(norms=("q_norm", "k_norm")), video_token="image_token_id")

FAMILIES = (
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
    QWEN3_VL_MOE,
    QWEN3_5,
    QWEN3_5_MOE,
    GLM_4V,
    GLM_4V_MOE,
    GLM_46V,
    GLM_OCR,
)
