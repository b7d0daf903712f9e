"""Vision-language models whose tower encodes each image, or tile of one, by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from turbovlm.vlm.families.family import VlmFamily, library, read_layer, sum_cells


def _shuffle(model: Any) -> int:
    return int(1 / model.config.downsample_ratio)


def _gemma_cell(model: Any) -> int:
    return int(model.multi_modal_projector.kernel_size)


def _downsample(model: Any) -> int:
    return int(model.config.downsample_factor)


def _pooled(model: Any, row: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A of LLaVA-NeXT-Video's tokens, of which squares of a frame's patches are pooled: the sum over each square."""
    stride, side = model.config.spatial_pool_stride, model.config.vision_config.image_size
    patches = (side // model.config.vision_config.patch_size) ** 2
    return sum_cells(row[:, -patches:], int(stride)).flatten()


LLAVA = VlmFamily("LLaVA", library("llava", "LlavaModel"), "vision_tower", read_layer, merges_inside=True)
LLAVA_NEXT = VlmFamily(
    "LLaVA-NeXT",
    library("llava_next", "LlavaNextModel"),
    "vision_tower",
    read_layer,
    merges_inside=True,
    rearrange=("pack_image_features",),
)
LLAVA_ONEVISION = VlmFamily(
    "LLaVA-OneVision",
    library("llava_onevision", "LlavaOnevisionModel"),
    "vision_tower",
    read_layer,
    merges_inside=True,
    rearrange=("pack_image_features", "apply_pooling"),
)
LLAVA_NEXT_VIDEO = VlmFamily(
    "LLaVA-NeXT-Video",
    library("llava_next_video", "LlavaNextVideoModel"),
    "vision_tower",
    read_layer,
    per_token=_pooled,
    rearrange=("pack_image_features",),
)
VIP_LLAVA = VlmFamily("VipLLaVA", library("vipllava", "VipLlavaModel"), "vision_tower", read_layer)
INTERN_VL = VlmFamily("InternVL", library("internvl", "InternVLModel"), "vision_tower", read_layer, cell=_shuffle)
IDEFICS3 = VlmFamily(
    "Idefics3",
    library("idefics3", "Idefics3Model"),
    "vision_model",
    cell=lambda model: int(model.config.scale_factor),
    per_image=lambda model: int(model.image_seq_len),
)
SMOL_VLM = VlmFamily(
    "SmolVLM",
    library("smolvlm", "SmolVLMModel"),
    "vision_model",
    cell=lambda model: int(model.config.scale_factor),
    per_image=lambda model: int(model.image_seq_len),
)
PALI_GEMMA = VlmFamily(
    "PaliGemma",
    library("paligemma", "PaliGemmaModel"),
    "vision_tower",
    merges_inside=True,
    first_position=1,
)
GEMMA3 = VlmFamily("Gemma 3", library("gemma3", "Gemma3Model"), "vision_tower", cell=_gemma_cell)
AYA_VISION = VlmFamily(
    "Aya Vision", library("aya_vision", "AyaVisionModel"), "vision_tower", read_layer, cell=_downsample
)
COHERE2_VISION = VlmFamily(
    "Command A Vision", library("cohere2_vision", "Cohere2VisionModel"), "vision_tower", cell=_downsample
)

FAMILIES = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    LLAVA_NEXT_VIDEO,
    VIP_LLAVA,
    INTERN_VL,
    IDEFICS3,
    SMOL_VLM,
    PALI_GEMMA,
    GEMMA3,
    AYA_VISION,
    COHERE2_VISION,
)
