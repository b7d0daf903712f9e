"""A prompt with fewer visual placeholders: positions kept, masks and everything beside the tokens shortened alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.vlm.cache import CachedPrompts


@dataclass(frozen=True)
class ShortenedPrompt:
    """The new columns of a batch of prompts, without those that were dropped.

    Rows lose different numbers of tokens, so the shorter ones begin with columns that nobody attends to. Of N new
    columns, M are left; where a cache holds earlier turns, their columns stand in front of the new ones.

    Attributes:
        index: for each column left, the one it was, `[batch, M]`, ascending but for the unattended ones in front.
        seen: whether it is a token, and not padding, `[batch, M]`, bool.
        columns: N.
        earlier: columns of earlier turns, as the user has them.
        earlier_seen: whether each column that a cache holds of them is a token, `[batch, held]`, bool.
        after_images: how many of the new columns follow the last one that was dropped.
    """

    index: Tensor
    seen: Tensor
    columns: int
    earlier: int
    earlier_seen: Tensor
    after_images: int

    @property
    def mask(self) -> Tensor:
        """The attention mask over the cache and the columns left, `[batch, held + M]`, bool."""
        return torch.cat([self.earlier_seen, self.seen], dim=1)

    def take(self, values: Tensor) -> Tensor:
        """`[batch, N]`, `[planes, batch, N]`, `[1, N]` or `[planes, 1, N]` to the same of M."""
        index = self.index.expand(*values.shape[:-2], *self.index.shape)
        return values.expand(*values.shape[:-2], *(len(self.index), values.shape[-1])).gather(-1, index)

    def tokens(self, ids: Tensor, filler: int) -> Tensor:
        """The tokens left, `[batch, M]`, of `ids`, `[batch, N]`; `filler` in columns that nobody attends to."""
        return self.take(ids).masked_fill(~self.seen, filler)

    def embeddings(self, embeds: Tensor) -> Tensor:
        """`[batch, N, width]` to `[batch, M, width]`; zeros in columns that nobody attends to."""
        taken = embeds.gather(1, self.index.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        return taken * self.seen.unsqueeze(-1)

    def positions(self, positions: Tensor) -> Tensor:
        """Those of the columns left, of positions that end with the N new columns', `[..., 1 or batch, ≥ N]`."""
        return self.take(positions[..., -self.columns :])

    def types(self, types: Tensor) -> Tensor:
        """Token types of the columns left, `[batch, M]`.

        Args:
            types: of the new columns, or of all, `[batch, columns]`; those missing at the end are of text, as assisted
                decoding leaves out its candidates'.
        """
        new = types[..., self.earlier :] if types.shape[-1] > self.columns else types
        return self.take(F.pad(new, (0, self.columns - new.shape[-1])))

    def held_types(self, types: Tensor) -> Tensor:
        """The same by their place in the cache, `[batch, held + M]`, where all that it holds counts as text."""
        return F.pad(self.types(types), (self.earlier_seen.shape[1], 0))

    def restore(self, hidden: Tensor) -> Tensor:
        """`[batch, M, width]` to `[batch, N, width]`: a dropped column gets the last one before it that is left."""
        spare = torch.where(self.seen, self.index, self.columns)
        number = torch.arange(1, hidden.shape[1] + 1, device=hidden.device).expand_as(spare)
        at = spare.new_zeros(len(hidden), self.columns + 1).scatter(1, spare, number)[:, : self.columns]
        last = at.cummax(dim=1).values.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return F.pad(hidden, (0, 0, 1, 0)).gather(1, last)

    def cached(self) -> CachedPrompts:
        """What a cache holds once it has read the prompt."""
        return CachedPrompts(self.earlier + self.columns, self.mask, self.after_images)


def shorten(mask: Tensor, dropped: Tensor, prompts: CachedPrompts | None = None) -> ShortenedPrompt:
    """Leave the dropped columns out, and padding as far as every row can spare it.

    Args:
        mask: 1 or True for tokens, 0 or False for padding, `[batch, earlier + N]`: of the N new columns, and in front
            of those that a cache stands for, as the user has them.
        dropped: the new columns to leave out, `[batch, N]`, bool.
        prompts: what the cache knows of its prompts, if some were shortened.
    """
    columns = dropped.shape[1]
    earlier = mask.shape[1] - columns
    seen = mask[:, :earlier] if prompts is None else prompts.held_mask(mask[:, :earlier])
    left = mask[:, earlier:].bool() & ~dropped
    longest = int(left.sum(dim=1).max())
    order = left.to(torch.uint8).sort(dim=1, stable=True)
    after_images = columns - 1 - int(dropped.any(dim=0).nonzero().max()) if dropped.any() else columns
    return ShortenedPrompt(
        index=order.indices[:, -longest:],
        seen=order.values[:, -longest:].bool(),
        columns=columns,
        earlier=earlier,
        earlier_seen=seen.bool(),
        after_images=after_images,
    )
