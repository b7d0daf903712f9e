"""What denoisers of images take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turbovlm.diffusion.inputs.entry import Entry, Request
from turbovlm.errors import ConfigError, TurboError

PROMPT = 64
"""Words of a prompt, where pipelines do not fill it up to a fixed length."""


def _unet(asked: Request) -> dict[str, Any]:
    config = asked.config
    if config.addition_embed_type not in (None, "text_time") or config.class_embed_type is not None:
        raise TurboError(
            f"UNet2DConditionModel with addition_embed_type={config.addition_embed_type!r} and "
            f"class_embed_type={config.class_embed_type!r}: which inputs it takes is not known; give the pipeline that "
            "it is from"
        )
    widths = config.encoder_hid_dim or config.cross_attention_dim
    inputs: dict[str, Any] = {
        "sample": asked.latent(),
        "encoder_hidden_states": asked.noise(77, widths if isinstance(widths, int) else widths[0]),  # CLIP's text
        "timestep": asked.full(500),
    }
    if config.addition_embed_type == "text_time":  # SDXL: a vector of the text, and six numbers of the image's size
        pooled = asked.noise(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": asked.full(512)[:, None].repeat(1, 6)}
    return inputs


def _pixart(asked: Request) -> dict[str, Any]:
    sized = asked.model.use_additional_conditions
    return {
        **_texted(asked, 120, asked.config.caption_channels),  # T5's, as PixArt cuts it
        "added_cond_kwargs": {
            "resolution": asked.noise(2) if sized else None,
            "aspect_ratio": asked.noise(1) if sized else None,
        },
    }


def _dit(asked: Request) -> dict[str, Any]:
    if asked.rows != asked.columns:
        size = f"{asked.columns * asked.pixels}x{asked.rows * asked.pixels}"
        raise ConfigError(f"--image-size {size}: DiTTransformer2DModel makes square images only")
    return {"hidden_states": asked.latent(), "timestep": asked.full(500), "class_labels": asked.full(0).long()}


def _texted(asked: Request, words: int, width: int) -> dict[str, Any]:
    """The latent, the text and the time."""
    return {
        "hidden_states": asked.latent(),
        "encoder_hidden_states": asked.noise(words, width),
        "timestep": asked.full(500),
    }


def _sd3(asked: Request) -> dict[str, Any]:
    config = asked.config
    text = _texted(asked, 333, config.joint_attention_dim)  # CLIP's 77 and T5's 256
    return {**text, "pooled_projections": asked.noise(config.pooled_projection_dim)}


def _sequence(asked: Request, words: int, axes: int = 3) -> dict[str, Any]:
    """What denoisers like FLUX take: tokens, with the place of each."""
    places = asked.places(axes)
    return {
        "hidden_states": asked.packed(),
        "encoder_hidden_states": asked.noise(words, asked.config.joint_attention_dim),
        "img_ids": places,
        "txt_ids": torch.zeros(words, axes, device=places.device, dtype=places.dtype),
        "timestep": asked.of(0.5),
    }


def _flux(asked: Request) -> dict[str, Any]:
    config = asked.config
    return {
        **_sequence(asked, 512),
        "pooled_projections": asked.noise(config.pooled_projection_dim),
        "guidance": asked.of(3.5) if config.guidance_embeds else None,
    }


def _flux2(asked: Request) -> dict[str, Any]:
    given = _sequence(asked, 512, axes=4)
    ids = {name: given[name].expand(asked.batch, -1, -1) for name in ("img_ids", "txt_ids")}
    return {**given, **ids, "guidance": asked.of(4.0) if asked.config.guidance_embeds else None}


def _chroma(asked: Request) -> dict[str, Any]:
    return {**_sequence(asked, 512), "attention_mask": asked.every(512 + asked.tokens)}


def _qwen(asked: Request) -> dict[str, Any]:
    config = asked.config
    return {
        "hidden_states": asked.packed(),
        "encoder_hidden_states": asked.noise(PROMPT, config.joint_attention_dim),
        "encoder_hidden_states_mask": asked.every(PROMPT),
        "timestep": asked.of(0.5),
        "img_shapes": [[asked.grid]] * asked.batch,
        "guidance": asked.of(1.0) if config.guidance_embeds else None,
        "additional_t_cond": asked.full(0).long() if config.use_additional_t_cond else None,
    }


def _qwen21(asked: Request) -> dict[str, Any]:
    _, rows, columns = asked.grid
    if rows * columns % 4:
        size = f"{asked.columns * asked.pixels}x{asked.rows * asked.pixels}"
        raise ConfigError(f"--image-size {size}: QwenImage21Transformer2DModel takes multiples of four tokens")
    places = torch.arange(PROMPT + rows * columns // 4, device=asked.model.device) >= PROMPT
    return {
        "hidden_states": asked.packed(),
        "encoder_hidden_states": asked.noise(PROMPT, asked.config.context_in_dim),
        "encoder_hidden_states_mask": asked.every(PROMPT),
        "timestep": asked.of(0.5),
        "img_shapes": [[asked.grid]] * asked.batch,
        "img_mask": places.expand(asked.batch, -1),
    }


def _hidream(asked: Request) -> dict[str, Any]:
    config, words = asked.config, 128
    layers = max(config.llama_layers) + 1
    return {
        "hidden_states": asked.latent(),
        "timesteps": asked.full(500),
        "encoder_hidden_states_t5": asked.noise(words, config.caption_channels[0]),
        "encoder_hidden_states_llama3": asked.noise(layers, words, config.caption_channels[1]).transpose(0, 1),
        "pooled_embeds": asked.noise(config.text_emb_dim),
    }


def _hunyuan(asked: Request) -> dict[str, Any]:
    config = asked.config
    inputs = {**_texted(asked, PROMPT, config.text_embed_dim), "encoder_attention_mask": asked.every(PROMPT)}
    inputs["timestep"] = asked.of(500)
    if len(config.patch_size) == 3:  # the refiner
        inputs["hidden_states"] = asked.video()
    if config.text_embed_2_dim is not None:
        glyphs = asked.noise(128, config.text_embed_2_dim)  # ByT5's
        inputs |= {"encoder_hidden_states_2": glyphs, "encoder_attention_mask_2": asked.every(128)}
    if config.guidance_embeds:
        inputs["guidance"] = asked.of(3500)
    if config.use_meanflow:
        inputs["timestep_r"] = asked.of(400)
    return inputs


def _cogview(asked: Request) -> dict[str, Any]:
    size = torch.tensor([asked.rows * asked.pixels, asked.columns * asked.pixels], dtype=torch.float32)
    target = size.to(asked.model.device).expand(asked.batch, 2)
    words = asked.noise(224, asked.config.text_embed_dim)  # T5's, as CogView3 cuts it
    sizes = {"original_size": target, "target_size": target, "crop_coords": torch.zeros_like(target)}
    return {
        "hidden_states": asked.latent(),
        "encoder_hidden_states": words,
        "timestep": asked.full(500),
        **sizes,
    }


def _glm(asked: Request) -> dict[str, Any]:
    given = _cogview(asked)
    del given["original_size"]
    prior = torch.zeros(asked.batch, asked.tokens, device=asked.model.device, dtype=torch.long)
    return {**given, "prior_token_id": prior, "prior_token_drop": prior.bool()}


def _auraflow(asked: Request) -> dict[str, Any]:
    return {**_texted(asked, 256, asked.config.joint_attention_dim), "timestep": asked.of(0.5)}


def _lumina2(asked: Request) -> dict[str, Any]:
    words = min(PROMPT, asked.config.axes_lens[0] - 1)
    text = _texted(asked, words, asked.config.cap_feat_dim)
    return {**text, "timestep": asked.of(0.5), "encoder_attention_mask": asked.every(words, dtype=torch.int)}


def _prx(asked: Request) -> dict[str, Any]:
    text = _texted(asked, 256, asked.config.context_in_dim)
    return {**text, "timestep": asked.of(0.5), "attention_mask": asked.every(256)}


def _krea2(asked: Request) -> dict[str, Any]:
    config, image = asked.config, asked.places()
    text = torch.zeros(PROMPT, 3, device=image.device, dtype=image.dtype)
    return {
        "hidden_states": asked.packed(),
        "encoder_hidden_states": asked.noise(PROMPT, config.num_text_layers, config.text_hidden_dim),
        "encoder_attention_mask": asked.every(PROMPT),
        "timestep": asked.of(0.5),
        "position_ids": torch.cat((text, image)),
    }


def _z_image(asked: Request) -> dict[str, Any]:
    config = asked.config
    if config.siglip_feat_dim is not None:
        raise TurboError(
            f"ZImageTransformer2DModel with siglip_feat_dim={config.siglip_feat_dim}: it edits images, and which "
            "inputs it takes is not known; give the pipeline that it is from"
        )
    return {
        "x": list(asked.video()),
        "t": asked.of(0.5),
        "cap_feats": list(asked.noise(PROMPT, config.cap_feat_dim)),
    }


IMAGES: Mapping[str, Entry] = {
    "UNet2DConditionModel": Entry(_unet, sides=("sample_size",)),
    "PixArtTransformer2DModel": Entry(_pixart, sides=("sample_size",)),
    "DiTTransformer2DModel": Entry(_dit, sides=("sample_size",)),
    "SD3Transformer2DModel": Entry(_sd3, sides=("sample_size",)),
    "FluxTransformer2DModel": Entry(_flux, packed=2),
    "Flux2Transformer2DModel": Entry(_flux2, packed=2),
    "ChromaTransformer2DModel": Entry(_chroma, packed=2),
    "LongCatImageTransformer2DModel": Entry(lambda asked: _sequence(asked, 512), packed=2),
    "BriaTransformer2DModel": Entry(lambda asked: _sequence(asked, 128), packed=2),
    "QwenImage21Transformer2DModel": Entry(_qwen21, pixels=16),
    "HiDreamImageTransformer2DModel": Entry(_hidream),
    "OvisImageTransformer2DModel": Entry(lambda asked: _sequence(asked, 256), packed=2),
    "QwenImageTransformer2DModel": Entry(_qwen, packed=2),
    "HunyuanImageTransformer2DModel": Entry(
        _hunyuan, pixels=lambda config: 16 if len(config.patch_size) == 3 else 32, size=(2048, 2048)
    ),
    "CogView3PlusTransformer2DModel": Entry(_cogview, sides=("sample_size",)),
    "CogView4Transformer2DModel": Entry(_cogview, sides=("sample_size",)),
    "GlmImageTransformer2DModel": Entry(_glm),
    "AuraFlowTransformer2DModel": Entry(_auraflow),
    "Lumina2Transformer2DModel": Entry(_lumina2, sides=("sample_size",)),
    "PRXTransformer2DModel": Entry(_prx, pixels=lambda config: {3: 1, 32: 32}.get(config.in_channels, 8)),
    "Krea2Transformer2DModel": Entry(_krea2, packed=2),
    "ZImageTransformer2DModel": Entry(_z_image, packed=2),
}
"""By the name of the denoiser's class. Sizes in pixels are those that the library's pipelines begin with."""
