"""What denoisers of videos take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from turbovlm.diffusion.inputs.entry import Entry, Request
from turbovlm.errors import TurboError

FRAMES_PER_SECOND = 24
LTX_PIXELS, LTX_STRIDE = 32, 8
"""Pixels per side of a latent pixel, and frames per latent frame, of LTX's autoencoders."""
WAN_WORDS, CLIP_TOKENS = 512, 257
"""Words of a text, to which Wan's are filled up, and an image's tokens of CLIP."""


def _video(asked: Request, words: int, width: int) -> dict[str, Any]:
    """The latent, the text and the time."""
    return {
        "hidden_states": asked.video(),
        "encoder_hidden_states": asked.noise(words, width),
        "timestep": asked.full(500),
    }


def _wan(asked: Request) -> dict[str, Any]:
    config = asked.config
    inputs = _video(asked, WAN_WORDS, config.text_dim)
    if config.image_dim is not None:
        images = 1 if config.pos_embed_seq_len is None else 2  # of the first frame, or of that and the last
        inputs["encoder_hidden_states_image"] = asked.noise(images, CLIP_TOKENS, config.image_dim).flatten(0, 1)
    return inputs


def _vace(asked: Request) -> dict[str, Any]:
    return {**_wan(asked), "control_hidden_states": asked.video(asked.config.vace_in_channels)}


def _animate(asked: Request) -> dict[str, Any]:
    config, side = asked.config, asked.config.motion_encoder_size
    return {
        **_wan(asked),
        "pose_hidden_states": asked.video(config.latent_channels)[:, :, 1:],
        "face_pixel_values": asked.noise(3, 4 * (asked.frames - 1), side, side),
    }


def _skyreels(asked: Request) -> dict[str, Any]:
    return {**_wan(asked), "fps": [1] * asked.batch if asked.config.inject_sample_info else None}


def _hunyuan(asked: Request) -> dict[str, Any]:
    config = asked.config
    return {
        **_video(asked, 256, config.text_embed_dim),
        "encoder_attention_mask": asked.every(256),
        "pooled_projections": asked.noise(config.pooled_projection_dim),
        "guidance": asked.of(6000) if config.guidance_embeds else None,
    }


def _hunyuan15(asked: Request) -> dict[str, Any]:
    config = asked.config
    image = torch.zeros_like(asked.noise(729, config.image_embed_dim))  # zeros say that there is none
    return {
        **_video(asked, 1000, config.text_embed_dim),
        "timestep": asked.of(500),
        "encoder_attention_mask": asked.every(1000),
        "encoder_hidden_states_2": asked.noise(256, config.text_embed_2_dim),
        "encoder_attention_mask_2": asked.every(256),
        "image_embeds": image,
        "timestep_r": asked.of(400) if config.use_meanflow else None,
    }


def _ltx(asked: Request) -> dict[str, Any]:
    frames, rows, columns = asked.grid
    return {
        "hidden_states": asked.packed(),
        "encoder_hidden_states": asked.noise(128, asked.config.caption_channels),
        "encoder_attention_mask": asked.every(128),
        "timestep": asked.full(500),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (LTX_STRIDE / FRAMES_PER_SECOND, LTX_PIXELS, LTX_PIXELS),
    }


def _ltx2(asked: Request) -> dict[str, Any]:
    config = asked.config
    if config.cross_attn_mod or config.audio_cross_attn_mod:
        raise TurboError(
            "LTX2VideoTransformer3DModel with cross_attn_mod or audio_cross_attn_mod: which inputs it takes is not "
            "known; give the pipeline that it is from"
        )
    own = _ltx(asked)
    del own["rope_interpolation_scale"]
    seconds = ((asked.frames - 1) * LTX_STRIDE + 1) / FRAMES_PER_SECOND
    per_second = config.audio_sampling_rate / config.audio_hop_length / config.audio_scale_factor
    sounds = round(seconds * per_second)
    return {
        **own,
        "encoder_hidden_states": asked.noise(1024, config.caption_channels),
        "encoder_attention_mask": asked.every(1024),
        "timestep": asked.full(500)[:, None].repeat(1, asked.tokens),
        "audio_hidden_states": asked.noise(sounds, config.audio_in_channels),
        "audio_encoder_hidden_states": asked.noise(1024, config.caption_channels),
        "audio_encoder_attention_mask": asked.every(1024),
        "audio_timestep": asked.full(500),
        "audio_num_frames": sounds,
    }


def _cogvideox(asked: Request) -> dict[str, Any]:
    config = asked.config
    inputs = _video(asked, config.max_text_seq_length, config.text_embed_dim)
    inputs["hidden_states"] = inputs["hidden_states"].transpose(1, 2)
    if config.use_rotary_positional_embeddings:
        angles = torch.zeros(asked.tokens, config.attention_head_dim, device=asked.model.device)
        inputs["image_rotary_emb"] = angles.cos(), angles.sin()
    if config.ofs_embed_dim is not None:
        inputs["ofs"] = torch.full((1,), 2.0, device=asked.model.device)
    return inputs


def _easyanimate(asked: Request) -> dict[str, Any]:
    config = asked.config
    inputs = _video(asked, 256, config.text_embed_dim)
    if config.text_embed_dim_t5 is not None:
        inputs["encoder_hidden_states_t5"] = asked.noise(256, config.text_embed_dim_t5)
    return inputs


def _mochi(asked: Request) -> dict[str, Any]:
    return {**_video(asked, 256, asked.config.text_embed_dim), "encoder_attention_mask": asked.every(256)}


def _allegro(asked: Request) -> dict[str, Any]:
    config, (frames, rows, columns) = asked.config, asked.grid
    along = config.attention_head_dim // 3
    angles = [torch.zeros(length, along, device=asked.model.device) for length in asked.grid]
    places = torch.cartesian_prod(asked.range(frames), asked.range(rows), asked.range(columns)).T.unsqueeze(1)
    return {
        **_video(asked, 512, config.caption_channels),
        "encoder_attention_mask": asked.every(512),
        "image_rotary_emb": (tuple((each.cos(), each.sin()) for each in angles), tuple(places.contiguous())),
    }


def _cosmos(asked: Request) -> dict[str, Any]:
    config = asked.config
    width = config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim
    if config.img_context_dim_in:
        raise TurboError(
            f"CosmosTransformer3DModel with img_context_dim_in={config.img_context_dim_in}: which inputs it takes is "
            "not known; give the pipeline that it is from"
        )
    padding = torch.zeros(1, 1, asked.rows, asked.columns, device=asked.model.device, dtype=asked.model.dtype)
    return {**_video(asked, 512, width), "fps": FRAMES_PER_SECOND, "padding_mask": padding}


def _kandinsky5(asked: Request) -> dict[str, Any]:
    config, words = asked.config, 64
    channels = config.in_visual_dim
    return {
        "hidden_states": asked.noise(
            asked.frames, asked.rows, asked.columns, 2 * channels + 1 if config.visual_cond else channels
        ),
        "encoder_hidden_states": asked.noise(words, config.in_text_dim),
        "timestep": asked.full(500),
        "pooled_projections": asked.noise(config.in_text_dim2),
        "visual_rope_pos": [asked.range(length) for length in asked.grid],
        "text_rope_pos": asked.range(words),
    }


def _motion(asked: Request) -> dict[str, Any]:
    config = asked.config
    if config.addition_embed_type is not None or config.encoder_hid_dim_type is not None:
        raise TurboError(
            f"UNetMotionModel with addition_embed_type={config.addition_embed_type!r} and "
            f"encoder_hid_dim_type={config.encoder_hid_dim_type!r}: which inputs it takes is not known; give the "
            "pipeline that it is from"
        )
    return {
        "sample": asked.video(),
        "encoder_hidden_states": asked.noise(asked.frames, 77, config.cross_attention_dim).flatten(0, 1),  # CLIP's text
        "timestep": asked.full(500),
    }


def _spatio_temporal(asked: Request) -> dict[str, Any]:
    config = asked.config
    widths = config.cross_attention_dim
    return {
        "sample": asked.noise(asked.frames, config.in_channels, asked.rows, asked.columns),
        "encoder_hidden_states": asked.noise(1, widths if isinstance(widths, int) else widths[0]),  # CLIP's image
        "timestep": asked.full(500),
        "added_time_ids": asked.noise(config.projection_class_embeddings_input_dim // config.addition_time_embed_dim),
    }


def _wan_is_small(config: Any) -> bool:
    """Whether it is the 5B of Wan 2.2, whose autoencoder halves rows and columns once more than the others'."""
    return bool(config.out_channels == 48)


WAN = Entry(
    _wan,
    pixels=lambda config: 16 if _wan_is_small(config) else 8,
    size=lambda config: (704, 1280) if _wan_is_small(config) else (480, 832),
    frames=lambda config: 121 if _wan_is_small(config) else 81,
    stride=4,
)

VIDEOS: Mapping[str, Entry] = {
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": Entry(_vace, size=(480, 832), frames=81, stride=4),
    "WanAnimateTransformer3DModel": Entry(_animate, size=(720, 1280), frames=77, stride=4, least=5),
    "ChronoEditTransformer3DModel": Entry(_wan, size=(480, 832), frames=81, stride=4),
    "SkyReelsV2Transformer3DModel": Entry(_skyreels, size=(544, 960), frames=97, stride=4),
    "HunyuanVideoTransformer3DModel": Entry(_hunyuan, size=(720, 1280), frames=129, stride=4),
    "HunyuanVideo15Transformer3DModel": Entry(_hunyuan15, pixels=16, size=(480, 848), frames=121, stride=4),
    "LTXVideoTransformer3DModel": Entry(_ltx, pixels=LTX_PIXELS, size=(512, 704), frames=161, stride=LTX_STRIDE),
    "LTX2VideoTransformer3DModel": Entry(_ltx2, pixels=LTX_PIXELS, size=(512, 768), frames=121, stride=LTX_STRIDE),
    "CogVideoXTransformer3DModel": Entry(
        _cogvideox,
        sides=("sample_height", "sample_width"),
        frames=lambda config: int(config.sample_frames),
        stride=4,
    ),
    "EasyAnimateTransformer3DModel": Entry(_easyanimate, size=(512, 512), frames=49, stride=4),
    "MochiTransformer3DModel": Entry(_mochi, size=(480, 848), frames=19, stride=6),
    "AllegroTransformer3DModel": Entry(
        _allegro,
        sides=("sample_height", "sample_width"),
        frames=lambda config: 4 * int(config.sample_frames),
        stride=4,
        first=4,
    ),
    "CosmosTransformer3DModel": Entry(_cosmos, size=(704, 1280), frames=121, stride=8),
    "UNetMotionModel": Entry(_motion, sides=("sample_size",), size=(512, 512), frames=16, stride=1),
    "UNetSpatioTemporalConditionModel": Entry(
        _spatio_temporal, size=(576, 1024), frames=lambda config: int(config.num_frames), stride=1
    ),
    "Kandinsky5Transformer3DModel": Entry(
        _kandinsky5,
        size=lambda config: (512, 768) if config.visual_cond else (1024, 1024),
        frames=lambda config: 121 if config.visual_cond else 1,
        stride=4,
    ),
}
"""By the name of the denoiser's class. Sizes and frames are those that the library's pipelines begin with."""
