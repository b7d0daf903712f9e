"""Small vision-language models with random weights, saved as a folder that `transformers` and vLLM both read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

WORDS = 100
QWEN_IDS = {"vision_start_token_id": 4, "vision_end_token_id": 5, "image_token_id": 6, "video_token_id": 7}
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
OF_QWEN = "<|vision_start|> <|image_pad|> <|vision_end|>"
PLACEHOLDER = {
    "llava": "<image>",
    "llava_siglip": "<image>",
    "onevision": "<image>",
    "qwen2_5": OF_QWEN,
    "qwen3": OF_QWEN,
    "internvl": "<IMG_CONTEXT>",
}
"""What stands for an image in a prompt."""
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
"""Heads of 32 channels, which vLLM's attention on CPUs asks for."""
CLIP = {
    "image_size": 48,
    "patch_size": 8,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
"""36 patches."""


def save(family: str, folder: Path) -> None:
    """Save the small model of a family, its tokenizer and its processor."""
    torch.manual_seed(0)
    model, processor = {**MAKE, **TOWERS}[family]()
    _enliven(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if family in TOWERS:
        _name_as_published(folder / "model.safetensors")


def _enliven(model: Any) -> None:
    """Weights with which what is generated depends on images and on positions."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = 4.0 if re.search(r"[qk]_proj|qkv", name) else 1.0
                fan_in = weight[0].numel()
                weight.normal_(0, scale / fan_in**0.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1)
        model.get_input_embeddings().weight.normal_(0, 1)
        projector = "merger" if hasattr(model.model, "visual") else "multi_modal_projector"
        for name, weight in model.named_parameters():
            if projector in name and weight.ndim > 1:
                weight.mul_(2)


def _tokenizer(marks: tuple[str, ...], **settings: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", "<unk>", *marks]
    words += [f"w{i}" for i in range(WORDS - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        **{"additional_special_tokens": list(marks), **settings},
    )


def _llava() -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig

    return _llava_with(CLIPVisionConfig(**CLIP), "default")


def _llava_siglip() -> tuple[Any, Any]:
    from transformers import SiglipVisionConfig

    return _llava_with(SiglipVisionConfig(**CLIP), "full")


def _llava_with(vision: Any, strategy: str) -> tuple[Any, Any]:
    from transformers import CLIPImageProcessor, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=4,
        vision_feature_select_strategy=strategy,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    processor = LlavaProcessor(
        images,
        _tokenizer(("<image>",)),
        patch_size=8,
        vision_feature_select_strategy=strategy,
        image_token="<image>",
        num_additional_image_tokens=int(strategy == "default"),
    )
    return LlavaForConditionalGeneration(config).eval(), processor


def _name_as_published(file: Path) -> None:
    """Give the tower's weights the names that they have in published checkpoints, which vLLM reads."""
    from safetensors.torch import load_file, save_file

    weights = {
        re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def _qwen2_5() -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    vision = {"depth": 4, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64}
    vision |= {"window_size": 56, "fullatt_block_indexes": [1, 3]}
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **QWEN_IDS)
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}
    tokenizer = _tokenizer(QWEN)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=pixels), tokenizer, Qwen2VLVideoProcessor(size=pixels), chat_template=None
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval(), processor


def _qwen3() -> tuple[Any, Any]:
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    vision = {"depth": 4, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
    rope = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_theta": 10000.0}
    text = TEXT | {"head_dim": 32, "rope_parameters": rope}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_IDS)
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=pixels, patch_size=16),
        _tokenizer(QWEN),
        Qwen3VLVideoProcessor(size=pixels),
        chat_template=None,
    )
    return Qwen3VLForConditionalGeneration(config).eval(), processor


def _onevision() -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    grids = [[48, 48], [48, 96], [96, 48]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**CLIP),
        text_config=Qwen2Config(**TEXT),
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=grids,
    )
    size = {"height": 48, "width": 48}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids),
        _tokenizer(("<image>", "<video>")),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=36,
        vision_feature_select_strategy="full",
    )
    return LlavaOnevisionForConditionalGeneration(config).eval(), processor


def _internvl() -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    vision = {**CLIP, "image_size": [48, 48], "patch_size": [6, 6]}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision),
        text_config=Qwen2Config(**TEXT),
        image_token_id=4,
        tie_word_embeddings=False,
    )
    named = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    named["video_token"] = "<video>"
    tokenizer = _tokenizer(tuple(named.values()), extra_special_tokens=named)
    size = {"height": 48, "width": 48}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=3),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=16,
    )
    return InternVLForConditionalGeneration(config).eval(), processor


MAKE = {"llava": _llava, "onevision": _onevision, "qwen2_5": _qwen2_5, "qwen3": _qwen3, "internvl": _internvl}
TOWERS = {"llava": _llava, "llava_siglip": _llava_siglip, "onevision": _onevision}
"""Those with vLLM's CLIP or SigLIP, in which tokens merge as well."""
