"""A language model that reads fewer visual tokens: its forward, and what `generate` does around it.

The prompt is shortened in one place, `read_forward`, just before the library's own forward runs: fewer placeholders, as
many features, and everything beside the tokens (mask, positions, token types) shortened alike, with the positions that
the full prompt gives them. So masks, caches, rotary positions and deepstack planes are the library's own work on a
shorter prompt. The user and `generate` keep the full prompt, and a two-dimensional mask is always the full prompt's;
the cache knows which columns it holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.errors import StateError
from turbovlm.ops.tracing import is_exporting, is_exporting_to_onnx
from turbovlm.patching import Patch
from turbovlm.vlm.cache import remember_prompts
from turbovlm.vlm.families import PIXELS, VlmFamily, is_recurrent, placeholder_of
from turbovlm.vlm.images import choose_tokens
from turbovlm.vlm.marks import CACHED_PROMPTS, ENCODED
from turbovlm.vlm.prompt import TYPES, CachedPrompts, ShortenedPrompt, follow_prompts, shorten_inputs
from turbovlm.vlm.unread import check_text, drafting

if TYPE_CHECKING:
    from turbovlm.vlm.install import ReadFeature


def read_forward(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run the part that puts visual features in place of placeholders, on a shorter prompt.

    Hidden states come back in the full prompt's length. Where placeholders and features do not agree, the library gets
    the prompt as it is, and reports it.
    """
    feature: ReadFeature = patch.feature  # type: ignore[assignment]

    def positions(mask: Tensor) -> Tensor:
        return _full_positions(model, inputs, mask, feature.family.first_position)

    cache: Any = inputs.get("past_key_values")
    prompts = _prompts_in(cache)
    images = _encode(model, inputs)
    if not images:
        if not inputs.get("mm_encoder_outputs"):  # with pixels and these, the library's own error follows
            check_text(model, feature, inputs)
        return original(**follow_prompts(inputs, prompts, positions))
    if is_exporting_to_onnx() or (torch.compiler.is_compiling() and is_exporting()):
        raise StateError(
            "visual_keep cannot be exported: which columns of a prompt are left depends on its values; export the "
            "tower and the language model apart, or call handle.remove()"
        )
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        raise StateError("a prompt is missing: give input_ids or inputs_embeds")
    filler = _filler(feature.family, model)
    found = choose_tokens(model, feature, inputs, images)
    if found is None:
        original(**{**inputs, "mm_encoder_outputs": images})
        raise StateError(
            f"{feature.config.amount}: there are not as many placeholders as features, of which this model has read "
            "some all the same, as by a video_compression_mask: which belong to which cannot be told"
        )
    fewer, dropped, selections = found
    if prompts is None and not dropped.any():  # a prompt that stays as it is
        outputs = original(**{**inputs, "mm_encoder_outputs": fewer})
        feature.last = selections
        return outputs
    behind_a_cache = cache is not None and cache.get_seq_length() > 0
    if behind_a_cache and inputs.get("position_ids") is None and hasattr(model, "compute_3d_position_ids"):
        raise StateError(
            "position_ids: give those of the new columns with an image behind a cache; the model cannot tell them"
        )
    prompt, shorter = shorten_inputs(inputs, prompts, dropped, positions, filler)
    if behind_a_cache and is_recurrent(model) and not prompt.seen.all():
        raise StateError(
            "a batch of prompts with an image behind a cache, which lose different numbers of tokens or are padded: "
            "the recurrent layers of this model would read the columns between; give the prompts one by one"
        )
    arguments = {**shorter, "mm_encoder_outputs": fewer, "return_dict": True}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        outputs = _with_head(model, original, prompt, arguments)
    else:
        outputs = original(**arguments)
        outputs.last_hidden_state = prompt.restore(outputs.last_hidden_state)
    feature.last = selections
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(prompt.restore(hidden) for hidden in outputs.hidden_states)
    if outputs.past_key_values is not None:
        remember_prompts(outputs.past_key_values, prompt.cached())
    return outputs.to_tuple() if inputs.get("return_dict") is False else outputs


def _with_head(model: Any, original: Any, prompt: ShortenedPrompt, arguments: dict[str, Any]) -> Any:
    """Run a part that has a head itself, whose logits, and the loss of them, are to be of the full prompt's columns."""
    labels, keep = (arguments.pop(name, None) for name in ("labels", "logits_to_keep"))
    last = isinstance(keep, int) and keep == 1  # as generate asks: the last column left is read last
    outputs = original(**arguments, logits_to_keep=int(last))
    if not last:
        logits = prompt.restore(outputs.logits)
        outputs.logits = logits[:, -keep:] if isinstance(keep, int) else logits if keep is None else logits[:, keep]
    if labels is not None:
        size = model.config.get_text_config().vocab_size
        outputs.loss = model.loss_function(logits=outputs.logits, labels=labels, vocab_size=size)
    return outputs


def prepare_inputs(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run `prepare_inputs_for_generation`, which is to give `read_forward` the full prompt, and its mask as it is.

    For static caches the library makes four-dimensional masks here: for a prompt with images it may not yet, for what
    follows it makes them of what the cache holds.
    """
    cache: Any = inputs.get("past_key_values")
    prompts = _prompts_in(cache)
    first, new = inputs.get("is_first_iteration"), inputs.get("next_sequence_length")
    if prompts is not None and first and new is not None:  # generate counts what is new by the length of the cache
        inputs["next_sequence_length"] = new = new - prompts.dropped
    if inputs.get("mm_encoder_outputs") and (first or not inputs.get("use_cache", True)):
        beside = {name: inputs[name] for name in ("past_key_values", *TYPES) if inputs.get(name) is not None}
        return {**original(**{**inputs, "past_key_values": None}), **beside}
    if prompts is not None and cache.is_compileable:
        inputs = prompts.follow(inputs, inputs["input_ids"].shape[1] if new is None else new)
    return original(**inputs)


def prefill(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run `generate`'s prefill, which cannot cut a prompt into chunks whose images become shorter."""
    if inputs["generation_config"].prefill_chunk_size is not None:
        model_kwargs = inputs["model_kwargs"]
        if model_kwargs.get("mm_encoder_outputs") or _prompts_in(model_kwargs.get("past_key_values")) is not None:
            raise StateError(
                "prefill_chunk_size: visual_keep shortens the prompt as a whole, and cannot in chunks: leave it out, "
                "as the prompt that is prefilled is shorter already"
            )
    if inputs["generation_config"].is_assistant:
        with drafting(patch.feature.config.amount):
            return original(**inputs)
    return original(**inputs)


def prepare_positions(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run `_prepare_position_ids_for_generation`, which looks for new images behind as many tokens as the cache has."""
    known = inputs["model_kwargs"]
    prompts, types = _prompts_in(known.get("past_key_values")), known.get("mm_token_type_ids")
    if prompts is not None and types is not None and not types[:, prompts.columns :].any():
        inputs["model_kwargs"] = {name: value for name, value in known.items() if name != "mm_token_type_ids"}
    return original(**inputs)


def _prompts_in(cache: Any) -> CachedPrompts | None:
    """What a cache knows of its prompts; None where none of them was shortened."""
    prompts: CachedPrompts | None = getattr(cache, CACHED_PROMPTS, None)
    return prompts


def _encode(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The library's outputs for the images and videos of a call, by modality; its pixels are taken out."""
    given = inputs.get("mm_encoder_outputs")
    if given is not None and not isinstance(given, Mapping):  # Idefics 3 takes bare features, of which A is not known
        raise StateError(
            f"mm_encoder_outputs: a {type(given).__name__} found where visual_keep needs {{'image': outputs}}, as this "
            "model's own get_image_features returns them"
        )
    encoded: dict[str, Any] = {**(given or getattr(inputs.get("inputs_embeds"), ENCODED, {}))}
    pixels = {modality: name for modality, name in PIXELS.items() if inputs.get(name) is not None}
    if encoded and pixels:
        return {}  # the library's own error follows
    for modality in pixels:
        encoder = getattr(model, f"get_{modality}_features")
        names = [name for name in inspect.signature(encoder).parameters if inputs.get(name) is not None]
        encoded = {**encoded, modality: encoder(**{name: inputs[name] for name in names}, return_dict=True)}
    if pixels:
        inputs |= dict.fromkeys({*pixels.values(), "pixel_attention_mask"} & set(inputs))
    return encoded


def _filler(family: VlmFamily, model: Any) -> int:
    """A token that is no placeholder."""
    return int(0 in {placeholder_of(family, model, modality) for modality in PIXELS})


def _full_positions(model: Any, inputs: dict[str, Any], mask: Tensor, first: int) -> Tensor:
    """The positions that the library gives full prompts of that mask, `[batch, columns]`, from `first` on."""
    if hasattr(model, "compute_3d_position_ids"):
        names = inspect.signature(type(model).compute_3d_position_ids).parameters
        arguments = {name: inputs.get(name) for name in names if name != "self"}
        sound = inputs.get("feature_attention_mask")
        if "audio_feature_lengths" in names and sound is not None:  # as the forwards of Qwen's Omni models have it
            arguments["audio_feature_lengths"] = sound.sum(dim=1)
        if "inputs_embeds" in names and arguments["inputs_embeds"] is None:  # only its shape is read
            arguments["inputs_embeds"] = torch.empty(*inputs["input_ids"].shape, 0, device=mask.device)
        found: Tensor | None = model.compute_3d_position_ids(**{**arguments, "attention_mask": mask})
        if found is not None:
            return found
    return torch.arange(mask.shape[1], device=mask.device).unsqueeze(0) + first
