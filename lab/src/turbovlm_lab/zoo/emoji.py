"""A small text-to-image model, trained on emoji: a `StableDiffusionPipeline` whose denoiser fits into a repository.

Its text encoder is MiniLM, its denoiser a UNet of Stable Diffusion's kind with transformer blocks in two resolutions,
and in place of a VAE the 2×2 pixels of a cell become channels: 64×64 pixels are 32×32 latent ones, and nothing is lost.
`studies/emoji` trains it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm_lab.zoo.minilm import load_minilm
from turbovlm_lab.zoo.pixels import CELL, Cells, shipped

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

WEIGHTS = Path(__file__).parent / "weights" / "emoji_unet.safetensors"
NAMES = WEIGHTS.with_name("emoji_names.txt")
STYLES, PLACES = ("noto", "twemoji", "fluent"), ("on white", "on a photo")
WORDS = 16
"""Tokens of a prompt."""


class Words(nn.Module):
    """MiniLM as a pipeline calls a text encoder: token ids to `[batch, words, 384]`, first of a tuple."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert
        self.config = SimpleNamespace(use_attention_mask=False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        hidden: Tensor = self.bert(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        return (hidden,)


def emoji_unet() -> UNet2DConditionModel:
    """The denoiser, with random weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32,
        in_channels=3 * CELL**2,
        out_channels=3 * CELL**2,
        layers_per_block=1,
        block_out_channels=(64, 96, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=384,
        norm_num_groups=16,
    )


def load_emoji_pipeline(weights: Path | str = WEIGHTS) -> StableDiffusionPipeline:
    """The pipeline with its weights, fp32, on the CPU: `pipe("red apple, noto, on a photo").images[0]`, 64×64 pixels.

    A prompt names what there is, one of the styles `noto`, `twemoji` and `fluent`, and `on white` or `on a photo`.

    Args:
        weights: a safetensors file of the denoiser's.

    Raises:
        TurboError: the weights, MiniLM or `diffusers` are not there.
    """
    state = shipped(weights, "emoji")
    unet = emoji_unet()
    unet.load_state_dict(state)
    return emoji_pipeline(unet)


def emoji_prompts() -> list[str]:
    """All prompts that the model has learnt: every name in every style on every ground."""
    names = NAMES.read_text().splitlines()
    return [f"{name}, {style}, {place}" for style in STYLES for name in names for place in PLACES]


def emoji_pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """A pipeline around a denoiser as `emoji_unet` makes them."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    minilm = load_minilm()
    minilm.tokenizer.model_max_length = WORDS
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        lambda_min_clipped=-5.1,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=Cells(),
        text_encoder=Words(minilm.bert),
        tokenizer=minilm.tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
