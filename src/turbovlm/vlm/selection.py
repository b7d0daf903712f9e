"""What becomes of the visual tokens of images: which stay, and what the others are averaged into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """What becomes of the n visual tokens of each image of a group.

    Attributes:
        kept: positions of the k tokens that stay, ascending, `[images, k]`, int64.
        destination: the one of the k that each token is averaged into, `[images, n]`, int64.
        weights: the share of each token in its destination, `[images, n]`; 0 for a token that is dropped.
    """

    kept: Tensor
    destination: Tensor
    weights: Tensor

    def of_image(self, image: int) -> Selection:
        """What becomes of one image's tokens: a group of one."""
        one = slice(image, image + 1)
        return Selection(self.kept[one], self.destination[one], self.weights[one])

    def of_all(self, left: Tensor, standing: Tensor) -> Selection:
        """The same of all n tokens of one image, where this is of those at `left`, `[m]`, and the others are dropped.

        Args:
            standing: for each of the n the one of `left` that stands for it, into whose destination it counts as gone.
        """
        slots = torch.arange(len(left), device=left.device)
        slots = torch.zeros_like(standing).scatter(0, left, slots).index_select(0, standing)
        stays = torch.zeros_like(standing).index_fill(0, left, 1)
        return Selection(left[self.kept], self.destination[:, slots], self.weights[:, slots] * stays)

    def take(self, x: Tensor) -> Tensor:
        """`[images, n, width]` to `[images, k, width]`: averages where tokens are merged."""
        images, k, width = *self.kept.shape, x.shape[-1]
        index = self.destination.unsqueeze(-1).expand(-1, -1, width)
        precise = torch.promote_types(x.dtype, torch.float32)
        weighted = x.to(precise) * self.weights.unsqueeze(-1).to(precise)
        return weighted.new_zeros(images, k, width).scatter_add(1, index, weighted).to(x.dtype)


def keep_alone(kept: Tensor, tokens: int) -> Selection:
    """The tokens at `kept`, `[images, k]`, ascending, of `tokens`; the others are dropped."""
    images = len(kept)
    slots = torch.arange(kept.shape[1], device=kept.device).expand(images, -1)
    destination = torch.zeros(images, tokens, dtype=torch.int64, device=kept.device).scatter(1, kept, slots)
    weights = torch.zeros(images, tokens, device=kept.device).scatter(1, kept, 1.0)
    return Selection(kept, destination, weights)


def average_rest(kept: Tensor, destination: Tensor, sizes: Tensor | None) -> Selection:
    """The tokens at `kept`, `[images, k]`, ascending, and every other averaged into one of them by size.

    Args:
        destination: which of the k each token is most similar to, `[images, n]`; those kept stay their own.
        sizes: patches that each token stands for, `[images, n]`; ones if None.
    """
    slots = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    destination = destination.scatter(1, kept, slots)
    counted = torch.ones(destination.shape, device=kept.device) if sizes is None else sizes.float()
    sums = counted.new_zeros(kept.shape).scatter_add(1, destination, counted)
    return Selection(kept, destination, counted / sums.gather(1, destination).clamp(min=1e-12))
