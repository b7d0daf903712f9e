"""Vision-language models whose tower encodes each image, or tile of one, by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.vlm.families.family import VlmFamily, library, read_layer, sum_cells, sum_grids


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


def _unpadded(model: Any, row: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A of LFM2-VL's squares of patches, of images of any shape that are filled up to as many patches."""
    grids = arguments["spatial_shapes"].tolist()
    patches = torch.cat([image[: rows * columns] for image, (rows, columns) in zip(row, grids)])
    return sum_grids(patches, grids, _downsample(model))


def _pooling_side(model: Any) -> int:
    return int(model.config.vision_config.pooling_kernel_size)


def _by_places(model: Any, row: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A of Gemma 4's squares of patches, by the places of the patches, which are negative for padding."""
    side, found = _pooling_side(model), []
    places = next(arguments[name] for name in arguments if name.endswith("_position_ids"))
    for image, place in zip(row, places):
        seen = (place >= 0).all(-1)
        x, y = (place[seen] // side).unbind(-1)
        token = x + y * (x.max() + 1)
        found.append(image.new_zeros(int(token.max()) + 1).index_add(0, token, image[seen]))
    return torch.cat(found)


def _soft_tokens(model: Any) -> int:
    return int(model.config.vision_soft_tokens_per_image)


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
    frames="video",
)
LLAVA_NEXT_VIDEO = VlmFamily(
    "LLaVA-NeXT-Video",
    library("llava_next_video", "LlavaNextVideoModel"),
    "vision_tower",
    read_layer,
    per_token=_pooled,
    rearrange=("pack_image_features",),
    frames="video",
)
VIP_LLAVA = VlmFamily("VipLLaVA", library("vipllava", "VipLlavaModel"), "vision_tower", read_layer)
INTERN_VL = VlmFamily(
    "InternVL",
    library("internvl", "InternVLModel"),
    "vision_tower",
    read_layer,
    cell=_shuffle,
    merges_inside=True,
    frames="images",
)
IDEFICS3 = VlmFamily(
    "Idefics3",
    library("idefics3", "Idefics3Model"),
    "vision_model",
    cell=lambda model: int(model.config.scale_factor),
    per_image=lambda model: int(model.image_seq_len),
    merges_inside=True,
)
SMOL_VLM = VlmFamily(
    "SmolVLM",
    library("smolvlm", "SmolVLMModel"),
    "vision_model",
    cell=lambda model: int(model.config.scale_factor),
    per_image=lambda model: int(model.image_seq_len),
    merges_inside=True,
)
PALI_GEMMA = VlmFamily(
    "PaliGemma",
    library("paligemma", "PaliGemmaModel"),
    "vision_tower",
    merges_inside=True,
    first_position=1,
)
GEMMA3 = VlmFamily("Gemma 3", library("gemma3", "Gemma3Model"), "vision_tower", cell=_gemma_cell, merges_inside=True)
AYA_VISION = VlmFamily(
    "Aya Vision", library("aya_vision", "AyaVisionModel"), "vision_tower", read_layer, cell=_downsample
)
COHERE2_VISION = VlmFamily(
    "Command A Vision", library("cohere2_vision", "Cohere2VisionModel"), "vision_tower", cell=_downsample
)
GEMMA_3N = VlmFamily("Gemma 3n", library("gemma3n", "Gemma3nModel"), "vision_tower", None, per_image=_soft_tokens)
GEMMA_4 = VlmFamily(
    "Gemma 4",
    library("gemma4", "Gemma4Model"),
    "vision_tower",
    cell=_pooling_side,
    per_token=_by_places,
    frames="video",
)
LLAMA_4 = VlmFamily(
    "Llama 4",
    library("llama4", "Llama4ForConditionalGeneration"),
    "vision_model",
    cell=lambda model: round(1 / model.config.vision_config.pixel_shuffle_ratio),
    features="last_hidden_state",
)
OVIS_2 = VlmFamily(
    "Ovis 2",
    library("ovis2", "Ovis2Model"),
    "vision_tower.transformer",
    cell=lambda model: int(model.vision_tower.config.hidden_stride),
)
DEEPSEEK_VL = VlmFamily("DeepSeek-VL", library("deepseek_vl", "DeepseekVLModel"), "vision_model", merges_inside=True)
JANUS = VlmFamily("Janus", library("janus", "JanusModel"), "vision_model", merges_inside=True)
LFM2_VL = VlmFamily("LFM2-VL", library("lfm2_vl", "Lfm2VlModel"), "vision_tower", cell=_downsample, per_token=_unpadded)
IDEFICS_2 = VlmFamily(
    "Idefics2",
    library("idefics2", "Idefics2Model"),
    "vision_model",
    None,
    per_image=lambda model: int(model.config.perceiver_config.resampler_n_latents),
)
ARIA = VlmFamily("Aria", library("aria", "AriaModel"), "vision_tower", None)
FAST_VLM = VlmFamily("FastVLM", library("fast_vlm", "FastVlmModel"), "vision_tower", None)
PERCEPTION_LM = VlmFamily("PerceptionLM", library("perception_lm", "PerceptionLMModel"), "vision_tower", None)
GOT_OCR_2 = VlmFamily("GOT-OCR 2", library("got_ocr2", "GotOcr2Model"), "vision_tower", None)
DEEPSEEK_VL_HYBRID = VlmFamily(
    "DeepSeek-VL hybrid", library("deepseek_vl_hybrid", "DeepseekVLHybridModel"), "vision_model"
)
VIDEO_LLAVA = VlmFamily("Video-LLaVA", library("video_llava", "VideoLlavaModel"), "image_tower", None)
MINICPM_V = VlmFamily("MiniCPM-V 4.6", library("minicpmv4_6", "MiniCPMV4_6Model"), "vision_tower", None)
HUNYUAN_VL = VlmFamily("HunYuan-VL", library("hunyuan_vl", "HunYuanVLModel"), "vision_tower", None)
DEEPSEEK_OCR_2 = VlmFamily("DeepSeek-OCR 2", library("deepseek_ocr2", "DeepseekOcr2Model"), "vision_tower", None)
FUYU = VlmFamily("Fuyu", library("fuyu", "FuyuModel"), "vision_embed_tokens", None, features="last_hidden_state")

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
    GEMMA_3N,
    GEMMA_4,
    LLAMA_4,
    OVIS_2,
    DEEPSEEK_VL,
    JANUS,
    LFM2_VL,
    IDEFICS_2,
    ARIA,
    FAST_VLM,
    PERCEPTION_LM,
    GOT_OCR_2,
    DEEPSEEK_VL_HYBRID,
    VIDEO_LLAVA,
    MINICPM_V,
    HUNYUAN_VL,
    DEEPSEEK_OCR_2,
    FUYU,
)
