"""A small text-to-video model like Wan, trained on moving drawings: a `WanPipeline` that fits into a repository.

Its denoiser has 12 blocks of width 128 with rotary positions in time and space. In place of a VAE two frames become
channels, as Wan's first frame stands alone: 15 frames of 32×32 pixels are 8 latent ones, or 2,048 tokens of 2×2 pixels.
Words are read by MiniLM. `studies/moving` trains it.
"""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.errors import TurboError
from turbovlm_lab.zoo.emoji import PLACES
from turbovlm_lab.zoo.minilm import load_minilm

if TYPE_CHECKING:
    from diffusers import WanPipeline, WanTransformer3DModel

WEIGHTS = Path(__file__).parent / "weights" / "moving_transformer.safetensors"
SIDE, FRAMES = 32, 15
"""Pixels a side of the videos, and their frames."""
PAIR = 2
"""Frames of a latent frame, but for the first."""
SHIFT = 3.0
"""By how much the scheduler favours much noise: frames that are alike show through a lot of it."""
THINGS = ("red apple", "lemon", "doughnut", "sunflower", "frog", "octopus", "penguin", "whale")
WAYS = ("left", "right", "up", "down")


class FramePairs(nn.Module):
    """What a pipeline takes for a VAE: videos, `[batch, 3, 1 + 2n, h, w]`, to latents, `[batch, 6, 1 + n, h, w]`.

    The first frame stands alone, twice.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = 3 * PAIR
        self.config = SimpleNamespace(
            scale_factor_temporal=PAIR,
            scale_factor_spatial=1,
            z_dim=channels,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        )
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def encode(self, videos: Tensor) -> Any:
        """Exact, so that its distribution is one latent."""
        frames = torch.cat([videos[:, :, :1], videos], dim=2)
        batch, channels, count, *sides = frames.shape
        pairs = frames.view(batch, channels, count // PAIR, PAIR, *sides)
        return SimpleNamespace(latents=pairs.transpose(2, 3).flatten(1, 2))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The inverse; of the two first frames their mean."""
        batch, channels, count, *sides = latents.shape
        frames = latents.view(batch, channels // PAIR, PAIR, count, *sides).transpose(2, 3).flatten(2, 3)
        first = frames[:, :, :PAIR].mean(dim=2, keepdim=True)
        return (torch.cat([first, frames[:, :, PAIR:]], dim=2),)


def moving_transformer() -> WanTransformer3DModel:
    """The denoiser, with random weights."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        in_channels=3 * PAIR,
        out_channels=3 * PAIR,
        num_layers=12,
        num_attention_heads=4,
        attention_head_dim=32,
        ffn_dim=384,
        text_dim=384,
        freq_dim=64,
        rope_max_seq_len=64,
    )


def moving_prompts() -> list[str]:
    """All prompts that the model has learnt: every thing on every ground, moving every way."""
    return [f"{thing}, {place}, moving {way}" for thing, place, way in product(THINGS, PLACES, WAYS)]


def load_moving_pipeline(weights: Path | str = WEIGHTS) -> WanPipeline:
    """The pipeline with its weights, fp32, on the CPU.

    `pipe("red apple, on a photo, moving left").frames[0]` is 15 frames of 32×32 pixels, in 12 steps with guidance 3.
    Prompts are those of `moving_prompts`.

    Args:
        weights: a safetensors file of the denoiser's.

    Raises:
        TurboError: the weights, MiniLM or `diffusers` are not there.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise TurboError("the moving model needs diffusers: pip install 'turbovlm[diffusers]'")
    if not Path(weights).is_file():
        raise TurboError(f"{weights}: there are no such weights; studies/moving/train.py makes them")
    from safetensors.torch import load_file

    transformer = moving_transformer()
    transformer.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    return moving_pipeline(transformer)


def moving_pipeline(transformer: WanTransformer3DModel | None = None) -> WanPipeline:
    """A pipeline around a denoiser as `moving_transformer` makes them; None for one with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from turbovlm_lab.zoo.moving_pipeline import MovingPipeline

    minilm = load_minilm()
    return MovingPipeline(
        tokenizer=minilm.tokenizer,
        text_encoder=minilm.bert,
        vae=FramePairs(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=(transformer or moving_transformer()).eval(),
    )
