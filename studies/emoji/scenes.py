"""Scenes: an emoji on white or on a photograph out of focus, and the prompt that names it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm_lab.zoo.emoji import PLACES

BLUR = 2.5
"""Standard deviation, in pixels, of how far out of focus the photographs are."""


@dataclass(frozen=True)
class Emoji:
    """The prepared images.

    Attributes:
        names: of the emoji.
        styles: words for the vendors.
        images: `[styles, names, 4, 64, 64]`, uint8, RGB and alpha.
        photos: `[crops, 3, 64, 64]`, uint8.
    """

    names: list[str]
    styles: list[str]
    images: Tensor
    photos: Tensor

    @property
    def prompts(self) -> list[str]:
        """All of them, in the order of `scenes`' index: by style, name and place."""
        return [f"{name}, {style}, {place}" for style in self.styles for name in self.names for place in PLACES]


def load_emoji(file: Path) -> Emoji:
    """What `prepare.py` has written, the photographs out of focus."""
    content = torch.load(file, weights_only=True)
    return Emoji(content["names"], content["styles"], content["pictures"], blurred(content["photos"]))


def blurred(photos: Tensor) -> Tensor:
    """`[crops, 3, 64, 64]`, uint8, out of focus."""
    from torchvision.transforms.v2.functional import gaussian_blur

    return gaussian_blur(photos, kernel_size=[2 * round(3 * BLUR) + 1] * 2, sigma=[BLUR] * 2)


def scenes(emoji: Emoji, index: Tensor, generator: torch.Generator) -> Tensor:
    """An image of each of the prompts that `index`, `[batch]`, points at: `[batch, 3, 64, 64]` in [−1, 1].

    The emoji is 70 to 100 % of the image's side, anywhere in it, half of the photographs mirrored.
    """
    style, rest = index // (len(emoji.names) * 2), index % (len(emoji.names) * 2)
    drawn = emoji.images[style, rest // 2].float() / 255
    chance = torch.rand(4, len(index), generator=generator)
    scale = 0.7 + 0.3 * chance[0]
    drawn = placed(drawn, scale, (2 * chance[1:3] - 1) * (1 - scale) / scale)
    behind = emoji.photos[torch.randint(len(emoji.photos), (len(index),), generator=generator)].float() / 255
    behind = torch.where((chance[3] < 0.5).view(-1, 1, 1, 1), behind, behind.flip(3))
    behind = torch.where((rest % 2 == 0).view(-1, 1, 1, 1), torch.ones(()), behind)
    return over(drawn, behind)


def placed(drawn: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Drawings made smaller and put elsewhere, their colours times alpha.

    Args:
        drawn: RGB and alpha in [0, 1], `[batch, 4, 64, 64]`.
        scale: shares of the image's side, `[batch]`.
        shift: to the left and upwards, in halves of the drawings' own side, `[2, batch]`.
    """
    affine = torch.zeros(len(drawn), 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = 1 / scale
    affine[:, :, 2] = shift.T
    drawn = torch.cat([drawn[:, :3] * drawn[:, 3:], drawn[:, 3:]], dim=1)
    return F.grid_sample(drawn, F.affine_grid(affine, list(drawn.shape), align_corners=False), align_corners=False)


def over(drawn: Tensor, behind: Tensor) -> Tensor:
    """What `placed` gives over backgrounds in [0, 1]: images in [−1, 1]."""
    return (drawn[:, :3] + (1 - drawn[:, 3:]) * behind).clamp(0, 1) * 2 - 1
