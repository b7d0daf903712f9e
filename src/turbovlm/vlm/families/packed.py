"""Vision-language models whose tower runs all images as one sequence of patches, of which squares become tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.encoder.families.packed import window_order
from turbovlm.vlm.families.family import Packed, VlmFamily, library, read_layer, sum_grids

AS_QWEN = Packed()
AS_SIGLIP = Packed("layer_norm1", "self_attn", ("q_proj", "k_proj"))
AS_PIXTRAL = Packed(
    "attention_norm",
    "attention",
    ("q_proj", "k_proj"),
    rotate="apply_rotary_pos_emb",
    arguments=("attention_mask", "position_embeddings"),
)


def _side(model: Any) -> int:
    return int(model.visual.spatial_merge_size)


def _last_full_attention(model: Any) -> int:
    """The last block of Qwen2.5-VL with full attention; its last one, where all attend within windows."""
    depth = len(model.visual.blocks)
    return max((block for block in model.visual.fullatt_block_indexes if 0 <= block < depth), default=depth - 1)


def _windows(tower: Any, grid: Tensor) -> Tensor:
    """Where Qwen2.5-VL's tower has put each token for its windowed attention."""
    return torch.argsort(window_order(tower, grid, {}))


def _packed(family: str, module: str, name: str, packed: Packed = AS_QWEN, **settings: Any) -> VlmFamily:
    """A family of Qwen2-VL's kind, all of whose blocks attend to whole images."""
    return VlmFamily(family, library(module, name), "visual", cell=_side, packed=packed, frames="video", **settings)


def _pixtral_side(model: Any) -> int:
    return int(model.config.spatial_merge_size)


def _by_sizes(model: Any, row: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A of the squares of patches of images whose patches are row after row, by their sizes in pixels."""
    patch, side = int(model.config.vision_config.patch_size), _pixtral_side(model)
    sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
    return sum_grids(row, [(height // patch, width // patch) for height, width in sizes], side)


def _by_grids(model: Any, row: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The same by their sizes in patches, `[images, 3]`."""
    grids = [(rows * frames, columns) for frames, rows, columns in arguments["image_grid_thw"].tolist()]
    return sum_grids(row, grids, int(model.config.vision_config.spatial_merge_size))


def _by_merge_sizes(model: Any, row: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A of VideoLLaMA 3's squares of patches, which stand together, of a size of its own in each image or video."""
    kind = "video" if arguments.get("video_grid_thw") is not None else "image"
    patches, sides = (arguments[f"{kind}_{name}"] for name in ("grid_thw", "merge_sizes"))
    images = zip(torch.split(row, patches.prod(1).tolist()), sides.tolist())
    return torch.cat([image.view(-1, side * side).sum(1) for image, side in images])


def _over_time(model: Any, row: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A of Kimi's squares of patches, of which all frames are averaged."""
    side, found = int(model.vision_tower.merge_kernel_size[0]), []
    grids = next(value for name, value in arguments.items() if name.endswith("_grid_thw")).tolist()
    for image, (frames, rows, columns) in zip(torch.split(row, [t * h * w for t, h, w in grids]), grids):
        found.append(sum_grids(image.view(frames, -1).sum(0), [(rows, columns)], side))
    return torch.cat(found)


QWEN2_VL = _packed("Qwen2-VL", "qwen2_vl", "Qwen2VLModel", merges_inside=True)
QWEN2_5_VL = VlmFamily(
    "Qwen2.5-VL",
    library("qwen2_5_vl", "Qwen2_5_VLModel"),
    "visual",
    _last_full_attention,
    _side,
    packed=AS_QWEN,
    order=_windows,
    merges_inside=True,
    frames="video",
)
QWEN3_VL = _packed("Qwen3-VL", "qwen3_vl", "Qwen3VLModel", merges_inside=True)
QWEN3_VL_MOE = _packed("Qwen3-VL-MoE", "qwen3_vl_moe", "Qwen3VLMoeModel")
QWEN3_5 = _packed("Qwen3.5", "qwen3_5", "Qwen3_5Model")
QWEN3_5_MOE = _packed("Qwen3.5-MoE", "qwen3_5_moe", "Qwen3_5MoeModel")
GLM_4V = _packed("GLM-4V", "glm4v", "Glm4vModel", video_token="image_token_id")
GLM_4V_MOE = _packed("GLM-4.5V", "glm4v_moe", "Glm4vMoeModel", video_token="image_token_id")
GLM_46V = _packed("GLM-4.6V", "glm46v", "Glm46VModel", video_token="image_token_id")
GLM_OCR = _packed("GLM-OCR", "glm_ocr", "GlmOcrModel", Packed(norms=("q_norm", "k_norm")), video_token="image_token_id")
QWEN2_5_OMNI = VlmFamily(
    "Qwen2.5-Omni",
    library("qwen2_5_omni", "Qwen2_5OmniThinkerModel"),
    "visual",
    _last_full_attention,
    _side,
    packed=Packed(project=("q", "k")),
    order=_windows,
    frames="video",
)
QWEN3_OMNI = _packed("Qwen3-Omni", "qwen3_omni_moe", "Qwen3OmniMoeThinkerModel")
PADDLE_OCR_VL = VlmFamily(
    "PaddleOCR-VL",
    library("paddleocr_vl", "PaddleOCRVLModel"),
    "visual",
    cell=lambda model: int(model.config.vision_config.spatial_merge_size),
    packed=AS_SIGLIP,
    per_token=_by_grids,
)
VIDEO_LLAMA_3 = VlmFamily(
    "VideoLLaMA 3",
    library("video_llama_3", "VideoLlama3Model"),
    "vision_model",
    packed=AS_SIGLIP,
    per_token=_by_merge_sizes,
    frames="video",
)
KIMI = VlmFamily(
    "Kimi K2.5",
    library("kimi_k25", "Kimi_K25Model"),
    "vision_tower",
    cell=lambda model: int(model.vision_tower.merge_kernel_size[0]),
    packed=Packed(project=("q_proj", "k_proj")),
    per_token=_over_time,
)
MISTRAL_3 = VlmFamily(
    "Mistral 3",
    library("mistral3", "Mistral3Model"),
    "vision_tower",
    read_layer,
    _pixtral_side,
    packed=AS_PIXTRAL,
    per_token=_by_sizes,
)
LIGHT_ON_OCR = VlmFamily(
    "LightOnOCR",
    library("lighton_ocr", "LightOnOcrModel"),
    "vision_encoder",
    cell=_pixtral_side,
    packed=AS_PIXTRAL,
    per_token=_by_sizes,
)

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
    QWEN2_5_OMNI,
    QWEN3_OMNI,
    PADDLE_OCR_VL,
    VIDEO_LLAMA_3,
    KIMI,
    MISTRAL_3,
    LIGHT_ON_OCR,
)
