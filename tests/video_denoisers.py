"""Small denoisers of videos of `diffusers`, made of its own configs, with what their forwards take.

Videos have 3 frames of 7×5 tokens, each of 1×2×2 latent pixels where a family has patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from denoisers import noise, words
from families import _livelier as livelier

FRAMES, ROWS, COLUMNS = 3, 7, 5
TOKENS = FRAMES * ROWS * COLUMNS


@dataclass(frozen=True)
class Video:
    """How to make a denoiser, its inputs for `batch` videos, and of how many blocks its stacks are, for `span=8`."""

    make: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]
    stacks: tuple[int, ...] = (3,)

    def __call__(self) -> Any:
        torch.manual_seed(0)
        return livelier(self.make())


def latent(batch: int, channels: int = 4, patch: int = 2, frames: int = FRAMES) -> torch.Tensor:
    return noise(0, batch, channels, frames, patch * ROWS, patch * COLUMNS)


def mask(batch: int) -> torch.Tensor:
    """Of words, of which the second text has fewer."""
    return (torch.arange(7) < torch.tensor([5, 4])[:batch, None]).long()


def small(**settings: Any) -> dict[str, Any]:
    """Settings that many families have."""
    return {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4} | settings


WAN = small(text_dim=32, freq_dim=32, ffn_dim=48, num_layers=3, rope_max_seq_len=32)


def wan(**settings: Any) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**WAN, **settings)


def wan_inputs(batch: int) -> dict[str, Any]:
    time = torch.full((batch,), 500)
    return {"hidden_states": latent(batch), "timestep": time, "encoder_hidden_states": words(batch)}


def wan_times_inputs(batch: int) -> dict[str, Any]:
    """Each token with a time of its own, of which the first frame's is 0."""
    time = (torch.arange(TOKENS) >= ROWS * COLUMNS) * 500 + torch.arange(TOKENS)
    return {**wan_inputs(batch), "timestep": time.expand(batch, -1)}


def wan_image_inputs(batch: int) -> dict[str, Any]:
    return {
        **wan_inputs(batch),
        "encoder_hidden_states": noise(1, batch, 512, 32),
        "encoder_hidden_states_image": noise(2, batch, 6, 24),
    }


def vace() -> Any:
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(**WAN, vace_layers=[0, 2], vace_in_channels=6)


def vace_inputs(batch: int) -> dict[str, Any]:
    control = {"control_hidden_states": latent(batch, 6), "control_hidden_states_scale": torch.tensor([1.0, 0.5])}
    return {**wan_inputs(batch), **control}


def chronoedit() -> Any:
    from diffusers import ChronoEditTransformer3DModel

    return ChronoEditTransformer3DModel(**WAN)


def skyreels() -> Any:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**WAN)


def skyreels_forcing_inputs(batch: int) -> dict[str, Any]:
    time = torch.tensor([100, 400, 700]).expand(batch, -1)
    return {**wan_inputs(batch), "timestep": time, "enable_diffusion_forcing": True}


def hunyuan(**settings: Any) -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        **small(num_layers=2, num_single_layers=3, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=8),
        rope_axes_dim=(4, 4, 8),
        mlp_ratio=2.0,
        **settings,
    )


def hunyuan_inputs(batch: int) -> dict[str, Any]:
    return {
        **wan_inputs(batch),
        "encoder_attention_mask": mask(batch),
        "pooled_projections": noise(3, batch, 8),
        "guidance": torch.full((batch,), 6.0),
    }


def hunyuan15() -> Any:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        **small(num_layers=3, num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=24, image_embed_dim=12),
        rope_axes_dim=(4, 4, 8),
        patch_size=2,
        mlp_ratio=2.0,
    )


def hunyuan15_inputs(batch: int) -> dict[str, Any]:
    return {
        **wan_inputs(batch),
        "hidden_states": latent(batch),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": mask(batch),
        "encoder_hidden_states_2": noise(4, batch, 4, 24),
        "encoder_attention_mask_2": torch.ones(batch, 4, dtype=torch.long),
        "image_embeds": noise(5, batch, 3, 12),
    }


def ltx() -> Any:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(**small(num_layers=3, cross_attention_dim=32, caption_channels=32))


def ltx_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(0, batch, TOKENS, 4),
        "timestep": torch.full((batch, 1), 500),
        "encoder_hidden_states": words(batch),
        "encoder_attention_mask": mask(batch),
        "num_frames": FRAMES,
        "height": ROWS,
        "width": COLUMNS,
        "rope_interpolation_scale": (8 / 25, 32.0, 32.0),
    }


def ltx_times_inputs(batch: int) -> dict[str, Any]:
    return {**ltx_inputs(batch), "timestep": wan_times_inputs(batch)["timestep"]}


def cogvideox(**settings: Any) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        **small(num_layers=3, time_embed_dim=8, text_embed_dim=32, max_text_seq_length=7),
        sample_height=2 * ROWS,
        sample_width=2 * COLUMNS,
        sample_frames=4 * FRAMES - 3,
        **settings,
    )


def cogvideox_inputs(batch: int) -> dict[str, Any]:
    return {**wan_inputs(batch), "hidden_states": latent(batch).transpose(1, 2)}


def cogvideox_rotary_inputs(batch: int) -> dict[str, Any]:
    angles = noise(6, TOKENS, 16)
    return {**cogvideox_inputs(batch), "image_rotary_emb": (angles.cos(), angles.sin())}


def cogvideox15_inputs(batch: int) -> dict[str, Any]:
    twice = latent(batch, frames=2 * FRAMES).transpose(1, 2)
    return {**cogvideox_rotary_inputs(batch), "hidden_states": twice}


def mochi() -> Any:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        **small(num_attention_heads=8, num_layers=3, pooled_projection_dim=24, text_embed_dim=32, time_embed_dim=8)
    )


def mochi_inputs(batch: int) -> dict[str, Any]:
    return {**wan_inputs(batch), "encoder_attention_mask": mask(batch).bool()}


def allegro() -> Any:
    from diffusers import AllegroTransformer3DModel

    return AllegroTransformer3DModel(
        **small(attention_head_dim=24, num_layers=3, cross_attention_dim=48, caption_channels=32),
        sample_height=2 * ROWS,
        sample_width=2 * COLUMNS,
        sample_frames=FRAMES,
    )


def allegro_inputs(batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    angles = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (ROWS, COLUMNS)), (ROWS, COLUMNS), FRAMES)[:3]
    places = torch.cartesian_prod(*map(torch.arange, (FRAMES, ROWS, COLUMNS))).T.unsqueeze(1)
    rotary = angles, tuple(places.contiguous())
    return {**wan_inputs(batch), "encoder_attention_mask": mask(batch), "image_rotary_emb": rotary}


def cosmos() -> Any:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        **small(num_layers=3, text_embed_dim=32, adaln_lora_dim=8, mlp_ratio=2.0), max_size=(8, 32, 32)
    )


def cosmos_inputs(batch: int) -> dict[str, Any]:
    return {**wan_inputs(batch), "fps": 16, "padding_mask": torch.zeros(1, 1, 2 * ROWS, 2 * COLUMNS)}


def cosmos_times_inputs(batch: int) -> dict[str, Any]:
    time = torch.tensor([0.0, 400.0, 700.0]).view(1, 1, FRAMES, 1, 1).expand(batch, -1, -1, -1, -1)
    return {**cosmos_inputs(batch), "timestep": time}


def animate() -> Any:
    from diffusers import WanAnimateTransformer3DModel

    return WanAnimateTransformer3DModel(
        **{**WAN, "in_channels": 12, "num_layers": 4},
        latent_channels=4,
        image_dim=None,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def animate_inputs(batch: int) -> dict[str, Any]:
    return {
        **wan_inputs(batch),
        "hidden_states": latent(batch, 12),
        "pose_hidden_states": latent(batch)[:, :, 1:],
        "face_pixel_values": noise(8, batch, 3, 5, 16, 16),
    }


def ltx2(**settings: Any) -> Any:
    from diffusers import LTX2VideoTransformer3DModel

    return LTX2VideoTransformer3DModel(
        **small(num_layers=3, cross_attention_dim=32, caption_channels=32),
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        **settings,
    )


def ltx2_inputs(batch: int) -> dict[str, Any]:
    own = {name: x for name, x in ltx_inputs(batch).items() if name != "rope_interpolation_scale"}
    return {
        **own,
        "timestep": wan_times_inputs(batch)["timestep"],
        "audio_hidden_states": noise(9, batch, 11, 4),
        "audio_encoder_hidden_states": words(batch),
        "audio_timestep": torch.full((batch,), 500),
        "audio_num_frames": 11,
    }


def easyanimate() -> Any:
    from diffusers import EasyAnimateTransformer3DModel

    return EasyAnimateTransformer3DModel(
        **small(patch_size=2, num_layers=3, mmdit_layers=2, time_embed_dim=8, text_embed_dim=32)
    )


VIDEOS = {
    "wan": Video(wan, wan_inputs),
    "wan-times": Video(wan, wan_times_inputs),
    "wan-image": Video(lambda: wan(image_dim=24, added_kv_proj_dim=32), wan_image_inputs),
    "hunyuan": Video(hunyuan, hunyuan_inputs, (2, 3)),
    "ltx": Video(ltx, ltx_inputs),
    "ltx-times": Video(ltx, ltx_times_inputs),
    "cogvideox-2b": Video(cogvideox, cogvideox_inputs),
    "cogvideox": Video(lambda: cogvideox(use_rotary_positional_embeddings=True), cogvideox_rotary_inputs),
    "cogvideox-1.5": Video(
        lambda: cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False), cogvideox15_inputs
    ),
    "hunyuan-1.5": Video(hunyuan15, hunyuan15_inputs),
    "mochi": Video(mochi, mochi_inputs),
    "skyreels": Video(skyreels, wan_inputs),
    "skyreels-forcing": Video(skyreels, skyreels_forcing_inputs),
    "chronoedit": Video(chronoedit, wan_inputs),
    "allegro": Video(allegro, allegro_inputs),
    "cosmos": Video(cosmos, cosmos_inputs),
    "cosmos-times": Video(cosmos, cosmos_times_inputs),
    "vace": Video(vace, vace_inputs),
    "animate": Video(animate, animate_inputs, (4,)),
    "ltx2": Video(ltx2, ltx2_inputs),
    "ltx2-split": Video(lambda: ltx2(rope_type="split", gated_attn=True), ltx2_inputs),
    "ltx2-perturbed": Video(lambda: ltx2(perturbed_attn=True), ltx2_inputs),
    "easyanimate": Video(easyanimate, wan_inputs),
}
