"""Prompts that have images and came without them, so that nothing can be shortened: refused, or warned of."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.ops.tracing import is_readable
from turbovlm.vlm.families import PIXELS, placeholder_name, placeholder_of
from turbovlm.vlm.prompt import placeholders

if TYPE_CHECKING:
    from turbovlm.vlm.install import ReadFeature

CHUNK = 1 << 14
"""Tokens whose embeddings are made together, in search of those of a prompt."""
WAYS = (
    "give pixel_values, or the outputs of this model's own get_image_features as mm_encoder_outputs={'image': ...}, "
    "beside the prompt with its placeholders; handle.remove() gives the model back"
)


class _Drafting(threading.local):
    """Whether `generate` prefills an assistant in this thread, whose prompts `transformers` gives no images."""

    now = False


_DRAFTING = _Drafting()


@contextmanager
def drafting(amount: str) -> Iterator[None]:
    """Let an assistant read placeholders without images, and warn that it does."""
    warnings.warn(
        f"{amount} of an assistant has no effect: transformers gives assistants the prompt without its images",
        stacklevel=2,
    )
    _DRAFTING.now = True
    try:
        yield
    finally:
        _DRAFTING.now = False


def check_text(model: Any, feature: ReadFeature, inputs: dict[str, Any]) -> None:
    """See that a prompt without images has none: a prompt at the beginning of a cache, or without one.

    What follows a cache may hold placeholders that nobody reads as such, as an assistant's candidates do.

    Raises:
        StateError: it has placeholders, or token types or sizes of images.
    """
    ids, embeds, cache = inputs.get("input_ids"), inputs.get("inputs_embeds"), inputs.get("past_key_values")
    prompt = embeds if ids is None else ids
    if prompt is None or prompt.shape[1] == 1 or not is_readable(prompt) or _DRAFTING.now:
        return
    if cache is not None and int(cache.get_seq_length()) > 0:
        return
    amount = feature.config.amount
    for modality in PIXELS:
        token = placeholder_of(feature.family, model, modality)
        if token is not None and (found := int(placeholders(model, inputs, token).sum())):
            name = placeholder_name(feature.family, modality)
            raise StateError(
                f"{amount}: a prompt has {found} placeholders of {modality}s ({name}={token}) and comes without them, "
                f"so that none would be left out: {WAYS}"
            )
    if ids is not None:
        return
    assert embeds is not None
    types = inputs.get("mm_token_type_ids")
    sizes = [name for name in inputs if name.endswith("_grid_thw") and inputs[name] is not None]
    if sizes or (types is not None and bool(types.any())):
        named = sizes[0] if sizes else "mm_token_type_ids"
        raise StateError(
            f"{amount}: inputs_embeds come with {named} and without images, so they hold visual tokens already, of "
            f"which none would be left out: {WAYS}"
        )
    if not _is_text(model, embeds, inputs.get("attention_mask")):
        warnings.warn(
            f"{amount}: inputs_embeds hold what is no token's embedding. If it is visual tokens, they are all read: "
            f"turbovlm leaves some out of prompts that it puts them into itself: {WAYS}",
            stacklevel=2,
        )


@torch.no_grad()
def _is_text(model: Any, embeds: Tensor, mask: Tensor | None) -> bool:
    """Whether every column of a prompt `[batch, N, width]` that is no padding is some token's embedding."""
    wanted = _keys(embeds[mask.bool()] if mask is not None and mask.shape == embeds.shape[:2] else embeds.flatten(0, 1))
    embedding = model.get_input_embeddings()
    found = torch.zeros_like(wanted, dtype=torch.bool)
    for first in range(0, model.config.get_text_config().vocab_size, CHUNK):
        last = min(first + CHUNK, model.config.get_text_config().vocab_size)
        found |= torch.isin(wanted, _keys(embedding(torch.arange(first, last, device=embeds.device)).to(embeds)))
    return bool(found.all())


def _keys(rows: Tensor) -> Tensor:
    """Integers that are equal where rows `[n, width]` are: the bits of their first numbers, `[n]`."""
    numbers = 8 // rows.element_size()
    return rows[:, :numbers].contiguous().view(torch.int64).squeeze(1)
