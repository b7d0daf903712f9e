"""What pipelines of small models have in common: latents that are pixels, and weights that ship with the zoo."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import TurboError

CELL = 2
"""Pixels a side of a latent pixel."""
PAIR = 2
"""Frames of a latent frame, but for the first."""


class _Lossless(nn.Module):
    """What a pipeline takes for a VAE, with the place and dtype that it asks for."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        return self.anchor.device


class Cells(_Lossless):
    """Images, `[batch, 3, 2h, 2w]`, to latents, `[batch, 12, h, w]`, and back.

    Args:
        cell: pixels a side of a latent pixel, here 2; with 1 the latents are the images.
    """

    def __init__(self, cell: int = CELL) -> None:
        super().__init__(
            block_out_channels=(1,) * cell, scaling_factor=1.0, shift_factor=0.0, latent_channels=3 * cell**2
        )
        self.cell = cell

    def encode(self, images: Tensor) -> Any:
        """Exact, so that its distribution is one latent."""
        latent = F.pixel_unshuffle(images, self.cell)
        return SimpleNamespace(latents=latent)

    def decode(self, latents: Tensor, return_dict: bool = False, generator: Any = None) -> tuple[Tensor]:
        """The inverse."""
        return (F.pixel_shuffle(latents, self.cell),)


class FramePairs(_Lossless):
    """Videos, `[batch, 3, 1 + 2n, h, w]`, to latents, `[batch, 6, 1 + n, h, w]`, and back.

    The first frame stands alone, twice.
    """

    def __init__(self) -> None:
        channels = 3 * PAIR
        super().__init__(
            scale_factor_temporal=PAIR,
            scale_factor_spatial=1,
            z_dim=channels,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        )

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


def shipped(weights: Path | str, model: str) -> dict[str, Tensor]:
    """A denoiser's weights, in fp32.

    Args:
        weights: a safetensors file.
        model: its name, and that of the folder under `studies` whose training makes them.

    Raises:
        TurboError: they or `diffusers` are not there.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise TurboError(f"the {model} model needs diffusers: pip install 'turbovlm[diffusers]'")
    if not Path(weights).is_file():
        raise TurboError(f"{weights}: there are no such weights; studies/{model}/train.py makes them")
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(weights).items()}
