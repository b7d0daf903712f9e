"""A language model that reads fewer visual tokens: its forward, and what `generate` does around it.

The prompt is shortened in one place, `read_forward`, just before the library's own forward runs: fewer placeholders, as
many features, and everything beside the tokens (mask, positions, token types) shortened alike, with the positions that
the full prompt gives them. So masks, caches, rotary positions and deepstack planes are the library's own work on a
shorter prompt. The user and `generate` keep the full prompt, and a two-dimensional mask is always the full prompt's;
the cache knows which columns it holds.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.patching import Patch
from turbovlm.vlm.cache import CachedPrompts, columns_in, prompts_in, remember_prompts
from turbovlm.vlm.images import choose_tokens, encode_images, find_placeholders
from turbovlm.vlm.prompt import ShortenedPrompt, shorten

if TYPE_CHECKING:
    from turbovlm.vlm.install import ReadFeature

TYPES = ("mm_token_type_ids", "token_type_ids")
"""Arguments with one number per token of the prompt. Models read the latter by its place in the cache."""


def read_forward(patch: Patch, *args: Any, **kwargs: Any) -> Any:
    """Run the part that puts visual features in place of placeholders, on a shorter prompt.

    Hidden states come back in the full prompt's length. Where placeholders and features do not agree, the library gets
    the prompt as it is, and reports it.
    """
    feature: ReadFeature = patch.feature  # type: ignore[assignment]
    model, inputs = patch.module, patch.arguments(args, kwargs)
    images = encode_images(model, inputs)
    if not images:
        return patch.original(**_follow_prompts(model, feature, inputs))
    placeholders = find_placeholders(model, inputs, images)
    if placeholders is None:
        return patch.original(**{**inputs, "mm_encoder_outputs": images})
    fewer, dropped, feature.last = choose_tokens(model, feature, images, placeholders)
    prompt, shorter = _shorten_inputs(model, feature, inputs, dropped)
    outputs = patch.original(**{**shorter, "mm_encoder_outputs": fewer, "return_dict": True})
    if outputs.past_key_values is not None:
        remember_prompts(outputs.past_key_values, prompt.cached())
    outputs.last_hidden_state = prompt.restore(outputs.last_hidden_state)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(prompt.restore(hidden) for hidden in outputs.hidden_states)
    return outputs.to_tuple() if inputs.get("return_dict") is False else outputs


def prepare_inputs(patch: Patch, *args: Any, **kwargs: Any) -> Any:
    """Run `prepare_inputs_for_generation`, which is to hand `read_forward` the full prompt, and its mask as it is.

    For static caches the library makes four-dimensional masks here: for a prompt with images it may not yet, for what
    follows it makes them of what the cache holds.
    """
    inputs = patch.arguments(args, kwargs)
    cache, first, new = (inputs.get(name) for name in ("past_key_values", "is_first_iteration", "next_sequence_length"))
    prompts = prompts_in(cache)
    if prompts is not None and first and new is not None:  # generate counts what is new by the length of the cache
        inputs["next_sequence_length"] = new = new - prompts.dropped
    if inputs.get("mm_encoder_outputs") and (first or not inputs.get("use_cache", True)):
        types = {name: inputs[name] for name in TYPES if inputs.get(name) is not None}
        beside = types if cache is None else {**types, "past_key_values": cache}
        return {**patch.original(**{**inputs, "past_key_values": None}), **beside}
    if cache is not None and prompts is not None and cache.is_compileable:
        inputs |= _held(inputs, prompts, cache, inputs["input_ids"].shape[1] if new is None else new)
    return patch.original(**inputs)


def prefill(patch: Patch, *args: Any, **kwargs: Any) -> Any:
    """Run `generate`'s prefill, which cannot cut a prompt into chunks whose images become shorter."""
    inputs = patch.arguments(args, kwargs)
    model_kwargs = inputs["model_kwargs"]
    shortened = model_kwargs.get("mm_encoder_outputs") or prompts_in(model_kwargs.get("past_key_values")) is not None
    if inputs["generation_config"].prefill_chunk_size is not None and shortened:
        raise StateError(
            "prefill_chunk_size: visual_keep shortens the prompt as a whole, and cannot in chunks: leave it out, as "
            "the prompt that is prefilled is shorter already"
        )
    return patch.original(**inputs)


def prepare_positions(patch: Patch, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
    """Run `_prepare_position_ids_for_generation`, which looks for new images behind as many tokens as the cache has."""
    prompts, types = prompts_in(model_kwargs.get("past_key_values")), model_kwargs.get("mm_token_type_ids")
    if prompts is not None and types is not None and not types[:, prompts.columns :].any():
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "mm_token_type_ids"}
    return patch.original(inputs_tensor, model_kwargs)


def _shorten_inputs(
    model: Any, feature: ReadFeature, inputs: dict[str, Any], dropped: Tensor
) -> tuple[ShortenedPrompt, dict[str, Any]]:
    """The prompt without the `dropped` columns, `[batch, N]`, and what the library's forward takes of it."""
    cache = inputs.get("past_key_values")
    mask = _full_mask(inputs, columns_in(cache) + dropped.shape[1], dropped)
    prompt = shorten(mask, dropped, prompts_in(cache))
    positions = inputs.get("position_ids")
    if positions is None:
        if prompt.earlier and hasattr(model, "compute_3d_position_ids"):
            raise StateError(
                "position_ids: give those of the new columns with an image behind a cache; the model cannot tell them"
            )
        positions = _full_positions(model, feature, inputs, mask)
    shorter = {**inputs, "attention_mask": prompt.mask.to(mask.dtype), "position_ids": prompt.positions(positions)}
    if inputs.get("input_ids") is not None:  # the filler is no placeholder
        special = [getattr(model.config, f"{modality}_token_id", None) for modality in ("image", "video")]
        shorter["input_ids"] = prompt.tokens(inputs["input_ids"], filler=int(0 in special))
    if inputs.get("inputs_embeds") is not None:
        shorter["inputs_embeds"] = prompt.embeddings(inputs["inputs_embeds"])
    if inputs.get("mm_token_type_ids") is not None:
        shorter["mm_token_type_ids"] = prompt.types(inputs["mm_token_type_ids"])
    if inputs.get("token_type_ids") is not None:
        shorter["token_type_ids"] = prompt.held_types(inputs["token_type_ids"])
    return prompt, shorter


def _follow_prompts(model: Any, feature: ReadFeature, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of text behind shortened prompts, with the full positions; as they are where there are none."""
    cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
    prompts = prompts_in(cache)
    if prompts is None or (mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2)):
        return inputs
    tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    if tokens is None:
        return inputs  # the library's own error follows
    new = tokens.shape[1]
    held = _held(inputs, prompts, cache, new)
    if inputs.get("position_ids") is None:
        mask = _full_mask(inputs, columns_in(cache) + new, prompts.seen)
        held["position_ids"] = _full_positions(model, feature, inputs, mask)[..., -new:]
    return {**inputs, **held}


def _held(inputs: dict[str, Any], prompts: CachedPrompts, cache: Any, new: int) -> dict[str, Any]:
    """Mask and token types of `new` columns behind shortened prompts, by their place in the cache."""
    mask = prompts.held_mask(_full_mask(inputs, columns_in(cache) + new, prompts.seen))
    types = inputs.get("token_type_ids")
    if types is None or types.shape[-1] <= new:  # of the new columns alone
        return {"attention_mask": mask}
    return {"attention_mask": mask, "token_type_ids": prompts.held_types(types)}


def _full_mask(inputs: dict[str, Any], columns: int, beside: Tensor) -> Tensor:
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


def _full_positions(model: Any, feature: ReadFeature, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """The positions that the library gives the full prompts, whose `mask` is `[batch, columns]`."""
    if hasattr(model, "compute_3d_position_ids"):
        names = inspect.signature(type(model).compute_3d_position_ids).parameters
        arguments = {name: inputs.get(name) for name in names if name != "self"}
        if arguments.get("inputs_embeds") is None:  # only its shape is read
            arguments["inputs_embeds"] = torch.empty(*inputs["input_ids"].shape, 0, device=mask.device)
        found: Tensor | None = model.compute_3d_position_ids(**{**arguments, "attention_mask": mask})
        if found is not None:
            return found
    return torch.arange(mask.shape[1], device=mask.device).unsqueeze(0) + feature.family.first_position
