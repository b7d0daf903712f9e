"""The encoders of sound in `transformers`: spectrograms in patches (AST) or frames (Whisper), and waveforms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.families.transformers import DEIT, MODELS
from turbovlm.encoder.layout import Layout, variant

SECONDS = 5
"""Of a recording for an encoder of waveforms, which has no native length."""
SAMPLING_RATE = 16_000


def _spectrogram_patches(tower: Any) -> int:
    rows, columns = tower.embeddings.get_shape(tower.config)
    return int(rows * columns)


def _spectrogram(tower: Any) -> dict[str, Tensor | None]:
    return {"input_values": torch.empty(1, tower.config.max_length, tower.config.num_mel_bins, device="meta")}


def _frames(tower: Any) -> dict[str, Tensor | None]:
    """Two frames of mel features for each token."""
    frames = tower.config.max_source_positions * tower.conv1.stride[0] * tower.conv2.stride[0]
    return {"input_features": torch.empty(1, tower.config.num_mel_bins, frames, device="meta")}


def _stem_of_frames(tower: Any) -> int:
    return int(tower.conv1.weight.numel() * tower.conv2.stride[0] + tower.conv2.weight.numel())


def _finite(block: nn.Module, tokens: Tensor) -> Tensor:
    """What such a layer does to halves at its end."""
    if tokens.dtype != torch.float16:
        return tokens
    limit = torch.finfo(tokens.dtype).max - 1000
    return tokens.clamp(-limit, limit)


def _wave(tower: Any) -> dict[str, Tensor | None]:
    return {"input_values": torch.empty(1, SECONDS * SAMPLING_RATE, device="meta")}


def _wave_tokens(tower: Any) -> int:
    """Tokens of `SECONDS` seconds."""
    length = SECONDS * SAMPLING_RATE
    for kernel, stride in zip(tower.config.conv_kernel, tower.config.conv_stride):
        length = (length - kernel) // stride + 1
    return length


def _stem_of_wave(tower: Any) -> int:
    """The convolutions run as often for one token as the strides behind them say; the one between tokens runs once."""
    total, often = 0, 1
    for layer in reversed(tower.feature_extractor.conv_layers):
        total += often * layer.conv.weight.numel()
        often *= layer.conv.stride[0]
    beside = (tower.feature_projection, tower.encoder.pos_conv_embed)
    return int(total + sum(_weights(module) for part in beside for module in part.modules()))


def _weights(module: Any) -> int:
    return int(module.weight.numel()) if isinstance(module, nn.Linear | nn.Conv1d) else 0


def _adapted(block: Any, tokens: Tensor) -> Tensor:
    """Add what a language's adapter makes of the tokens, where there is one."""
    adapted: Tensor = tokens if block.adapter_layer is None else tokens + block.adapter_layer(tokens)
    return adapted


AST = variant(
    DEIT,
    family="transformers AST",
    block=f"{MODELS}.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer.ASTLayer",
    towers=(f"{MODELS}.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer.ASTModel",),
    patches=_spectrogram_patches,
    inputs=_spectrogram,
    restore=False,
)

WHISPER = Layout(
    family="transformers Whisper",
    block=f"{MODELS}.whisper.modeling_whisper.WhisperEncoderLayer",
    towers=(f"{MODELS}.whisper.modeling_whisper.WhisperEncoder",),
    norm1="self_attn_layer_norm",
    project=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    heads="self_attn.num_heads",
    after_attention=("self_attn.out_proj", "dropout"),
    mlp=("final_layer_norm", "fc1", "activation_fn", "activation_dropout", "fc2", "dropout"),
    patch=_stem_of_frames,
    patches=lambda tower: int(tower.config.max_source_positions),
    inputs=_frames,
    prefix=0,
    cls=False,
    scale="self_attn.scaling",
    dropout="self_attn.dropout",
    drops=("dropout", "activation_dropout"),
    end=_finite,
    skips="layerdrop",
    restore=True,
    decoder=(f"{MODELS}.whisper.modeling_whisper.WhisperModel", "decoder"),
    line=True,
)

WAV2VEC2 = Layout(
    family="transformers Wav2Vec2",
    block=f"{MODELS}.wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayer",
    towers=(f"{MODELS}.wav2vec2.modeling_wav2vec2.Wav2Vec2Model",),
    norm1=None,
    project=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    heads="attention.num_heads",
    after_attention=("attention.out_proj", "dropout"),
    mlp=("feed_forward",),
    norm_after_attention="layer_norm",
    norm_after_mlp="final_layer_norm",
    patch=_stem_of_wave,
    patches=_wave_tokens,
    inputs=_wave,
    prefix=0,
    cls=False,
    scale="attention.scaling",
    dropout="attention.dropout",
    mask="attention_mask",
    skips="config.layerdrop",
    restore=True,
    line=True,
)

WAV2VEC2_STABLE = variant(
    WAV2VEC2,
    family="transformers Wav2Vec2, norms first",
    block=f"{MODELS}.wav2vec2.modeling_wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm",
    norm1="layer_norm",
    mlp=("final_layer_norm", "feed_forward"),
    norm_after_attention=None,
    norm_after_mlp=None,
    calls=("adapter_layer",),
    end=_adapted,
)

HUBERT = variant(
    WAV2VEC2,
    family="transformers HuBERT",
    block=f"{MODELS}.hubert.modeling_hubert.HubertEncoderLayer",
    towers=(f"{MODELS}.hubert.modeling_hubert.HubertModel",),
)

HUBERT_STABLE = variant(
    WAV2VEC2_STABLE,
    family="transformers HuBERT, norms first",
    block=f"{MODELS}.hubert.modeling_hubert.HubertEncoderLayerStableLayerNorm",
    towers=HUBERT.towers,
)

LAYOUTS = (AST, WHISPER, WAV2VEC2, WAV2VEC2_STABLE, HUBERT, HUBERT_STABLE)
