"""Small models of families whose tower encodes each image, or tile of one, by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from packed_vlms import LINEAR, PARTIAL, built
from vlms import ANYRES, CLIP, IMAGE, TEXT, VIDEO, Vlm, anyres_image, noise, square


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


def pooled_video(index: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """2 frames of 6×6 patches, pooled to 3×3 tokens."""
    return [VIDEO] * 18, {"pixel_values_videos": noise(50 + index, 1, 2, 3, 48, 48)}


def unpadded_image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Images of 6×6 or 4×8 patches, filled up to 36."""
    height, width = ((6, 6), (4, 8))[index % 2]
    mask = (torch.arange(36) < height * width).int().unsqueeze(0)
    found = {"pixel_values": noise(index, 1, 36, 3 * 8 * 8) * mask.unsqueeze(-1), "pixel_attention_mask": mask}
    return height * width // 4, found | {"spatial_shapes": torch.tensor([[height, width]])}


def one_in_many(tokens: int, pixels: int) -> Callable[[int], tuple[int, dict[str, torch.Tensor]]]:
    """Images behind an axis of images, or of tiles."""

    def image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
        return tokens, {"pixel_values": noise(index, 1, 1, 3, pixels, pixels)}

    return image


def placed(seed: int, frames: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of images, filled up to 48, and their places, -1 for padding."""
    patches = torch.zeros(frames, 48, 3 * 8 * 8)
    patches[:, : rows * columns] = noise(seed, frames, rows * columns, 3 * 8 * 8).sigmoid()
    places = torch.full((frames, 48, 2), -1)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places[:, : rows * columns] = torch.stack([x, y], dim=-1).flatten(0, 1)
    return patches, places


def placed_image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
    rows, columns = ((6, 8), (4, 6))[index % 2]
    patches, places = placed(index, 1, rows, columns)
    return rows * columns // 4, {"pixel_values": patches, "image_position_ids": places}


def placed_video(index: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    frames = 2 + index % 2
    patches, places = placed(50 + index, frames, 4, 4)
    found = {"pixel_values_videos": patches, "video_position_ids": places}
    return [VIDEO] * (4 * frames), found | {"num_frames_per_video": torch.tensor([frames])}


def gemma4(both_ways: str | None) -> Callable[[], Any]:
    vision = {k: v for k, v in CLIP.items() if k != "image_size"} | {"num_key_value_heads": 4, "head_dim": 8}
    text = {"head_dim": 8, "global_head_dim": 8, "layer_types": ["full_attention"] * 3}
    text |= {
        "vocab_size_per_layer_input": 100,
        "hidden_size_per_layer_input": 8,
        "use_bidirectional_attention": both_ways,
    }
    return built(
        "Gemma4",
        ("Gemma4VisionConfig", vision | {"pooling_kernel_size": 2, "position_embedding_size": 64}),
        ("Gemma4TextConfig", TEXT | text),
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=96,
    )


def sliced_image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Images of 8×8 or 4×8 patches side by side, joined four by four, twice."""
    rows, columns = ((8, 8), (4, 8))[index % 2]
    found = {"pixel_values": noise(index, 1, 3, 8, 8 * rows * columns), "target_sizes": torch.tensor([[rows, columns]])}
    return rows * columns // 16, found


def bounded_image(index: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Images of 8×8 or 4×12 patches, in rows that end in a newline, between a beginning and an end."""
    rows, columns = ((8, 8), (4, 12))[index % 2]
    found = {"pixel_values": noise(index, rows * columns, 3 * 8 * 8)}
    tokens = rows // 2 * (columns // 2 + 1) + 2
    return tokens, found | {"image_grid_thw": torch.tensor([[1, rows, columns]])}


GEMMA_AUDIO = {
    "vocab_offset": 95,
    "vocab_size": 5,
    "hidden_size": 16,
    "conf_num_hidden_layers": 1,
    "conf_num_attention_heads": 2,
}
GEMMA_AUDIO |= {"input_feat_size": 16, "sscp_conv_channel_size": (4, 4)}
TIMM = {"model_type": "timm_wrapper", "architecture": "test_resnet", "hidden_size": 96}
SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
}
EXPERTS_OF_DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

PROJECTED_VLMS = {
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
    "ovis2": Vlm(
        built(
            "Ovis2",
            CLIP | {"vocab_size": 40, "hidden_stride": 2},
            TEXT | {"model_type": "qwen2"},
            image_token_id=IMAGE,
            hidden_size=32,
            vocab_size=100,
            visual_indicator_token_ids=[92, 93, 94, 95, 96],
        ),
        square(9, 48),
    ),
    "deepseek_vl": Vlm(
        built(
            "DeepseekVL",
            CLIP | {"model_type": "siglip_vision_model"},
            TEXT | {"model_type": "llama"},
            image_token_id=IMAGE,
        ),
        square(36, 48),
    ),
    "janus": Vlm(
        built(
            "Janus",
            ("JanusVisionConfig", {k: v for k, v in CLIP.items() if k != "intermediate_size"} | {"projection_dim": 32}),
            TEXT | {"model_type": "llama"},
            vq_config={"base_channels": 32, "num_embeddings": 16, "projection_dim": 32, "image_token_embed_dim": 32},
            image_token_id=IMAGE,
        ),
        square(36, 48),
    ),
    "lfm2_vl": Vlm(
        built(
            "Lfm2Vl",
            ("Siglip2VisionConfig", {k: v for k, v in CLIP.items() if k != "image_size"} | {"num_patches": 36}),
            ("Lfm2Config", TEXT | {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16}),
            image_token_id=IMAGE,
            projector_hidden_size=32,
        ),
        unpadded_image,
    ),
    "idefics2": Vlm(
        built(
            "Idefics2",
            ("Idefics2VisionConfig", CLIP),
            ("MistralConfig", TEXT | {"head_dim": 8}),
            perceiver_config={
                "hidden_size": 32,
                "resampler_n_latents": 8,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
            image_token_id=IMAGE,
        ),
        one_in_many(8, 48),
        attention=False,
    ),
    "aria": Vlm(
        built(
            "Aria",
            {"model_type": "idefics3_vision", **CLIP},
            ("AriaTextConfig", TEXT | {"moe_num_experts": 4, "head_dim": 8}),
            projector_patch_to_query_dict={36: 12},
            image_token_index=IMAGE,
        ),
        square(12, 48),
        attention=False,
    ),
    "fast_vlm": Vlm(
        built("FastVlm", TIMM, ("Qwen2Config", TEXT), image_token_index=IMAGE), square(36, 192), attention=False
    ),
    "perception_lm": Vlm(
        built(
            "PerceptionLM",
            TIMM | {"architecture": "test_vit", "model_args": {"img_size": 48, "patch_size": 8, "embed_dim": 32}},
            ("LlamaConfig", TEXT),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            projector_pooling_ratio=2,
        ),
        one_in_many(9, 48),
        attention=False,
    ),
    "got_ocr2": Vlm(
        built("GotOcr2", ("GotOcr2VisionConfig", SAM), ("Qwen2Config", TEXT), image_token_index=IMAGE),
        square(4, 128),
        attention=False,
    ),
    "deepseek_vl_hybrid": Vlm(
        built(
            "DeepseekVLHybrid",
            CLIP | {"model_type": "siglip_vision_model"},
            TEXT | {"model_type": "llama"},
            high_res_vision_config={"model_type": "sam_vision_model", **SAM},
            image_token_id=IMAGE,
        ),
        lambda index: (
            36,
            {"pixel_values": noise(index, 1, 3, 48, 48), "high_res_pixel_values": noise(index, 1, 3, 128, 128)},
        ),
    ),
    "gemma3n": Vlm(
        built(
            "Gemma3n",
            ("Gemma3nVisionConfig", TIMM | {"vocab_offset": 90, "vocab_size": 5}),
            (
                "Gemma3nTextConfig",
                TEXT
                | {
                    "head_dim": 8,
                    "layer_types": ["full_attention"] * 3,
                    "vocab_size_per_layer_input": 90,
                    "hidden_size_per_layer_input": 8,
                    "num_kv_shared_layers": 1,
                    "laurel_rank": 4,
                    "altup_num_inputs": 2,
                    "intermediate_size": [48] * 3,
                    "activation_sparsity_pattern": [0.0] * 3,
                },
            ),
            audio_config=GEMMA_AUDIO,
            vision_soft_tokens_per_image=36,
            image_token_id=IMAGE,
            audio_token_id=96,
        ),
        square(36, 192),
        attention=False,
    ),
    "gemma4": Vlm(gemma4(None), placed_image, types="mm_token_type_ids", video=placed_video),
    "gemma4_both_ways": Vlm(gemma4("vision"), placed_image, types="mm_token_type_ids"),
    "llama4": Vlm(
        built(
            "Llama4",
            (
                "Llama4VisionConfig",
                CLIP
                | {
                    "vision_output_dim": 32,
                    "projector_input_dim": 32,
                    "projector_output_dim": 32,
                    "intermediate_size": 128,
                },
            ),
            (
                "Llama4TextConfig",
                TEXT
                | {
                    "head_dim": 8,
                    "intermediate_size_mlp": 48,
                    "num_local_experts": 2,
                    "interleave_moe_layer_step": 2,
                    "no_rope_layers": [1, 0, 1],
                    "attention_chunk_size": 256,
                },
            ),
            image_token_index=IMAGE,
        ),
        square(9, 48),
        beams=False,
    ),
    "video_llava": Vlm(
        projected("VideoLlava", "CLIPVisionConfig", "LlamaConfig", image_token_index=IMAGE, video_token_index=VIDEO),
        square(36, 48),
        video=lambda index: ([VIDEO] * 74, {"pixel_values_videos": noise(50 + index, 1, 2, 3, 48, 48)}),
        attention=False,
    ),
    "minicpmv4_6": Vlm(
        built(
            "MiniCPMV4_6",
            CLIP | {"insert_layer_id": 1},
            TEXT | {"head_dim": 8, "model_type": "qwen3_5_text", **LINEAR, **PARTIAL},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        sliced_image,
        attention=False,
        side_by_side=True,
    ),
    "hunyuan_vl": Vlm(
        built(
            "HunYuanVL",
            {k: v for k, v in CLIP.items() if k != "image_size"} | {"out_hidden_size": 32, "text_hidden_size": 32},
            TEXT
            | {
                "head_dim": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]},
            },
            image_token_id=IMAGE,
        ),
        bounded_image,
        types="mm_token_type_ids",
        attention=False,
    ),
    "deepseek_ocr2": Vlm(
        built(
            "DeepseekOcr2",
            {
                "sam_config": SAM | {"downsample_channels": [16, 32]},
                "encoder_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
                | {"num_attention_heads": 4, "num_key_value_heads": 2},
            },
            TEXT | {"mlp_layer_types": ["dense", "sparse", "sparse"]} | EXPERTS_OF_DEEPSEEK,
            image_token_id=IMAGE,
        ),
        square(145, 128),
        attention=False,
    ),
    "fuyu": Vlm(
        built(
            "Fuyu",
            {},
            TEXT | {"model_type": "persimmon"},
            cls="ForCausalLM",
            image_token_id=IMAGE,
            image_size=48,
            patch_size=8,
        ),
        lambda index: (24, {"pixel_values": noise(index, 1, 24, 192)}),
        attention=False,
        beams=False,
    ),
}
