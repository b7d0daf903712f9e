"""Small models of every supported family, made from the libraries' own configs, with seeded random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn


@dataclass(frozen=True)
class Family:
    """`make` builds the model; `inputs(batch)` its keyword inputs; `output` reads what the tower hands on.

    `pickles`: whether the library's own model does; weight norm does not. `rounding`: how many units in the last place
    half precision moves similarities before the first merge.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    output: Callable[[Any], torch.Tensor]
    bit_identical: bool = True
    cls: bool = True
    rounding: int = 2
    pickles: bool = True


def _images(size: int = 48, key: str = "pixel_values") -> Callable[[int], dict[str, Any]]:
    def inputs(batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(batch)
        coarse = torch.randn(batch, 3, 6, 6, generator=generator)
        image = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        return {key: image + 0.3 * torch.randn(batch, 3, size, size, generator=generator)}

    return inputs


def _hidden(out: Any) -> torch.Tensor:
    return out.last_hidden_state


def _image_features(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out["image_features"]


def _itself(out: torch.Tensor) -> torch.Tensor:
    return out


def _transformers(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 48, "patch_size": 8}
        if config != "Dinov2Config" and config != "Dinov2WithRegistersConfig":
            small["intermediate_size"] = 64
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**{**small, **settings}))
        return _livelier(model)

    return make


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        small = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 48, "patch_size": 8, "num_classes": 5}
        torch.manual_seed(0)
        return _livelier(timm.create_model(name, pretrained=False, **{**small, **settings}))

    return make


def _livelier(model: nn.Module) -> nn.Module:
    """Random weights large enough that attention and MLP matter, as in a trained model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * min(1.0, 1.5 * fan_in**-0.5))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _torchvision() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return _livelier(VisionTransformer(48, 8, 4, 2, 32, 64, num_classes=5))


def _open_clip(**settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        torch.manual_seed(0)
        vision = CLIPVisionCfg(layers=4, width=32, head_width=16, patch_size=8, image_size=48, **settings)
        text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=2)
        return _livelier(CLIP(16, vision, text))

    return make


def _video(batch: int) -> dict[str, Any]:
    frames = [_images()(batch)["pixel_values"] for _ in range(4)]
    generator = torch.Generator().manual_seed(9)
    return {"pixel_values": torch.stack([f + 0.1 * torch.randn(f.shape, generator=generator) for f in frames], dim=1)}


def _naflex(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    shapes = torch.tensor([[6, 6], [5, 4], [4, 7]])[torch.arange(batch) % 3]
    mask = torch.arange(36)[None] < shapes.prod(dim=1)[:, None]
    pixels = torch.randn(batch, 36, 3 * 8 * 8, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}


def _masked(batch: int) -> dict[str, Any]:
    noise = torch.rand(batch, 36, generator=torch.Generator().manual_seed(batch))
    return {**_images()(batch), "noise": noise}


def _sound(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        return _livelier(getattr(transformers, name)(getattr(transformers, config)(**settings)))

    return make


WHISPER = {
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_mel_bins": 8,
    "max_source_positions": 40,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "max_target_positions": 40,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
SPECTROGRAM = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 8,
    "frequency_stride": 8,
    "time_stride": 8,
    "max_length": 72,
    "num_mel_bins": 32,
}
WAVE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 4, 4),
    "conv_stride": (20, 10, 10),
    "layerdrop": 0.0,
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}
HUBERT = {**WAVE, "conv_pos_batch_norm": True}


def _mel(frames: int, mels: int, key: str, *, last: bool) -> Callable[[int], dict[str, Any]]:
    """Features in time, smooth enough that neighbours are alike; `last` puts the mel bins behind the frames."""

    def inputs(batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(batch)
        coarse = torch.randn(batch, mels, frames // 6, generator=generator)
        features = nn.functional.interpolate(coarse, size=frames, mode="linear")
        features = features + 0.3 * torch.randn(features.shape, generator=generator)
        return {key: features.transpose(1, 2).contiguous() if last else features}

    return inputs


def _wave(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    time = torch.linspace(0, 60, 80_000)
    pitch = torch.rand(batch, 3, 1, generator=generator) * 20
    tones = (torch.sin(time * pitch) * torch.sin(0.1 * time * pitch)).sum(dim=1)
    return {"input_values": tones + 0.1 * torch.randn(tones.shape, generator=generator)}


FAMILIES: dict[str, Family] = {
    "vit": Family(_transformers("ViTModel", "ViTConfig"), _images(), _hidden),
    "deit": Family(_transformers("DeiTModel", "DeiTConfig"), _images(), _hidden),
    "vit_msn": Family(_transformers("ViTMSNModel", "ViTMSNConfig"), _images(), _hidden),
    "ijepa": Family(_transformers("IJepaModel", "IJepaConfig"), _images(), _hidden, cls=False),
    "vit_mae": Family(_transformers("ViTMAEModel", "ViTMAEConfig", mask_ratio=0.25), _masked, _hidden),
    "video_mae": Family(
        _transformers("VideoMAEModel", "VideoMAEConfig", num_frames=4, tubelet_size=2), _video, _hidden, cls=False
    ),
    "dinov2": Family(_transformers("Dinov2Model", "Dinov2Config", mlp_ratio=2), _images(), _hidden),
    "dinov2_swiglu": Family(
        _transformers("Dinov2Model", "Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True), _images(), _hidden
    ),
    "dinov2_registers": Family(
        _transformers("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2, num_register_tokens=3),
        _images(),
        _hidden,
    ),
    "dinov3": Family(
        _transformers("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4, layerscale_value=0.8),
        _images(),
        _hidden,
    ),
    "beit": Family(_transformers("BeitModel", "BeitConfig", use_absolute_position_embeddings=True), _images(), _hidden),
    "data2vec": Family(
        _transformers("Data2VecVisionModel", "Data2VecVisionConfig", use_absolute_position_embeddings=True),
        _images(),
        _hidden,
    ),
    "clip": Family(_transformers("CLIPVisionModel", "CLIPVisionConfig"), _images(), _hidden),
    "siglip": Family(_transformers("SiglipVisionModel", "SiglipVisionConfig"), _images(), _hidden, cls=False),
    "siglip2": Family(
        _transformers("Siglip2VisionModel", "Siglip2VisionConfig", num_patches=36), _naflex, _hidden, cls=False
    ),
    "blip": Family(_transformers("BlipVisionModel", "BlipVisionConfig"), _images(), _hidden, bit_identical=False),
    "blip_2": Family(_transformers("Blip2VisionModel", "Blip2VisionConfig"), _images(), _hidden),
    "instructblip": Family(_transformers("InstructBlipVisionModel", "InstructBlipVisionConfig"), _images(), _hidden),
    "timm_vit": Family(_timm("vit_tiny_patch16_224"), _images(key="x"), _itself),
    "timm_layerscale": Family(
        _timm("vit_tiny_patch16_224", init_values=0.5, qk_norm=True), _images(key="x"), lambda out: out
    ),
    "timm_registers": Family(_timm("vit_tiny_patch16_224", reg_tokens=3), _images(key="x"), _itself),
    "timm_no_cls": Family(
        _timm("vit_tiny_patch16_224", class_token=False, global_pool="avg"),
        _images(key="x"),
        _itself,
        cls=False,
    ),
    "timm_map": Family(
        _timm("vit_tiny_patch16_224", class_token=False, global_pool="map"),
        _images(key="x"),
        _itself,
        cls=False,
    ),
    "timm_distilled": Family(_timm("deit_tiny_distilled_patch16_224"), _images(key="x"), _itself),
    "timm_eva02": Family(
        _timm("eva02_tiny_patch14_224", global_pool="token", qkv_fused=True, init_values=0.5),
        _images(key="x"),
        _itself,
    ),
    "timm_eva_avg": Family(_timm("eva02_tiny_patch14_224", qkv_fused=False), _images(key="x"), _itself),
    "timm_rope_mixed": Family(
        _timm("vit_small_patch16_rope_mixed_224", global_pool="token"), _images(key="x"), lambda out: out
    ),
    "timm_dinov3": Family(_timm("vit_small_patch16_dinov3"), _images(key="x"), _itself, cls=True),
    "torchvision": Family(_torchvision, _images(key="x"), _itself, bit_identical=False),
    "open_clip": Family(_open_clip(), _images(key="image"), _image_features, bit_identical=False),
    "open_clip_avg": Family(
        _open_clip(pool_type="avg", ls_init_value=0.5),
        _images(key="image"),
        _image_features,
        bit_identical=False,
    ),
    "ast": Family(_sound("ASTModel", "ASTConfig", **SPECTROGRAM), _mel(72, 32, "input_values", last=True), _hidden),
    "whisper": Family(
        lambda: _sound("WhisperModel", "WhisperConfig", **WHISPER)().encoder,
        _mel(80, 8, "input_features", last=False),
        _hidden,
        bit_identical=False,
        cls=False,
    ),
    "wav2vec2": Family(
        _sound("Wav2Vec2Model", "Wav2Vec2Config", **WAVE), _wave, _hidden, cls=False, rounding=8, pickles=False
    ),
    "wav2vec2_stable": Family(
        _sound("Wav2Vec2Model", "Wav2Vec2Config", do_stable_layer_norm=True, adapter_attn_dim=8, **WAVE),
        _wave,
        _hidden,
        cls=False,
        rounding=8,
        pickles=False,
    ),
    "hubert": Family(_sound("HubertModel", "HubertConfig", **HUBERT), _wave, _hidden, cls=False, rounding=8),
    "hubert_stable": Family(
        _sound("HubertModel", "HubertConfig", do_stable_layer_norm=True, **HUBERT),
        _wave,
        _hidden,
        cls=False,
        rounding=8,
    ),
}
