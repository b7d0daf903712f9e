"""The small VLM in bf16, with Gemma's weights kept dequantised between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from features import DATA
from safetensors.torch import load_file, save_file

from turbovlm_lab.zoo.gemma import load_gemma
from turbovlm_lab.zoo.small_vlm import SmallVlm, load_trained, with_clip


def assembled(weights: Path, device: str = "cpu") -> SmallVlm:
    """As `load_small_vlm` makes it, in bf16."""
    vlm = with_clip(*cached_gemma())
    load_trained(vlm.model, weights)
    vlm.model.to(device, torch.bfloat16)
    return vlm


def cached_gemma() -> tuple[Any, Any]:
    """The language model without its head, fp32, and the tokenizer; reading the packages takes minutes."""
    from transformers import AutoTokenizer, Gemma3TextConfig, Gemma3TextModel

    folder = DATA / "gemma"
    if not (folder / "weights.safetensors").exists():
        gemma = load_gemma()
        config = gemma.model.config.to_dict()
        config.pop("quantization_config", None)
        Gemma3TextConfig(**config).save_pretrained(folder)
        gemma.tokenizer.save_pretrained(folder)
        weights = {name: value.bfloat16().contiguous() for name, value in gemma.model.model.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
    config = Gemma3TextConfig.from_pretrained(folder, attn_implementation="sdpa")
    model = Gemma3TextModel(config)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
