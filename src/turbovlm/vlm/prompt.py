"""Prompts that lose columns: those of one call, `ShortenedPrompt`, and those in a cache, `CachedPrompts`.

Two lengths are told apart throughout: `columns` are those of prompts as the user has them, `held` those of which a
cache has keys and values. Positions are kept; masks and token types are shortened with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import StateError

TYPES = ("mm_token_type_ids", "token_type_ids")
"""Arguments with one number per token of the prompt, which masks read by its place in the cache."""
Positions = Callable[[Tensor], Tensor]
"""`(mask) -> positions` that the library gives full prompts, `[..., 1 or batch, columns]`."""


@dataclass(frozen=True)
class CachedPrompts:
    """The prompts in a cache up to the last one with an image; the text that follows it is held column by column.

    Attributes:
        columns: columns of these prompts, all turns together.
        seen: whether each column held of them is a token and no padding, `[batch, held]`, bool.
        after_images: how many columns follow the last one that was dropped.
    """

    columns: int
    seen: Tensor
    after_images: int

    @property
    def dropped(self) -> int:
        """How many columns the cache does not hold."""
        return self.columns - self.seen.shape[1]

    def mask(self, full: Tensor) -> Tensor:
        """The attention mask over what the cache holds and the columns behind it.

        Args:
            full: over all columns, `[batch, columns + more]`, as the user has it.

        Returns:
            `[batch, held + more]`, of the same dtype.
        """
        return torch.cat([self.seen.to(full), full[:, self.columns :]], dim=1)

    def types(self, full: Tensor) -> Tensor:
        """Token types `[batch, columns + more]` by their place in the cache, whose own are text to all that follows."""
        return F.pad(full[..., self.columns :], (self.seen.shape[1], 0))

    def follow(self, inputs: dict[str, Any], new: int) -> dict[str, Any]:
        """The arguments of a call of `new` columns of text behind the prompts, mask and types by place in the cache."""
        columns = columns_in(inputs["past_key_values"], self) + new
        found = {"attention_mask": self.mask(full_mask(inputs, columns, self.seen))}
        for name in TYPES:
            types = inputs.get(name)
            if types is not None and types.shape[-1] > new:  # of all columns
                found[name] = self.types(types)
        return {**inputs, **found}

    def cropped(self, held: int) -> CachedPrompts:
        """The same when only the first `held` columns of the cache are left.

        Raises:
            StateError: they end before an image does, of which the cache has fewer columns than the prompt.
        """
        lost = self.seen.shape[1] - held
        if lost <= 0:
            return self
        if lost > self.after_images:
            raise StateError(
                f"{lost} columns were to be taken out of a cache that has {self.after_images} behind its last image, "
                "whose columns visual_keep has shortened: start again from the whole prompt"
            )
        return CachedPrompts(self.columns - lost, self.seen[:, :held], self.after_images - lost)


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

    def inputs(self, inputs: dict[str, Any], positions: Tensor, filler: int) -> dict[str, Any]:
        """The arguments of a call with the prompt as it was, for the prompt as it is.

        Args:
            inputs: by name.
            positions: of the full prompts, `[..., 1 or batch, ≥ N]`; the last N are the new columns'.
            filler: a token that is no placeholder, for columns that nobody attends to.
        """
        found = {"attention_mask": self.mask.long(), "position_ids": self.take(positions[..., -self.columns :])}
        if inputs.get("input_ids") is not None:
            found["input_ids"] = self.take(inputs["input_ids"]).masked_fill(~self.seen, filler)
        if inputs.get("inputs_embeds") is not None:
            found["inputs_embeds"] = self.take_embeddings(inputs["inputs_embeds"])
        if inputs.get("per_layer_inputs") is not None:  # of each layer of Gemma's language models, beside embeddings
            rows = torch.arange(len(self.index), device=self.index.device).unsqueeze(1)
            found["per_layer_inputs"] = inputs["per_layer_inputs"][rows, self.index]
        for name in TYPES:
            if inputs.get(name) is not None:
                found[name] = self.types(inputs[name])
        return {**inputs, **found}

    @property
    def mask(self) -> Tensor:
        """Whether what is attended to is a token, in the cache and behind it, `[batch, held + M]`, bool."""
        return torch.cat([self.earlier_seen, self.seen], dim=1)

    def types(self, types: Tensor) -> Tensor:
        """Token types by their place in the cache, whose own are text, and of the columns left, `[batch, held + M]`.

        Args:
            types: of the new columns, or of all, `[batch, columns]`; those missing at the end are of text, as assisted
                decoding leaves out its candidates'.
        """
        new = types[..., self.earlier :] if types.shape[-1] > self.columns else types
        left = self.take(F.pad(new, (0, self.columns - new.shape[-1])))
        return F.pad(left, (self.earlier_seen.shape[1], 0))

    def take(self, values: Tensor) -> Tensor:
        """`[batch, N]`, `[planes, batch, N]`, `[1, N]` or `[planes, 1, N]` to the same of M."""
        index = self.index.expand(*values.shape[:-2], *self.index.shape)
        return values.expand(*values.shape[:-2], *(len(self.index), values.shape[-1])).gather(-1, index)

    def take_embeddings(self, embeds: Tensor) -> Tensor:
        """`[batch, N, width]` to `[batch, M, width]`; zeros in columns that nobody attends to."""
        taken = embeds.gather(1, self.index.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        return taken * self.seen.unsqueeze(-1)

    def restore(self, hidden: Tensor) -> Tensor:
        """`[batch, M, width]` to `[batch, N, width]`: no column is empty, as readers may norm or average them.

        A dropped column, or one of padding, gets the last one before it that is left; in front of all of them, the
        first.
        """
        spare = torch.where(self.seen, self.index, self.columns)
        number = torch.arange(1, hidden.shape[1] + 1, device=hidden.device).expand_as(spare)
        at = spare.new_zeros(len(hidden), self.columns + 1).scatter(1, spare, number)[:, : self.columns]
        first = ((~self.seen).sum(dim=1, keepdim=True) + 1).clamp(max=hidden.shape[1])
        last = at.cummax(dim=1).values.maximum(first) - 1
        return hidden.gather(1, last.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def cached(self) -> CachedPrompts:
        """What a cache holds once the prompt has been read."""
        return CachedPrompts(self.earlier + self.columns, self.mask, self.after_images)


def shorten(mask: Tensor, dropped: Tensor, prompts: CachedPrompts | None = None) -> ShortenedPrompt:
    """Leave the dropped columns out, and padding as far as every row can spare it.

    Args:
        mask: 1 or True for tokens, 0 or False for padding, `[batch, earlier + N]`: of the N new columns, and in front
            of those that a cache stands for, as the user has them.
        dropped: the new columns to leave out, `[batch, N]`, bool.
        prompts: those in the cache, if some were shortened.
    """
    columns = dropped.shape[1]
    earlier = mask.shape[1] - columns
    earlier_seen = mask[:, :earlier] if prompts is None else prompts.mask(mask[:, :earlier])
    left = mask[:, earlier:].bool() & ~dropped
    longest = int(left.sum(dim=1).max())
    places = torch.arange(columns, device=left.device)
    index = torch.where(left, places + columns, places).argsort(dim=1)[
        :, -longest:
    ]  # what is left comes last, in order
    after_images = columns - 1 - int(dropped.any(dim=0).nonzero().max()) if dropped.any() else columns
    return ShortenedPrompt(
        index=index,
        seen=left.gather(1, index),
        columns=columns,
        earlier=earlier,
        earlier_seen=earlier_seen.bool(),
        after_images=after_images,
    )


def shorten_inputs(
    inputs: dict[str, Any], prompts: CachedPrompts | None, dropped: Tensor, positions: Positions, filler: int
) -> tuple[ShortenedPrompt, dict[str, Any]]:
    """The prompt of a call without the `dropped` columns, `[batch, N]`, and the call's arguments for it.

    `prompts` are those in its cache, if some were shortened.
    """
    mask = full_mask(inputs, columns_in(inputs.get("past_key_values"), prompts) + dropped.shape[1], dropped)
    prompt = shorten(mask, dropped, prompts)
    found: Tensor | None = inputs.get("position_ids")
    return prompt, prompt.inputs(inputs, positions(mask) if found is None else found, filler)


def follow_prompts(inputs: dict[str, Any], prompts: CachedPrompts | None, positions: Positions) -> dict[str, Any]:
    """The arguments of a call without images, with the mask of what the cache holds and the full positions.

    They stay as they are where no prompt in the cache was shortened, `prompts` is None, and with a mask of more than
    two dimensions, which is made of what the cache holds.
    """
    mask = inputs.get("attention_mask")
    if prompts is None or (mask is not None and getattr(mask, "ndim", 0) != 2):
        return inputs
    tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    if tokens is None:
        return inputs  # the library's own error follows
    new = tokens.shape[1]
    found = prompts.follow(inputs, new)
    if inputs.get("position_ids") is None:
        columns = columns_in(inputs["past_key_values"], prompts) + new
        found["position_ids"] = positions(full_mask(inputs, columns, prompts.seen))[..., -new:]
    return found


def full_mask(inputs: dict[str, Any], columns: int, beside: Tensor) -> Tensor:
    """The mask over the full prompts, `[batch, columns]`, of a batch and on a device like those of `beside`.

    Raises:
        StateError: it has another shape.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones(len(beside), columns, dtype=torch.long, device=beside.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != columns:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise StateError(
            f"attention_mask: {found} found where visual_keep needs one number per token of the full prompt, "
            f"(batch, {columns})"
        )
    return mask


def columns_in(cache: Any, prompts: CachedPrompts | None) -> int:
    """How many columns of the user's prompts a cache stands for, of which some may have been shortened, `prompts`."""
    if cache is None:
        return 0
    return int(cache.get_seq_length()) + (0 if prompts is None else prompts.dropped)


def placeholders(model: Any, inputs: dict[str, Any], token: int) -> Tensor:
    """Where a call's prompt has that token, or its embedding, `[batch, N]`, bool."""
    ids: Tensor | None = inputs.get("input_ids")
    if ids is not None:
        return ids == token
    embeds: Tensor = inputs["inputs_embeds"]
    equal: Tensor = embeds == model.get_input_embeddings()(torch.tensor(token, device=embeds.device))
    return equal.all(-1)
