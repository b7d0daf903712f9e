"""A decoder that cross-attends to merged tokens, in proportion to their sizes: its part of an encoder's feature.

Behind the tower's last norm the tokens carry what was merged into them, `Merged`, as hidden states carry a `State`
between blocks. Cross-attention adds log s to its scores; an attention map, where one is asked for, is laid out over all
positions of the encoder's input, so that what is read off it, such as the time of a word, stays right.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.layout import Decoder, fetch, library_version
from turbovlm.encoder.parts import ancestors
from turbovlm.encoder.state import MERGED, STATE, State
from turbovlm.errors import StateError, UnsupportedModelError
from turbovlm.ops.attention import size_bias
from turbovlm.patching import Patch
from turbovlm.registry import class_paths

if TYPE_CHECKING:
    from turbovlm.encoder.feature import EncoderFeature

ADDS_BIAS = ("eager", "sdpa")
"""Attention of `transformers` that adds a mask of numbers to its scores."""
DENSE = "or apply with dense=True, which gives the decoder every position"


@dataclass(frozen=True)
class Merged:
    """What was merged into the tokens that an encoder hands on.

    Attributes:
        sizes: positions that each stands for, `[batch, M]`.
        source: for every position of the encoder's input, the token it is part of, `[batch, N]`.
    """

    sizes: Tensor
    source: Tensor

    def repeated(self, times: int) -> Merged:
        """The same of every input `times` times, as beams need it."""
        return Merged(self.sizes.repeat_interleave(times, dim=0), self.source.repeat_interleave(times, dim=0))

    def spread(self, attention: Tensor) -> Tensor:
        """An attention map over the tokens, `[batch, heads, words, M]`, over positions: `[batch, heads, words, N]`."""
        rows = attention / self.sizes.to(attention.dtype)[:, None, None]
        index = self.source[:, None, None].expand(*rows.shape[:-1], -1)
        return rows.gather(-1, index)


def owner_of(decoder: Decoder | None, modules: dict[str, nn.Module], tower: str) -> str | None:
    """Path of the module around a tower that holds its decoder; None where none does, or the layout has none."""
    if decoder is None:
        return None
    return next((name for name in ancestors(tower) if decoder.owner in class_paths(modules[name])), None)


def check_decoder(decoder: Decoder, owner: nn.Module) -> None:
    """See that a decoder can read merged tokens by their sizes.

    Raises:
        UnsupportedModelError: its cross-attention takes other arguments, or attends without a mask of numbers.
    """
    for attention in _attentions(decoder, owner):
        taken = inspect.signature(type(attention).forward).parameters
        if not {decoder.tokens, decoder.mask} <= set(taken):
            raise UnsupportedModelError(
                f"{type(attention).__name__} of {library_version(type(attention))} takes {', '.join(taken)}, and not "
                f"{decoder.tokens} and {decoder.mask}, by which it would read merged tokens by their sizes: apply with "
                "dense=True, which gives the decoder every position"
            )
        if reason := _no_bias(attention):
            raise UnsupportedModelError(reason)


def decoder_patches(feature: EncoderFeature, model: nn.Module) -> Iterator[Patch]:
    """What tokens go through on their way to a decoder, its cross-attention, and `generate` around both."""
    decoder, owner = feature.layout.decoder, feature.decoder_of
    if decoder is None or owner is None:
        return
    if not feature.config.dense:
        tower = model.get_submodule(feature.tower)
        yield Patch(fetch(tower, decoder.norm), "forward", norm_forward, feature)
        for attention in _attentions(decoder, model.get_submodule(owner)):
            yield Patch(attention, "forward", cross_forward, feature, by_name=True)
    for name in ancestors(owner):
        module = model.get_submodule(name)
        for method, function in GENERATION.items():
            if hasattr(type(module), method) and (function is encode or not feature.config.dense):
                yield Patch(module, method, function, feature, by_name=True)


def norm_forward(patch: Patch, norm: nn.Module, original: Any, /, hidden: Tensor) -> Tensor:
    """Run what stands behind the last block, and hand on what was merged."""
    out: Tensor = original(hidden)
    state: State | None = getattr(hidden, STATE, None)
    source = None if state is None else state.source()
    if state is not None and source is not None:
        assert state.sizes is not None
        setattr(out, MERGED, Merged(state.sizes, source))
    return out


def cross_forward(patch: Patch, attention: Any, original: Any, /, **inputs: Any) -> Any:
    """Run cross-attention in proportion to sizes; maps are laid out over all positions."""
    feature: EncoderFeature = patch.feature  # type: ignore[assignment]
    decoder = feature.layout.decoder
    assert decoder is not None
    tokens: Tensor | None = inputs.get(decoder.tokens)
    if tokens is None:
        return original(**inputs)
    merged: Merged | None = getattr(tokens, MERGED, None)
    if merged is None:
        if tokens.shape[1] != feature.native_tokens:
            raise StateError(
                f"the decoder got {tokens.shape[1]} of {feature.native_tokens} tokens without their sizes: something "
                "moved, cut, repeated or (reentrantly) checkpointed them on their way from the encoder; hand on the "
                f"encoder's own output, apply to the whole model that generates, {DENSE}"
            )
        return original(**inputs)
    if inputs.get(decoder.mask) is not None:
        raise StateError(f"{decoder.mask}: a mask of the encoder's tokens, which were merged; hand on none, {DENSE}")
    if reason := _no_bias(attention):
        raise StateError(reason)
    if feature.config.proportional:
        inputs[decoder.mask] = size_bias(merged.sizes, tokens.dtype)
    out = original(**inputs)
    return out if out[1] is None else (out[0], merged.spread(out[1]), *out[2:])


def generate(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run `generate` where all who read the encoder's tokens know what was merged.

    Raises:
        StateError: an assistant's decoder would read them, or tokens are given whose number would be taken for time.
    """
    outputs, assistant = inputs.get("encoder_outputs"), inputs.get("assistant_model")
    if outputs is not None and _merged_in(outputs) is not None:
        raise StateError(f"generate(encoder_outputs=…): its tokens were merged; give it the input itself, {DENSE}")
    if assistant is not None and not assistant.config.is_encoder_decoder:
        raise StateError(
            f"generate(assistant_model=…): {type(assistant).__name__} would read merged tokens without their sizes; "
            f"give it an assistant with an encoder of its own, {DENSE}"
        )
    return original(**inputs)


def encode(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run the encoder for `generate`, which for times of words asks it for attention maps that nobody reads."""
    config = inputs["generation_config"]
    if getattr(config, "return_token_timestamps", False):
        inputs["generation_config"] = copy.copy(config)
        inputs["generation_config"].output_attentions = False
    return original(**inputs)


def repeat(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run `_expand_inputs_for_generation`, which repeats tokens for beams, and repeat what was merged into them."""
    outputs = inputs.get("encoder_outputs")
    merged = None if outputs is None else _merged_in(outputs)
    ids, repeated = original(**inputs)
    if merged is not None:
        setattr(repeated["encoder_outputs"][0], MERGED, merged.repeated(inputs.get("expand_size", 1)))
    return ids, repeated


GENERATION = {
    "generate": generate,
    "_prepare_text_encoder_decoder_kwargs_for_generation": encode,
    "_prepare_encoder_decoder_kwargs_for_generation": encode,
    "_expand_inputs_for_generation": repeat,
}
"""Methods of `transformers`' models that generate, of any release."""


def _merged_in(outputs: Any) -> Merged | None:
    return getattr(outputs if isinstance(outputs, Tensor) else outputs[0], MERGED, None)


def _attentions(decoder: Decoder, owner: nn.Module) -> list[nn.Module]:
    return [fetch(layer, decoder.attention) for layer in fetch(owner, decoder.layers)]


def _no_bias(attention: Any) -> str | None:
    """Why a decoder's attention cannot add log s, or None."""
    found = getattr(attention.config, "_attn_implementation", None)
    if found in ADDS_BIAS:
        return None
    return (
        f"attn_implementation={found!r}: the decoder reads merged tokens by their sizes, which this attention cannot "
        f"add to its scores: load the model with one of {', '.join(map(repr, ADDS_BIAS))}, {DENSE}"
    )
