"""BLIP for NLVR2: is a sentence true of two images? (Li et al., BLIP, ICML 2022, §4.4.)

The text encoder attends to each image by an attention of its own; the two results are averaged in the lower half of
the layers and joined by a linear map in the upper half. Encoder, attentions and MLPs are those of `transformers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import BertConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.bert.modeling_bert import BertAttention, BertCrossAttention, BertIntermediate, BertOutput
from transformers.models.blip.modeling_blip_text import BlipTextEmbeddings

from turbovlm.encoder import rows
from turbovlm.errors import ConfigError
from turbovlm_lab.models.checkpoint import load_checkpoint, read_checkpoint

ENCODE_TOKEN = 30523
"""`[ENC]`: stands in the sentence's first place, and its output is classified."""

VISION_RENAMES = (
    (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
    (r"visual_encoder\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv", r"vision_model.encoder.layers.\1.self_attn.qkv"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj", r"vision_model.encoder.layers.\1.self_attn.projection"),
    (r"visual_encoder\.blocks\.(\d+)\.mlp", r"vision_model.encoder.layers.\1.mlp"),
    (r"visual_encoder\.norm", "vision_model.post_layernorm"),
)
"""How BLIP's authors name what `BlipVisionModel` has."""
RENAMES = (
    *VISION_RENAMES,
    (r"text_encoder\.encoder\.layer\.", "layers."),
    (r"text_encoder\.embeddings\.", "embeddings."),
)
"""How the authors' checkpoint names what is below."""
WANTED = r"(?!.*position_ids)(?!visual_encoder\.head\.).*"
"""Their buffers, and the tower's unused classifier, are left out."""


class BlipForNLVR2(nn.Module):
    """Two images and a sentence to two scores: false, true.

    Args:
        vision: of the image encoder; BLIP's ViT-B/16 at 384 pixels if None.
        text: of the text encoder; BLIP's 12 layers with 30,524 words if None.
        encode_token: takes the place of every sentence's first token.
    """

    def __init__(
        self,
        vision: BlipVisionConfig | None = None,
        text: BertConfig | None = None,
        encode_token: int = ENCODE_TOKEN,
    ) -> None:
        super().__init__()
        vision = vision or BlipVisionConfig(
            image_size=384,
            patch_size=16,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            layer_norm_eps=1e-6,
            initializer_range=0.02,
        )
        text = text or BertConfig(vocab_size=30524)
        text._attn_implementation = "sdpa"
        self.encode_token = encode_token
        self.vision_model = BlipVisionModel(vision)
        self.embeddings = BlipTextEmbeddings(text)
        depth = text.num_hidden_layers
        layers = [_Layer(text, vision.hidden_size, joined=layer >= depth // 2) for layer in range(depth)]
        self.layers = nn.ModuleList(layers)
        width = text.hidden_size
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    @classmethod
    def from_checkpoint(cls, path: str | Path, **settings: Any) -> BlipForNLVR2:
        """The model with the weights of its authors' file, such as `model_base_nlvr.pth`, in eval mode.

        Raises:
            TurboError: there is no such file, or it does not fit.
        """
        model = cls(**settings)
        load_checkpoint(model, read_checkpoint(path, WANTED), RENAMES)
        return model.eval()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores of "false" and "true", `[batch, 2]`.

        Args:
            pixel_values: `[batch, 2, 3, height, width]`; or `[2 · batch, 3, height, width]`, all first images and
                then all second ones, as the authors pass them.
            input_ids, attention_mask: `[batch, tokens]`.

        Raises:
            ConfigError: there are not two images for every sentence.
        """
        if pixel_values.ndim == 5:
            pixel_values = pixel_values.transpose(0, 1).flatten(0, 1)
        if len(pixel_values) != 2 * len(input_ids):
            raise ConfigError(
                f"pixel_values: two images per sentence expected, {len(pixel_values)} found for {len(input_ids)}"
            )
        tokens = self.vision_model(pixel_values=pixel_values).last_hidden_state
        first, second = rows(tokens, slice(len(input_ids))), rows(tokens, slice(len(input_ids), None))
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        encode = input_ids.new_full((len(input_ids), 1), self.encode_token)
        hidden = self.embeddings(input_ids=torch.cat([encode, input_ids[:, 1:]], dim=1))
        for layer in self.layers:
            hidden = layer(hidden, mask, first, second)
        scores: Tensor = self.cls_head(hidden[:, 0])
        return scores


class _Layer(nn.Module):
    def __init__(self, config: BertConfig, vision_width: int, joined: bool) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.crossattention = _TwoImages(config, vision_width, joined)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, hidden: Tensor, mask: Tensor | None, first: Tensor, second: Tensor) -> Tensor:
        hidden, _ = self.attention(hidden, mask)
        hidden = self.crossattention(hidden, first, second)
        out: Tensor = self.output(self.intermediate(hidden), hidden)
        return out


class _TwoImages(nn.Module):
    """Attention to each image, and one sum with the residual for both."""

    def __init__(self, config: BertConfig, vision_width: int, joined: bool) -> None:
        super().__init__()
        self.self0 = _attention_to(config, vision_width)
        self.self1 = _attention_to(config, vision_width)
        self.output = _Output(config, joined)

    def forward(self, hidden: Tensor, first: Tensor, second: Tensor) -> Tensor:
        seen, _ = self.self0(hidden, encoder_hidden_states=first)
        seen_too, _ = self.self1(hidden, encoder_hidden_states=second)
        out: Tensor = self.output(seen, seen_too, hidden)
        return out


class _Output(nn.Module):
    def __init__(self, config: BertConfig, joined: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense0, self.dense1 = nn.Linear(width, width), nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if joined else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, seen: Tensor, seen_too: Tensor, hidden: Tensor) -> Tensor:
        one, two = self.dense0(seen), self.dense1(seen_too)
        both = (one + two) / 2 if self.merge_layer is None else self.merge_layer(torch.cat([one, two], dim=-1))
        out: Tensor = self.LayerNorm(self.dropout(both) + hidden)
        return out


def _attention_to(config: BertConfig, vision_width: int) -> nn.Module:
    attention: nn.Module = BertCrossAttention(config)
    if vision_width != config.hidden_size:
        attention.key = nn.Linear(vision_width, config.hidden_size)
        attention.value = nn.Linear(vision_width, config.hidden_size)
    return attention
