"""A prompt with fewer visual placeholders: positions kept, masks and everything beside the tokens shortened alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import StateError


@dataclass(frozen=True)
class Shortening:
    """Which columns of a batch of prompts are left.

    Rows lose different numbers of tokens, so the shorter ones begin with columns that nobody attends to.

    Attributes:
        index: for each column left, the one it was, `[batch, M]`, ascending but for the unattended ones in front.
        seen: whether it is a token, and not padding, `[batch, M]`, bool.
        columns: N, the number of columns before.
    """

    index: Tensor
    seen: Tensor
    columns: int

    def take(self, values: Tensor) -> Tensor:
        """`[batch, N]`, `[planes, batch, N]`, `[1, N]` or `[planes, 1, N]` to the same of M."""
        index = self.index.expand(*values.shape[:-2], *self.index.shape)
        return values.expand(*values.shape[:-2], *(len(self.index), values.shape[-1])).gather(-1, index)

    def take_vectors(self, values: Tensor) -> Tensor:
        """`[batch, N, width]` to `[batch, M, width]`."""
        return values.gather(1, self.index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    def restore(self, hidden: Tensor) -> Tensor:
        """`[batch, M, width]` to `[batch, N, width]`: a dropped column gets the last one before it that is left."""
        spare = torch.where(self.seen, self.index, self.columns)
        number = torch.arange(1, hidden.shape[1] + 1, device=hidden.device).expand_as(spare)
        at = spare.new_zeros(len(hidden), self.columns + 1).scatter(1, spare, number)[:, : self.columns]
        last = at.cummax(dim=1).values.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return F.pad(hidden, (0, 0, 1, 0)).gather(1, last)


def shorten(mask: Tensor, dropped: Tensor) -> Shortening:
    """Leave the dropped columns out, and padding as far as every row can spare it.

    Args:
        mask: 1 or True for tokens, 0 or False for padding, `[batch, N]`.
        dropped: the columns to leave out, `[batch, N]`, bool.
    """
    left = mask.bool() & ~dropped
    longest = int(left.sum(dim=1).max())
    order = left.to(torch.uint8).sort(dim=1, stable=True)
    return Shortening(order.indices[:, -longest:], order.values[:, -longest:].bool(), mask.shape[1])


def places(placeholders: Tensor, counts: list[int]) -> list[Tensor]:
    """Where each image's tokens stand, as indices into the flattened batch, `[tokens of the image]` each.

    Features fill placeholders in the order of the batch's rows, image after image.

    Args:
        placeholders: `[batch, N]`, bool.
        counts: tokens of each image; together as many as there are placeholders.
    """
    return list(torch.split(placeholders.flatten().nonzero().squeeze(1), counts))


@dataclass(frozen=True)
class Shortened:
    """What a cache of keys and values knows of the prompts behind it; it is an attribute of the cache.

    Attributes:
        columns: columns of the prompts as the user has them, all turns together.
        seen: whether each column that they take in the cache is a token, `[batch, columns in the cache]`, bool.
        after_images: how many columns follow the last one dropped.
    """

    columns: int
    seen: Tensor
    after_images: int

    def without_last(self, lost: int) -> Shortened:
        """When the cache's last `lost` columns have been taken out.

        Raises:
            StateError: they reach back to an image, of which the cache has fewer columns than the prompt.
        """
        if lost > self.after_images:
            raise StateError(
                f"{lost} columns were taken out of a cache that has {self.after_images} behind its last image, whose "
                "columns visual_keep has shortened: start again from the whole prompt"
            )
        return Shortened(self.columns - lost, self.seen[:, :-lost], self.after_images - lost)

    def mask(self, full: Tensor | None, after: int) -> Tensor:
        """The attention mask over the prompts in the cache and the `after` columns behind them, bool.

        Args:
            full: the user's, over all columns, `[batch, columns + after]`; all of them tokens if None.
        """
        if full is None:
            behind = self.seen.new_ones(len(self.seen), after)
        else:
            behind = full[:, self.columns : self.columns + after].to(self.seen)
        return torch.cat([self.seen, behind], dim=1)
