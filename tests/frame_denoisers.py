"""UNets of videos whose blocks see each frame as an image, with blocks of time between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from denoisers import noise

FRAMES, ROWS, COLUMNS = 3, 16, 12
TOKENS = ROWS * COLUMNS


@dataclass(frozen=True)
class Framed:
    """How to make a small model, its inputs, and which of its blocks see frames."""

    make: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]
    spatial: str

    def __call__(self) -> Any:
        torch.manual_seed(0)
        return self.make().eval()


def text(batch: int, words: int = 7) -> torch.Tensor:
    return noise(1, batch, words, 32)


def video(batch: int, channels: int = 4) -> torch.Tensor:
    return noise(0, batch, channels, FRAMES, ROWS, COLUMNS)


def sizes(kind: str, other: str) -> dict[str, Any]:
    return {
        "block_out_channels": (32, 64),
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{other}"),
        "up_block_types": (f"UpBlock{other}", f"CrossAttnUpBlock{kind}"),
        "cross_attention_dim": 32,
        "layers_per_block": 1,
    }


def animatediff() -> Any:
    from diffusers import UNetMotionModel

    heads = {"num_attention_heads": 2, "motion_num_attention_heads": 2}
    return UNetMotionModel(**sizes("Motion", "Motion"), **heads, norm_num_groups=8)


def animatediff_inputs(batch: int) -> dict[str, Any]:
    words = text(batch).repeat_interleave(FRAMES, dim=0)
    return {"sample": video(batch), "timestep": torch.tensor(500), "encoder_hidden_states": words}


def stable_video() -> Any:
    from diffusers import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel(
        **sizes("SpatioTemporal", "SpatioTemporal"),
        transformer_layers_per_block=2,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=FRAMES,
    )


def stable_video_inputs(batch: int) -> dict[str, Any]:
    return {
        "sample": noise(0, batch, FRAMES, 8, ROWS, COLUMNS),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text(batch, 1),
        "added_time_ids": noise(2, batch, 3),
    }


def text_to_video() -> Any:
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel(**sizes("3D", "3D"), attention_head_dim=8, norm_num_groups=8)


def text_to_video_inputs(batch: int) -> dict[str, Any]:
    return {"sample": video(batch), "timestep": torch.tensor(500), "encoder_hidden_states": text(batch)}


def image_to_video() -> Any:
    from diffusers import I2VGenXLUNet

    return I2VGenXLUNet(**sizes("3D", "3D"), attention_head_dim=8, norm_num_groups=8)


def image_to_video_inputs(batch: int) -> dict[str, Any]:
    return {
        **text_to_video_inputs(batch),
        "fps": torch.full((batch,), 16),
        "image_latents": noise(2, batch, 4, FRAMES, ROWS, COLUMNS),
        "image_embeddings": noise(3, batch, 32),
    }


ATTENTIONS = ".attentions."
FRAMED = {
    "animatediff": Framed(animatediff, animatediff_inputs, ATTENTIONS),
    "stable-video": Framed(stable_video, stable_video_inputs, ".transformer_blocks."),
    "text-to-video": Framed(text_to_video, text_to_video_inputs, ATTENTIONS),
    "image-to-video": Framed(image_to_video, image_to_video_inputs, ATTENTIONS),
}
