"""The forward of a model whose language model reads fewer visual tokens, and `generate`'s way to it.

The prompt is shortened before the library's own forward runs: fewer placeholders, as many features, and everything
beside the tokens (mask, positions, token types) shortened alike, with the positions that the full prompt gives them.
So masks, caches, rotary positions and deepstack planes are the library's own work on a shorter prompt. `generate` keeps
the full prompt; what is in the cache is remembered on the cache itself, and masks are translated for it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.vlm.attention import SCORES, detach
from turbovlm.vlm.families import PIXELS
from turbovlm.vlm.plan import ReadingPlan, arguments_by_name
from turbovlm.vlm.prompt import Shortened, Shortening, places, shorten
from turbovlm.vlm.select import Selection, kept_count, needs_attention, select

BEHIND = "_turbovlm"
"""Attribute of a cache that says which prompts are behind it."""
READY = "_turbovlm_ready"
"""Attribute of the library's outputs whose features fit the prompt as it is."""
ROWS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")
"""Methods of a cache that change its rows."""
BESIDE = ("mm_token_type_ids", "token_type_ids")
"""Arguments with one number per token of the prompt."""


def reading_forward(model: Any, plan: ReadingPlan, *args: Any, **kwargs: Any) -> Any:
    """The forward of the part that puts visual features in place of placeholders."""
    method = type(model).forward
    inputs = arguments_by_name(method, model, args, kwargs)
    encoded = _encoded(model, inputs)
    if any(getattr(outputs, READY, False) for outputs in encoded.values()):
        return method(model, **inputs)
    cache = inputs.get("past_key_values")
    behind = _behind(cache)
    if not encoded:
        return method(model, **(inputs if behind is None else _continued(model, plan, inputs, cache, behind)))
    found = shorten_inputs(model, plan, inputs, encoded)
    if found is None:
        return method(model, **{**inputs, "mm_encoder_outputs": _given_back(encoded)})
    shorter, shortening, after = found
    as_tuple = inputs.get("return_dict") is False
    outputs = method(model, **{**shorter, "return_dict": True})
    if outputs.past_key_values is not None:
        _remember(outputs.past_key_values, after)
    outputs.last_hidden_state = shortening.restore(outputs.last_hidden_state)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(shortening.restore(hidden) for hidden in outputs.hidden_states)
    return outputs.to_tuple() if as_tuple else outputs


def preparing(owner: Any, plan: ReadingPlan, path: str, *args: Any, **kwargs: Any) -> Any:
    """`prepare_inputs_for_generation`, of the shorter prompt; `path` leads to the part that reads visual tokens."""
    method = type(owner).prepare_inputs_for_generation
    inputs = arguments_by_name(method, owner, args, kwargs)
    cache, step = inputs.get("past_key_values"), inputs.get("next_sequence_length")
    behind = _behind(cache)
    first, cached = inputs.get("is_first_iteration"), inputs.get("use_cache", True)
    if behind is not None and first and step is not None:
        inputs["next_sequence_length"] = step = step - (behind.columns - behind.seen.shape[1])
    encoded = inputs.get("mm_encoder_outputs") or {}
    if encoded and (first or not cached):
        # generate passes empty or full input_ids beside embeddings, which alone are read.
        read = inputs if inputs.get("inputs_embeds") is None or not first else {**inputs, "input_ids": None}
        found = shorten_inputs(owner.get_submodule(path), plan, read, encoded, new=step)
        if found is None:
            return method(owner, **{**inputs, "mm_encoder_outputs": _given_back(encoded)})
        shorter, _, after = found
        ids = inputs["input_ids"] if read is not inputs else shorter["input_ids"]
        prepared = method(owner, **{**shorter, "input_ids": ids, "next_sequence_length": None})
        if cache is not None:
            _remember(cache, after)
        return prepared
    if behind is not None:
        full = inputs.get("attention_mask")
        columns = full.shape[1] if full is not None else inputs["input_ids"].shape[1]
        inputs["attention_mask"] = behind.mask(full, columns - behind.columns).long()
        inputs = {**inputs, **_types_behind(inputs, behind)}
    return method(owner, **inputs)


def positioning(owner: Any, plan: ReadingPlan, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
    """`_prepare_position_ids_for_generation`, which looks for new images behind as many tokens as the cache holds."""
    behind, types = _behind(model_kwargs.get("past_key_values")), model_kwargs.get("mm_token_type_ids")
    if behind is not None and types is not None and not types[:, behind.columns :].any():
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "mm_token_type_ids"}
    return type(owner)._prepare_position_ids_for_generation(owner, inputs_tensor, model_kwargs)


def prefilling(owner: Any, plan: ReadingPlan, *args: Any, **kwargs: Any) -> Any:
    """`generate`'s prefill, which cannot cut a prompt into chunks whose images become shorter."""
    method = type(owner)._prefill
    inputs = arguments_by_name(method, owner, args, kwargs)
    model_kwargs = inputs["model_kwargs"]
    shortened = model_kwargs.get("mm_encoder_outputs") or _behind(model_kwargs.get("past_key_values")) is not None
    if inputs["generation_config"].prefill_chunk_size is not None and shortened:
        raise StateError(
            "prefill_chunk_size: visual_keep shortens the prompt as a whole, and cannot in chunks: leave it out, as "
            "the prompt that is prefilled is shorter already"
        )
    return method(owner, **inputs)


def _types_behind(inputs: dict[str, Any], behind: Shortened) -> dict[str, Any]:
    """Token types by their place in the cache, whose own are text to all that follows."""
    types = inputs.get("token_type_ids")
    if types is None or types.shape[-1] <= behind.columns:
        return {}
    return {"token_type_ids": F.pad(types[..., behind.columns :], (behind.seen.shape[1], 0))}


def shorten_inputs(
    model: Any, plan: ReadingPlan, inputs: dict[str, Any], encoded: dict[str, Any], new: int | None = None
) -> tuple[dict[str, Any], Shortening, Shortened] | None:
    """The inputs of a shorter prompt, how it was shortened, and what the cache will hold.

    Args:
        model: the part that puts visual features in place of placeholders.
        inputs: by name; `input_ids` or `inputs_embeds`, and what goes with them.
        encoded: the encoded images and videos, by modality.
        new: how many of the last columns are new, where a cache holds the others; None for all.

    Returns:
        None where placeholders and features do not agree, which the library itself reports.
    """
    whole, cache = _prompt(inputs), inputs.get("past_key_values")
    new = whole.shape[1] if new is None else new
    ids, embeds = (
        None if inputs.get(name) is None else inputs[name][:, -new:] for name in ("input_ids", "inputs_embeds")
    )
    batch, device = whole.shape[0], whole.device
    behind = _behind(cache)
    past = _columns_behind(cache, behind)
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, past + new, dtype=torch.long, device=device)
    _check_mask(mask, past + new)
    dropped = torch.zeros(batch, new, dtype=torch.bool, device=device)
    reduced, selections = {}, []
    for modality, outputs in encoded.items():
        token = getattr(model.config, f"{modality}_token_id")
        placeholders = _placeholders(model, ids, embeds, token)
        counts = [count for entry in outputs.pooler_output for count in _units(model, plan, len(entry))]
        if int(placeholders.sum()) != sum(counts):
            return None
        reduced[modality], chosen = reduce_features(model, plan, outputs)
        for where, selection in zip(places(placeholders, counts), chosen):
            gone = torch.ones_like(where, dtype=torch.bool).index_fill(0, selection.kept[0], False)
            dropped.view(-1)[where[gone]] = True
        selections += chosen
    plan.last = tuple(selections)
    shortening = shorten(mask[:, past:], dropped)
    seen = shortening.seen
    if past:
        earlier = mask[:, :past].bool() if behind is None else behind.mask(mask[:, :past], past - behind.columns)
        seen = torch.cat([earlier, seen], dim=1)
    positions = inputs.get("position_ids")
    if positions is None:
        if past and hasattr(model, "compute_3d_position_ids"):
            raise StateError(
                "position_ids: give those of the new columns with an image behind a cache; the model cannot tell them"
            )
        positions = _positions(model, plan, inputs, mask, past)
    shorter = {**inputs, "attention_mask": seen.to(mask.dtype), "mm_encoder_outputs": reduced}
    shorter["position_ids"] = shortening.take(positions[..., -new:])
    if ids is not None:
        filler = int(any(getattr(model.config, f"{modality}_token_id") == 0 for modality in encoded))
        shorter["input_ids"] = shortening.take(ids).masked_fill(~shortening.seen, filler)
    if embeds is not None:
        shorter["inputs_embeds"] = shortening.take_vectors(embeds) * shortening.seen.unsqueeze(-1)
    for name in BESIDE:
        types = inputs.get(name)
        if types is not None:
            types = types[..., past:] if types.shape[-1] > new else types
            # assisted decoding leaves its candidates, which are text, out of mm_token_type_ids
            shorter[name] = shortening.take(F.pad(types, (0, new - types.shape[-1])))
    if shorter.get("token_type_ids") is not None:
        shorter["token_type_ids"] = F.pad(shorter["token_type_ids"], (seen.shape[1] - shortening.seen.shape[1], 0))
    after_images = new - 1 - int(dropped.any(dim=0).nonzero().max()) if dropped.any() else new
    return shorter, shortening, Shortened(past + new, seen, after_images)


def reduce_features(model: Any, plan: ReadingPlan, outputs: Any) -> tuple[Any, list[Selection]]:
    """The library's outputs with the features that are left, and what became of each image's tokens."""
    planes, scores = detach(outputs)
    keep = plan.config.visual_keep
    assert keep is not None
    if scores is None and needs_attention(plan.config):
        raise StateError(
            "mm_encoder_outputs without the tower's attention: encode the images with this model's own "
            "get_image_features while it is accelerated, or let generate do it"
        )
    features = list(outputs.pooler_output)
    counts = [_units(model, plan, len(entry)) for entry in features]
    parts = [part for entry, sizes in zip(features, counts) for part in torch.split(entry, sizes)]
    values = None
    if scores is not None:
        values = [part for entry, sizes in zip(scores, counts) for part in torch.split(entry, sizes)]
    chosen: list[Any] = [None] * len(parts)
    for n in {len(part) for part in parts}:
        group = [i for i, part in enumerate(parts) if len(part) == n]
        semantic = None if values is None else torch.stack([values[i] for i in group])
        stacked = torch.stack([parts[i] for i in group]).detach()
        found = select(stacked, semantic, kept_count(keep, n), plan.config)
        for place, i in enumerate(group):
            one = slice(place, place + 1)
            chosen[i] = Selection(found.kept[one], found.destination[one], found.weights[one])

    def taken(entries: list[Tensor]) -> list[Tensor]:
        pieces = iter(chosen)
        return [
            torch.cat([next(pieces).take(part.unsqueeze(0))[0] for part in torch.split(entry, sizes)])
            for entry, sizes in zip(entries, counts)
        ]

    left = copy.copy(outputs)
    left.pooler_output = _like(outputs.pooler_output, taken(features))
    if planes:
        left.deepstack_features = [taken(list(plane)) for plane in planes]
    setattr(left, SCORES, None)
    setattr(left, READY, True)
    return left, chosen


def _like(entries: Any, left: list[Tensor]) -> Any:
    return torch.stack(left) if isinstance(entries, Tensor) else left


def _units(model: Any, plan: ReadingPlan, tokens: int) -> list[int]:
    """How many tokens each image of an entry has."""
    if plan.reader.per_image is None:
        return [tokens]
    one = plan.reader.per_image(model)
    return [one] * (tokens // one) if tokens % one == 0 else [tokens]


def _given_back(encoded: dict[str, Any]) -> dict[str, Any]:
    """The outputs as the library made them."""
    plain = {}
    for modality, outputs in encoded.items():
        plain[modality] = copy.copy(outputs)
        setattr(plain[modality], READY, True)
    return plain


def _remember(cache: Any, after: Shortened) -> None:
    """Put on the cache what is behind it, and have it follow the cache's rows."""
    setattr(cache, BEHIND, after)
    for name in ROWS:
        if hasattr(type(cache), name):
            setattr(cache, name, functools.partial(_following, cache, name))


def _following(cache: Any, name: str, rows: Tensor | int) -> None:
    getattr(type(cache), name)(cache, rows)
    behind: Shortened | None = getattr(cache, BEHIND, None)
    if behind is not None:
        seen = (
            behind.seen.repeat_interleave(rows, dim=0)
            if isinstance(rows, int)
            else behind.seen[rows.to(behind.seen.device)]
        )
        setattr(cache, BEHIND, replace(behind, seen=seen))


def _behind(cache: Any) -> Shortened | None:
    """What is behind a cache now; generation with an assistant takes tokens back out of it."""
    behind: Shortened | None = getattr(cache, BEHIND, None)
    if behind is None or torch.compiler.is_compiling():
        return behind
    held = int(cache.get_seq_length())
    if held == 0:  # reset, to be used again
        delattr(cache, BEHIND)
        return None
    if cache.is_compileable:
        return behind
    lost = behind.seen.shape[1] - held
    if lost > 0:
        behind = behind.without_last(lost)
        setattr(cache, BEHIND, behind)
    return behind


def _prompt(inputs: dict[str, Any]) -> Tensor:
    """The tokens, `[batch, columns]`, or their embeddings, `[batch, columns, width]`."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    prompt: Tensor | None = embeds if ids is None else ids
    if prompt is None:
        raise StateError("a prompt is missing: give input_ids or inputs_embeds")
    return prompt


def _encoded(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The encoded images and videos by modality; pixels among the inputs are encoded, and taken out."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    if encoded and any(inputs.get(pixels) is not None for pixels in PIXELS.values()):
        return {}  # the library's own error follows
    spent = set()
    for modality, pixels in PIXELS.items():
        if inputs.get(pixels) is None:
            continue
        encoder = getattr(model, f"get_{modality}_features")
        names = inspect.signature(getattr(type(model), f"get_{modality}_features")).parameters
        arguments = {name: inputs[name] for name in names if inputs.get(name) is not None and name != "kwargs"}
        encoded = {**encoded, modality: encoder(**arguments, return_dict=True)}
        spent |= {pixels, "pixel_attention_mask"}
    for name in spent & set(inputs):
        inputs[name] = None
    return encoded


def _placeholders(model: Any, ids: Tensor | None, embeds: Tensor | None, token: int) -> Tensor:
    if ids is not None:
        return ids == token
    assert embeds is not None
    found: Tensor = embeds == model.get_input_embeddings()(torch.tensor(token, device=embeds.device))
    return found.all(-1)


def _columns_behind(cache: Any, behind: Shortened | None) -> int:
    """Columns of the full prompts that a cache stands for."""
    length = 0 if cache is None else int(cache.get_seq_length())
    return length if behind is None else length + behind.columns - behind.seen.shape[1]


def _positions(model: Any, plan: ReadingPlan, inputs: dict[str, Any], mask: Tensor, past: int) -> Tensor:
    """The positions that the library gives the full prompt."""
    if hasattr(model, "compute_3d_position_ids"):
        names = inspect.signature(type(model).compute_3d_position_ids).parameters
        arguments = {name: inputs.get(name) for name in names if name != "self"}
        if arguments.get("inputs_embeds") is None:  # only its shape is read
            arguments["inputs_embeds"] = torch.empty(*inputs["input_ids"].shape, 0, device=mask.device)
        found: Tensor | None = model.compute_3d_position_ids(**{**arguments, "attention_mask": mask})
        if found is not None:
            return found
    positions = torch.arange(past, mask.shape[1], device=mask.device) + plan.reader.first_position
    return positions.unsqueeze(0)


def _continued(model: Any, plan: ReadingPlan, inputs: dict[str, Any], cache: Any, behind: Shortened) -> dict[str, Any]:
    """The inputs of text behind shortened prompts, with the mask of what the cache holds and the full positions."""
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        return inputs
    new = _prompt(inputs).shape[1]
    past = _columns_behind(cache, behind)
    held = int(cache.get_seq_length()) + new
    if mask is not None and mask.shape[1] == held and inputs.get("position_ids") is not None:
        return inputs
    if mask is None:
        mask = torch.ones(len(behind.seen), past + new, dtype=torch.long, device=behind.seen.device)
    _check_mask(mask, past + new)
    positions = inputs.get("position_ids")
    if positions is None:
        positions = _positions(model, plan, inputs, mask, past)[..., -new:]
    translated = behind.mask(mask, past + new - behind.columns).to(mask.dtype)
    beside = _types_behind(inputs, behind)
    return {**inputs, **beside, "attention_mask": translated, "position_ids": positions}


def _check_mask(mask: Any, columns: int) -> None:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != columns:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise StateError(
            f"attention_mask: {found} found where visual_keep needs one number per token of the full prompt, "
            f"(batch, {columns})"
        )
