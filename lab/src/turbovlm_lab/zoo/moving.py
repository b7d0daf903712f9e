"""A small text-to-video model like Wan, trained on moving drawings: a `WanPipeline` that fits into a repository.

Its denoiser has 12 blocks of width 128 with rotary positions in time and space. In place of a VAE two frames become
channels, as Wan's first frame stands alone: 15 frames of 32×32 pixels are 8 latent ones, or 2,048 tokens of 2×2 pixels.
Words are read by MiniLM. `studies/moving` trains it.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm_lab.zoo.emoji import PLACES
from turbovlm_lab.zoo.minilm import load_minilm
from turbovlm_lab.zoo.pixels import PAIR, FramePairs, shipped

if TYPE_CHECKING:
    from diffusers import WanPipeline, WanTransformer3DModel

WEIGHTS = Path(__file__).parent / "weights" / "moving_transformer.safetensors"
SIDE, FRAMES = 32, 15
"""Pixels a side of the videos, and their frames."""
SHIFT = 3.0
"""By how much the scheduler favours much noise: frames that are alike show through a lot of it."""
THINGS = ("red apple", "lemon", "doughnut", "sunflower", "frog", "octopus", "penguin", "whale")
WAYS = ("left", "right", "up", "down")


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
    state = shipped(weights, "moving")
    transformer = moving_transformer()
    transformer.load_state_dict(state)
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
