"""Small models of the families beside those of `vlms`, whose mechanisms are those families'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlms import (
    ANYRES,
    CLIP,
    IMAGE,
    TEXT,
    VIDEO,
    Vlm,
    anyres_image,
    noise,
    qwen3_image,
    qwen_image,
    qwen_video,
    square,
)

ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PACKED = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
GLM_TOKENS = {
    "image_start_token_id": 92,
    "image_end_token_id": 93,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}


def packed(name: str, vision: dict[str, Any], text: dict[str, Any], **tokens: int) -> Callable[[], Any]:
    """A model of Qwen's and GLM's kinds, `name`ForConditionalGeneration."""

    def make() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            vision_config=PACKED | vision,
            text_config=TEXT | text,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **tokens,
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return make


def projected(name: str, vision: str, text: str, **settings: Any) -> Callable[[], Any]:
    """A model of LLaVA's kind, `name`ForConditionalGeneration, of a tower and a language model by their configs."""

    def make() -> Any:
        import transformers

        cut = {"layer_types": ["full_attention"] * 3} if text.startswith("Cohere2") else {}
        config = getattr(transformers, f"{name}Config")(
            vision_config=getattr(transformers, vision)(**CLIP),
            text_config=getattr(transformers, text)(**TEXT, **cut),
            **settings,
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return make


def glm_video(index: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Videos whose frames stand each behind its time, as Qwen3-VL's do."""
    return qwen_video(14, separated=True)(index)


def pooled_video(index: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """2 frames of 6×6 patches, pooled to 3×3 tokens."""
    return [VIDEO] * 18, {"pixel_values_videos": noise(50 + index, 1, 2, 3, 48, 48)}


GLM_VISION = {"image_size": 112, "patch_size": 14, "attention_bias": False}
GLM_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
QWEN3_VISION = {"num_position_embeddings": 64}
PARTIAL = {"rope_parameters": ROTARY["rope_parameters"] | {"partial_rotary_factor": 1.0}}

MORE = {
    "qwen3_vl_moe": Vlm(
        packed("Qwen3VLMoe", QWEN3_VISION | {"deepstack_visual_indexes": [0, 2]}, {"head_dim": 8, **EXPERTS, **ROTARY}),
        qwen3_image,
        types="mm_token_type_ids",
        video=qwen_video(16, separated=True),
    ),
    "qwen3_5": Vlm(
        packed("Qwen3_5", QWEN3_VISION, {"head_dim": 8, **LINEAR, **PARTIAL}),
        qwen3_image,
        types="mm_token_type_ids",
        video=qwen_video(16, separated=True),
    ),
    "qwen3_5_moe": Vlm(
        packed(
            "Qwen3_5Moe",
            QWEN3_VISION,
            {"head_dim": 8, "shared_expert_intermediate_size": 24, **EXPERTS, **LINEAR, **PARTIAL},
        ),
        qwen3_image,
        types="mm_token_type_ids",
        video=qwen_video(16, separated=True),
    ),
    "glm4v": Vlm(
        packed("Glm4v", GLM_VISION, ROTARY, **GLM_TOKENS),
        qwen_image,
        types="mm_token_type_ids",
        video=glm_video,
        one_placeholder=True,
    ),
    "glm4v_moe": Vlm(
        packed("Glm4vMoe", GLM_VISION, {"head_dim": 8, **GLM_EXPERTS, **PARTIAL}, **GLM_TOKENS),
        qwen_image,
        types="mm_token_type_ids",
        video=glm_video,
        one_placeholder=True,
    ),
    "glm46v": Vlm(
        packed(
            "Glm46V", GLM_VISION | {"model_type": "glm4v_vision"}, ROTARY | {"model_type": "glm4v_text"}, **GLM_TOKENS
        ),
        qwen_image,
        types="mm_token_type_ids",
        video=glm_video,
        one_placeholder=True,
    ),
    "glm_ocr": Vlm(
        packed("GlmOcr", GLM_VISION, {"head_dim": 8, **ROTARY}, **GLM_TOKENS),
        qwen_image,
        types="mm_token_type_ids",
        video=glm_video,
        one_placeholder=True,
    ),
    "vipllava": Vlm(
        projected(
            "VipLlava", "CLIPVisionConfig", "LlamaConfig", image_token_index=IMAGE, vision_feature_layers=[-2, -3]
        ),
        square(36, 48),
    ),
    "llava_next_video": Vlm(
        projected(
            "LlavaNextVideo",
            "CLIPVisionConfig",
            "LlamaConfig",
            video_token_index=VIDEO,
            image_token_index=IMAGE,
            image_grid_pinpoints=ANYRES["image_grid_pinpoints"],
        ),
        anyres_image,
        video=pooled_video,
    ),
    "aya_vision": Vlm(
        projected(
            "AyaVision",
            "SiglipVisionConfig",
            "Cohere2Config",
            image_token_index=IMAGE,
            downsample_factor=2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            alignment_intermediate_size=64,
        ),
        square(9, 48),
    ),
    "cohere2_vision": Vlm(
        projected(
            "Cohere2Vision",
            "SiglipVisionConfig",
            "Cohere2Config",
            image_token_id=IMAGE,
            downsample_factor=2,
            alignment_intermediate_size=64,
        ),
        square(9, 48),
    ),
}
