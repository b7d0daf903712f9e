"""MiniGPT-v2 (Chen et al., 2023): an EVA-g tower, four neighbouring tokens joined to one, and LLaMA-2.

The tower's CLS is dropped; at 448 pixels its 1,024 patches become 256 tokens of the language model, 139 of them with
`r=12` and 100 with `r=16`. Merged in spatial order, as is the default, four joined tokens are still neighbours.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import Blip2VisionConfig, Blip2VisionModel

from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.models.checkpoint import load_checkpoint, read_checkpoint

JOINED = 4
"""Tokens of the tower in one of the language model."""
LORA_SCALE = 16 / 64
"""The authors' alpha over rank."""
LORA_PREFIX = "llama_model.base_model.model."

EVA_RENAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
)
"""How `eva_vit_g.pth` names what `Blip2VisionModel` has."""


class MiniGPTv2(nn.Module):
    """Images and words to words.

    In `input_ids`, each `image_token` stands for one image, however many tokens it becomes.

    Args:
        language_model: LLaMA-2, or any causal language model of `transformers`.
        vision: of the tower; EVA-g with 39 blocks at 448 pixels if None.
        image_token: an id that no word has, such as the size of the vocabulary.
    """

    def __init__(
        self, language_model: Any, vision: Blip2VisionConfig | None = None, image_token: int | None = None
    ) -> None:
        super().__init__()
        vision = vision or Blip2VisionConfig(image_size=448, initializer_range=0.02)
        self.image_token = int(language_model.config.vocab_size) if image_token is None else image_token
        self.vision_model = Blip2VisionModel(vision)
        self.projection = nn.Linear(JOINED * vision.hidden_size, language_model.config.hidden_size)
        self.language_model = language_model

    @classmethod
    def from_checkpoint(cls, path: str | Path, eva: str | Path, language_model: Any, **settings: Any) -> MiniGPTv2:
        """The model with its authors' weights, in eval mode.

        Args:
            path: `minigptv2_checkpoint.pth`: the projection, and LoRA's matrices, which are added to `language_model`.
            eva: `eva_vit_g.pth`: the tower, whose positions are resized.
            language_model: LLaMA-2 7B chat, as `transformers` loads it.

        Raises:
            TurboError: a file is missing or does not fit.
        """
        model = cls(language_model, **settings)
        load_checkpoint(model.vision_model, read_eva(eva, model.vision_model), EVA_RENAMES)
        stored = read_checkpoint(path)
        projection = {name: value for name, value in stored.items() if name.startswith("llama_proj.")}
        load_checkpoint(model.projection, projection, ((r"llama_proj\.", ""),))
        add_lora(language_model, {name: value for name, value in stored.items() if name not in projection})
        return model.eval()

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """What the language model reads of each image, `[images, tokens, width]`.

        Where the tower's tokens are no multiple of four, the last one is repeated.
        """
        patches = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]
        missing = -patches.shape[1] % JOINED
        if missing:
            patches = torch.cat([patches, patches[:, -1:].expand(-1, missing, -1)], dim=1)
        tokens: Tensor = self.projection(patches.reshape(len(patches), -1, JOINED * patches.shape[-1]))
        return tokens

    def prompt(
        self, pixel_values: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The language model's inputs: embeddings with the images in their places, padded on the left, and a mask.

        Raises:
            ConfigError: there are more or fewer images than image tokens.
        """
        images = [] if pixel_values is None else list(self.visual_tokens(pixel_values))
        asked = int((input_ids == self.image_token).sum())
        if asked != len(images):
            raise ConfigError(f"pixel_values: {asked} images expected, one per image token; {len(images)} found")
        embed, waiting, rows = self.language_model.get_input_embeddings(), iter(images), []
        for index, ids in enumerate(input_ids):
            seen = ids if attention_mask is None else ids[attention_mask[index].bool()]
            places = (seen == self.image_token).nonzero().flatten().tolist()
            parts, start = [], 0
            for place in places:
                parts += [embed(seen[start:place]), next(waiting)]
                start = place + 1
            rows.append(torch.cat([*parts, embed(seen[start:])]))
        longest = max(map(len, rows))
        padded = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {"inputs_embeds": padded, "attention_mask": torch.tensor(mask, device=padded.device)}

    def forward(
        self, pixel_values: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The language model's output on `prompt(...)`; `kwargs` go to it."""
        inputs = self.prompt(pixel_values, input_ids, attention_mask)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        return self.language_model(**inputs, position_ids=positions, **kwargs)

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The answer's tokens, `[batch, new]`; `kwargs` go to the language model's `generate`."""
        generated: Tensor = self.language_model.generate(
            **self.prompt(pixel_values, input_ids, attention_mask), **kwargs
        )
        return generated


def read_eva(path: str | Path, tower: Any) -> dict[str, Tensor]:
    """The tensors of `eva_vit_g.pth` that the tower needs, its positions resized, its biases joined."""
    config = tower.config
    used = "|".join(str(block) for block in range(config.num_hidden_layers))
    stored = read_checkpoint(path, rf"cls_token|pos_embed|patch_embed\.proj\..*|blocks\.({used})\..*")
    side = config.image_size // config.patch_size
    positions = stored["pos_embed"]
    if positions.shape[1] != side * side + 1:
        old = int((positions.shape[1] - 1) ** 0.5)
        grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        stored["pos_embed"] = torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
    for block in range(config.num_hidden_layers):
        name = f"blocks.{block}.attn."
        q, v = stored.pop(f"{name}q_bias"), stored.pop(f"{name}v_bias")
        stored[f"{name}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    norm = tower.post_layernorm
    return {**stored, "post_layernorm.weight": norm.weight.detach(), "post_layernorm.bias": norm.bias.detach()}


@torch.no_grad()
def add_lora(language_model: Any, stored: dict[str, Tensor]) -> None:
    """Add `B·A·alpha/rank` to every matrix that has a pair in `stored`.

    Raises:
        TurboError: a tensor is no half of a pair, or of no matrix of the model.
    """
    matrices = dict(language_model.named_parameters())
    for name in sorted(stored):
        target = name.removeprefix(LORA_PREFIX).partition(".lora_")[0] + ".weight"
        if not re.search(r"\.lora_[AB]\.", name) or target not in matrices:
            raise TurboError(f"{name} is no LoRA matrix of this {type(language_model).__name__}")
    for name in (name for name in sorted(stored) if ".lora_A." in name):
        other = name.replace(".lora_A.", ".lora_B.")
        if other not in stored:
            raise TurboError(f"{name} has no {other} beside it")
        matrix = matrices[name.removeprefix(LORA_PREFIX).partition(".lora_")[0] + ".weight"]
        matrix += (LORA_SCALE * stored[other].float() @ stored[name].float()).to(matrix)
