"""Small models of families whose tower runs all images as one sequence of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlms import CLIP, IMAGE, TEXT, VIDEO, Image, Vlm, noise, qwen3_image, qwen_image, qwen_video

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


def glm_video(index: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Videos whose frames stand each behind its time, as Qwen3-VL's do."""
    return qwen_video(14, separated=True)(index)


def built(
    name: str, vision: Any, text: Any, cls: str = "ForConditionalGeneration", **settings: Any
) -> Callable[[], Any]:
    """A model `name``cls` of configs, each a class's name, or a dict, and settings."""

    def make() -> Any:
        import transformers

        parts = [
            part if isinstance(part, dict) else getattr(transformers, part[0])(**part[1]) for part in (vision, text)
        ]
        config = getattr(transformers, f"{name}Config")(vision_config=parts[0], text_config=parts[1], **settings)
        return getattr(transformers, f"{name}{cls}")(config)

    return make


def started(image: Image) -> Image:
    """Images behind the token that says that one begins."""

    def begun(index: int) -> tuple[list[int], dict[str, torch.Tensor]]:
        tokens, pixels = image(index)
        assert isinstance(tokens, int)
        return [95] + [IMAGE] * tokens, pixels

    return begun


def sized_image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Images of 6×6 or 4×6 patches of 8 pixels, in one canvas; squares of 2×2 patches become tokens."""
    height, width = ((48, 48), (32, 48))[index % 2]
    canvas = torch.zeros(1, 3, 48, 48)
    canvas[:, :, :height, :width] = noise(index, 1, 3, height, width)
    return height * width // 256, {"pixel_values": canvas, "image_sizes": torch.tensor([[height, width]])}


def grid_image(pixels: int, **beside: int) -> Callable[[int], tuple[int, dict[str, torch.Tensor]]]:
    """Images of 8×8, 4×12 or 8×4 patches, each `[3, pixels, pixels]`, flat where `beside` has no other word."""

    def image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
        height, width = ((8, 8), (4, 12), (8, 4))[index % 3]
        shape = (3, pixels, pixels) if not beside else (3 * pixels * pixels,)
        found = {
            "pixel_values": noise(index, height * width, *shape),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }
        return height * width // 4, found | {name: torch.tensor([value]) for name, value in beside.items()}

    return image


def llama3_video(index: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """3 or 2 frames of squares of 2×2 patches."""
    frames, height, width = ((3, 4, 8), (2, 8, 4))[index % 2]
    found = {"pixel_values_videos": noise(50 + index, frames * height * width, 3 * 8 * 8)}
    found |= {"video_grid_thw": torch.tensor([[frames, height, width]]), "video_merge_sizes": torch.tensor([2])}
    return [VIDEO] * (frames * height * width // 4), found


GLM_VISION = {"image_size": 112, "patch_size": 14, "attention_bias": False}
GLM_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
AUDIO = {
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "max_source_positions": 128,
    "downsample_hidden_size": 8,
}
QWEN3_VISION = {"num_position_embeddings": 64}
PARTIAL = {"rope_parameters": ROTARY["rope_parameters"] | {"partial_rotary_factor": 1.0}}

PACKED_VLMS = {
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
    "qwen2_5_omni": Vlm(
        built(
            "Qwen2_5OmniThinker",
            PACKED | {"depth": 4, "window_size": 56, "fullatt_block_indexes": [1, 3]},
            TEXT | ROTARY,
            audio_config=AUDIO,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_token_index=92,
            audio_start_token_id=93,
            audio_end_token_id=94,
            vision_start_token_id=95,
        ),
        started(qwen_image),
    ),
    "qwen3_omni_moe": Vlm(
        built(
            "Qwen3OmniMoeThinker",
            PACKED | QWEN3_VISION | {"deepstack_visual_indexes": [0, 2], "patch_size": 16},
            TEXT | {"head_dim": 8, **EXPERTS, **ROTARY},
            audio_config=AUDIO,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=92,
            audio_start_token_id=93,
            vision_start_token_id=95,
        ),
        started(qwen3_image),
    ),
    "paddleocr_vl": Vlm(
        built(
            "PaddleOCRVL",
            CLIP | {"image_size": 64, "patch_size": 8},
            TEXT | {"head_dim": 8, **ROTARY},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        grid_image(8),
        types="mm_token_type_ids",
    ),
    "video_llama_3": Vlm(
        built(
            "VideoLlama3",
            CLIP | {"model_type": "video_llama_3_vision"},
            TEXT | {"model_type": "qwen2"},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        grid_image(8, image_merge_sizes=2),
        video=llama3_video,
    ),
    "kimi_k25": Vlm(
        built(
            "Kimi_K25",
            {k: v for k, v in CLIP.items() if k not in ("image_size", "patch_size")},
            TEXT | {"model_type": "llama"},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            projection_hidden_size=32,
        ),
        grid_image(14),
    ),
    "mistral3": Vlm(
        built(
            "Mistral3",
            ("PixtralVisionConfig", CLIP),
            ("MistralConfig", TEXT | {"head_dim": 8}),
            image_token_index=IMAGE,
        ),
        sized_image,
    ),
    "lighton_ocr": Vlm(
        built(
            "LightOnOcr",
            ("PixtralVisionConfig", CLIP),
            ("Qwen3Config", TEXT | {"head_dim": 8}),
            image_token_id=IMAGE,
        ),
        sized_image,
    ),
}
