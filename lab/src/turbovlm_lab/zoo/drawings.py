"""A small text-to-image model like FLUX, trained on drawings: a `FluxPipeline` that fits into a repository.

Its denoiser is deep and narrow: 4 double and 8 single blocks of width 128, with joint attention and rotary positions.
It works on pixels: the pipeline packs 2×2 of them, so 64×64 pixels are 1,024 tokens. Words are read by MiniLM, and the
drawings and prompts are those of `turbovlm_lab.zoo.emoji`. `studies/drawings` trains it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm_lab.zoo.emoji import WORDS
from turbovlm_lab.zoo.minilm import load_minilm
from turbovlm_lab.zoo.pixels import Cells, shipped

if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel

WEIGHTS = Path(__file__).parent / "weights" / "drawings_transformer.safetensors"
SIDE = 64
"""Pixels a side of the images."""
PATCH = 2
"""Pixels a side of a token, as `FluxPipeline` packs them."""
WIDTH = 384
"""Of MiniLM's words."""
SHIFT = 2.0
"""By how much the scheduler favours much noise: the more pixels, the more noise it takes to hide what is drawn."""


class Reading(NamedTuple):
    """What the pipeline takes from a text encoder: words, `[batch, 16, 384]`, and their mean, `[batch, 384]`."""

    words: Tensor
    pooler_output: Tensor


class Reader(nn.Module):
    """MiniLM in the place of both of the pipeline's text encoders.

    Only the first 16 tokens of a prompt are read; what is padding is nought, and no part of the mean.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, ids: Tensor, output_hidden_states: bool = False) -> Reading:
        ids = ids[:, :WORDS]
        mask = ids != 0
        hidden: Tensor = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        words = hidden * mask.unsqueeze(-1)
        return Reading(words, words.sum(1) / mask.sum(1, keepdim=True))


def drawings_transformer() -> FluxTransformer2DModel:
    """The denoiser, with random weights."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=3 * PATCH**2,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )


def load_drawings_pipeline(weights: Path | str = WEIGHTS) -> FluxPipeline:
    """The pipeline with its weights, fp32, on the CPU.

    `pipe("red apple, noto, on a photo").images[0]` is 64×64 pixels. Guidance takes an empty prompt beside it:
    `pipe(prompt, negative_prompt="", true_cfg_scale=3.0)`. Prompts are those of `emoji_prompts`.

    Args:
        weights: a safetensors file of the denoiser's.

    Raises:
        TurboError: the weights, MiniLM or `diffusers` are not there.
    """
    state = shipped(weights, "drawings")
    transformer = drawings_transformer()
    transformer.load_state_dict(state)
    return drawings_pipeline(transformer)


def drawings_pipeline(transformer: FluxTransformer2DModel | None = None) -> FluxPipeline:
    """A pipeline around a denoiser as `drawings_transformer` makes them; None for one with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    minilm = load_minilm()
    minilm.tokenizer.model_max_length = WORDS
    reader: Any = Reader(minilm.bert)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=Cells(1),
        text_encoder=reader,
        tokenizer=minilm.tokenizer,
        text_encoder_2=reader,
        tokenizer_2=minilm.tokenizer,
        transformer=(transformer or drawings_transformer()).eval(),
    )
    pipe.default_sample_size = SIDE
    return pipe
