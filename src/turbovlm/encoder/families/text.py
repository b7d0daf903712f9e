"""The blocks of `transformers`' bidirectional text encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.encoder.layout import Around, Layout, variant

MODELS = "transformers.models"
CAUSAL = "its attention is causal: a merged token would tell words what comes after them"
CAUSAL_TOWERS = {
    f"{MODELS}.clip.modeling_clip.CLIPText{name}" for name in ("Model", "Transformer", "ModelWithProjection")
}
"""Text encoders whose blocks are those of a vision encoder, but for the mask."""


def _longest_text(tower: Any) -> int:
    return int(tower.config.max_position_embeddings) - 1


def _longest_words(tower: Any) -> dict[str, Tensor | None]:
    """Words of many kinds, as many as the encoder takes."""
    return {"input_ids": torch.arange(_longest_text(tower) + 1).unsqueeze(0) % tower.config.vocab_size}


def _causal(tower: Any, block: Any, ancestors: Around) -> str | None:
    if tower.config.is_decoder:
        return CAUSAL
    return None


BERT = Layout(
    family="transformers BERT",
    block=f"{MODELS}.bert.modeling_bert.BertLayer",
    towers=(f"{MODELS}.bert.modeling_bert.BertModel",),
    norm1=None,
    project=("attention.self.query", "attention.self.key", "attention.self.value"),
    heads="attention.self.num_attention_heads",
    after_attention=("attention.output.dense", "attention.output.dropout"),
    mlp=("intermediate", "output.dense", "output.dropout"),
    norm_after_attention="attention.output.LayerNorm",
    norm_after_mlp="output.LayerNorm",
    patch=None,
    patches=_longest_text,
    scale="attention.self.scaling?",
    dropout="attention.self.dropout",
    arguments=("attention_mask", "encoder_hidden_states"),
    understood=("position_ids",),
    mask="attention_mask",
    restore=True,
    text=True,
    refuse=_causal,
    inputs=_longest_words,
)

ROBERTA = variant(
    BERT,
    family="transformers RoBERTa",
    block=f"{MODELS}.roberta.modeling_roberta.RobertaLayer",
    towers=(f"{MODELS}.roberta.modeling_roberta.RobertaModel",),
)

XLM_ROBERTA = variant(
    BERT,
    family="transformers XLM-RoBERTa",
    block=f"{MODELS}.xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer",
    towers=(f"{MODELS}.xlm_roberta.modeling_xlm_roberta.XLMRobertaModel",),
)

ELECTRA = variant(
    BERT,
    family="transformers ELECTRA",
    block=f"{MODELS}.electra.modeling_electra.ElectraLayer",
    towers=(f"{MODELS}.electra.modeling_electra.ElectraModel",),
)

LAYOUTS = (BERT, ROBERTA, XLM_ROBERTA, ELECTRA)
