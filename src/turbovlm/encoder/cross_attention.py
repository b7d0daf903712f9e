"""Cross-attention to an encoder's tokens: merged ones count by size.

What an encoder hands on carries what was merged into it, `Merged`, as hidden states carry a `State` between blocks.
Cross-attention adds log s to its scores; an attention map, where one is asked for, is laid out over all positions of
the encoder's input, so that what is read off it, such as the time of a word, stays right.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.layout import library_version, path_of
from turbovlm.encoder.parts import ancestors, within
from turbovlm.encoder.state import MERGED, State
from turbovlm.errors import StateError, UnsupportedModelError
from turbovlm.ops.plain import log_sizes
from turbovlm.ops.tracing import is_exporting, is_transformed
from turbovlm.patching import Feature, Patch, check_forwards
from turbovlm.registry import class_paths, family_of

if TYPE_CHECKING:
    from turbovlm.encoder.layout import Layout

ADDS_BIAS = ("eager", "sdpa")
"""Attention of `transformers` that adds a mask of numbers to its scores."""
CALLED = ("crossattention", "encoder_attn")
"""What `transformers` calls the cross-attention of a layer."""
TOKENS = ("encoder_hidden_states", "key_value_states")
MASKS = ("encoder_attention_mask", "attention_mask")
"""Arguments of its forward: an encoder's tokens, and what is added to its scores; the first that it has is used."""
DENSE = "or apply with dense=True, which hands on every position"


@dataclass(frozen=True)
class Merged:
    """What was merged into the tokens that an encoder hands on.

    Attributes:
        sizes: positions that each stands for, `[batch, M]`; None where nothing was merged.
        source: for every position of the encoder's input, the token it is part of, `[batch, N]`; None where that is
            not known.
        logs: log s, `[batch, M]`, where they count by size.
    """

    sizes: Tensor | None = None
    source: Tensor | None = None
    logs: Tensor | None = None

    @classmethod
    def of(cls, sizes: Tensor | None, source: Tensor | None, proportional: bool) -> Merged:
        """With the logarithms of the sizes, once for all layers, where tokens count in proportion to them."""
        return cls(sizes, source, log_sizes(sizes) if proportional and sizes is not None else None)

    def of_rows(self, index: Any) -> Merged:
        """That of the rows `index` of the batch."""
        sizes, source, logs = (None if x is None else x[index] for x in (self.sizes, self.source, self.logs))
        return Merged(sizes, source, logs)

    def spread(self, attention: Tensor) -> Tensor:
        """An attention map over the tokens, `[batch, heads, words, M]`, over positions: `[batch, heads, words, N]`."""
        if self.source is None or self.sizes is None:
            return attention
        rows = attention / self.sizes.to(attention.dtype)[:, None, None]
        index = self.source[:, None, None].expand(*rows.shape[:-1], -1)
        return rows.gather(-1, index)


@dataclass(frozen=True)
class Attention:
    """One layer's cross-attention.

    Attributes:
        path: in the model.
        arguments: names of what its forward takes.
        tokens, mask: those of the encoder's tokens, and of what is added to its scores.
        native: tokens of an input of native size, which are taken as they are.
        timed: whether places of tokens are taken for times.
    """

    path: str
    arguments: tuple[str, ...]
    tokens: str
    mask: str
    native: int
    timed: bool


@dataclass(frozen=True)
class CrossAttention:
    """What cross-attends to an encoder's tokens in one model.

    Attributes:
        text_model: path of the text model, or what else has queries of its own.
        between: paths of the modules that each token goes through on its way there.
        attentions: its cross-attention, layer by layer.
        timed: whether places of tokens are taken for times.
        restored: whether every position is handed on, so that there are no sizes to read.
    """

    text_model: str
    between: tuple[str, ...]
    attentions: tuple[Attention, ...]
    timed: bool
    restored: bool = False


def find_cross_attention(
    tower: str, modules: Mapping[str, nn.Module], native: int, layout: Layout | None = None
) -> CrossAttention | None:
    """What cross-attends to the tokens of the encoder at the path `tower`, as its layout or the family around it knows.

    Args:
        modules: the model's, by path.
        native: tokens of an input of native size.
        layout: the encoder's; None where only families of vision-language models are asked.
    """
    for name in ancestors(tower):
        if layout is not None and layout.decoder is not None:
            owner, path = layout.decoder
            if owner in class_paths(modules[name]):
                text_model, timed = _join(name, path), layout.line
                return CrossAttention(text_model, (), _attentions(text_model, modules, native, timed), timed)
        family = family_of("vlm", modules[name])
        if family is None or family.cross_attends is None or not within(tower, _join(name, family.tower)):
            continue
        text_model = _join(name, path_of(family.family, modules[name], family.cross_attends))
        between = tuple(path for each in family.between if (path := _join(name, each)) in modules)
        return CrossAttention(text_model, between, _attentions(text_model, modules, native, False), False)
    return None


def check_cross_attention(found: CrossAttention, model: nn.Module, proportional: bool) -> None:
    """See that what cross-attends can read merged tokens by their sizes.

    Raises:
        TurboError: another library has replaced a forward that is to be patched.
        UnsupportedModelError: nothing in it is known to cross-attend, or it attends without a mask of numbers.
    """
    modules = [(each.path, model.get_submodule(each.path)) for each in found.attentions]
    check_forwards(modules, one_device=False)
    remedies = _remedies(found.timed)
    if not (proportional or found.timed):
        return
    if not modules:
        kind = type(model.get_submodule(found.text_model))
        raise UnsupportedModelError(
            f"{found.text_model} ({kind.__name__} of {library_version(kind)}): no cross-attention is found in it that "
            f"would read merged tokens by their sizes: {remedies.removeprefix('or ')}"
        )
    for _, attention in modules:
        if reason := _no_bias(attention, remedies):
            raise UnsupportedModelError(reason)


def cross_patches(model: nn.Module, features: list[Feature]) -> list[Patch]:
    """What tokens go through on their way to what cross-attends to them, its attention, and `generate` around it.

    Several features may merge the same tokens; cross-attention reads their sizes once.
    """
    found: dict[str, tuple[CrossAttention, Feature]] = {}
    for feature in features:
        if (each := getattr(feature, "cross_attention", None)) is not None:
            found[each.text_model] = each, feature
    return [patch for each, feature in found.values() for patch in _patches(each, feature, model)]


def _patches(found: CrossAttention, feature: Feature, model: nn.Module) -> Iterator[Patch]:
    if not found.restored:
        for path in found.between:
            yield Patch(model.get_submodule(path), "forward", between_forward, feature)
        for each in found.attentions:
            yield Patch(model.get_submodule(each.path), "forward", cross_forward, feature, each)
    for name in ancestors(found.text_model):
        module = model.get_submodule(name)
        for method, function in GENERATION.items():
            if hasattr(type(module), method) and (found.timed if function is encode else not found.restored):
                yield Patch(module, method, function, feature, found.timed, by_name=True)


def attach(tokens: Tensor, merged: Merged) -> Tensor:
    """The same tokens, which carry what was merged into them, and so does what shares their memory.

    A checkpoint runs its blocks again on tensors that were detached, which keep nothing else of what they were.
    """
    setattr(tokens, MERGED, merged)
    if _has_memory(tokens):
        setattr(tokens.untyped_storage(), MERGED, (tokens.shape, tokens.storage_offset(), merged))
    return tokens


def merged_into(tokens: Tensor) -> Merged | None:
    """What was merged into an encoder's tokens; None where they do not say."""
    found: Merged | None = getattr(tokens, MERGED, None)
    if found is None and _has_memory(tokens):
        shape, offset, merged = getattr(tokens.untyped_storage(), MERGED, (None, None, None))
        found = merged if (shape, offset) == (tokens.shape, tokens.storage_offset()) else None
    return found


def _has_memory(tokens: Tensor) -> bool:
    """Whether a tensor's memory is its own, and no program is made of what is done with it."""
    if torch.compiler.is_compiling() or is_exporting() or is_transformed(tokens):
        return False
    return type(tokens) in (Tensor, nn.Parameter)


def rows(tokens: Tensor, index: Any) -> Tensor:
    """Rows of a batch of an encoder's tokens, which carry what was merged into them.

    Args:
        tokens: what an encoder hands on, `[batch, M, width]`.
        index: whatever indexes the batch: a slice, or a tensor of row numbers.
    """
    taken, merged = tokens[index], merged_into(tokens)
    return taken if merged is None else attach(taken, merged.of_rows(index))


def hand_on(out: Any, state: State | None, proportional: bool) -> Any:
    """What an encoder returns, whose tokens carry what its blocks have merged into them."""
    tokens = out if isinstance(out, Tensor) else out[0]
    if state is None or (not is_exporting() and tokens.shape[1] != state.lengths[-1]):
        return out
    attach(tokens, Merged.of(state.sizes if state.merges else None, state.source(), proportional))
    return out


def between_forward(patch: Patch, module: nn.Module, original: Any, /, tokens: Tensor) -> Tensor:
    """Run what each token goes through by itself, and hand on what was merged into it."""
    out: Tensor = original(tokens)
    merged = merged_into(tokens)
    return out if merged is None else attach(out, merged)


def cross_forward(patch: Patch, attention: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run cross-attention in proportion to sizes; maps are laid out over all positions.

    Raises:
        StateError: merged tokens that do not say what was merged into them, or a mask of other tokens.
    """
    spelling: Attention = patch.detail
    inputs = {**dict(zip(spelling.arguments, args)), **kwargs}
    tokens: Tensor | None = inputs.get(spelling.tokens)
    if tokens is None:
        return original(**inputs)
    merged = merged_into(tokens)
    if merged is None:
        check_whole(tokens, spelling, patch.feature.config.proportional)
        return original(**inputs)
    if merged.logs is not None:
        if reason := _no_bias(attention, _remedies(spelling.timed)):
            raise StateError(reason)
        inputs[spelling.mask] = _with_sizes(merged.logs, inputs[spelling.arguments[0]], inputs.get(spelling.mask))
    out = original(**inputs)
    return out if out[1] is None else (out[0], merged.spread(out[1]), *out[2:])


def check_whole(tokens: Tensor, spelling: Attention, proportional: bool) -> None:
    """See that tokens that say nothing of what was merged into them are all of an input of native size.

    Raises:
        StateError: they are not, and sizes would count.
    """
    if tokens.shape[1] != spelling.native and (spelling.timed or proportional):
        raise StateError(
            f"{spelling.path} got {tokens.shape[1]} of {spelling.native} tokens without their sizes: something moved, "
            "cut or repeated them on their way from the encoder; hand on the encoder's own output, or rows of it by "
            "turbovlm.encoder.rows, apply to the whole model that generates, "
            f"{_remedies(spelling.timed)}"
        )


def _with_sizes(logs: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to the scores of `words`, `[batch, words, width]`: `[batch, 1, words, M]`.

    Raises:
        StateError: there is a mask, of another number of tokens.
    """
    bias = logs.to(words.dtype)[:, None, None].expand(-1, -1, words.shape[1], -1)
    if mask is None:
        return bias
    if mask.shape[-1] != bias.shape[-1]:
        raise StateError(
            f"a mask of {mask.shape[-1]} tokens of the encoder, which were merged into {bias.shape[-1]}: hand on no "
            f"mask, {DENSE}"
        )
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def generate(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run `generate` where all who read the encoder's tokens know what was merged.

    Raises:
        StateError: an assistant's decoder would read them, or tokens are given whose number would be taken for time.
    """
    outputs, assistant = inputs.get("encoder_outputs"), inputs.get("assistant_model")
    if patch.detail and outputs is not None and merged_into(_tokens(outputs)) is not None:
        raise StateError(f"generate(encoder_outputs=…): its tokens were merged; give it the input itself, {DENSE}")
    if assistant is not None and not assistant.config.is_encoder_decoder:
        raise StateError(
            f"generate(assistant_model=…): {type(assistant).__name__} would read merged tokens without their sizes; "
            f"give it an assistant with an encoder of its own, {DENSE}"
        )
    return original(**inputs)


def repeat(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run `_expand_inputs_for_generation`, which repeats tokens for beams, and repeat what was merged into them."""
    given = {name: _tokens(inputs[name]) for name in HANDED_ON if inputs.get(name) is not None}
    carried = {name: merged for name, tokens in given.items() if (merged := merged_into(tokens)) is not None}
    ids, repeated = original(**inputs)
    times = inputs.get("expand_size", 1)
    for name, merged in carried.items() if times > 1 else ():
        tokens = _tokens(repeated[name])
        index = torch.arange(len(tokens) // times, device=tokens.device).repeat_interleave(times)
        attach(tokens, merged.of_rows(index))
    return ids, repeated


def encode(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run the encoder for `generate`, which for times of words asks it for attention maps that nobody reads."""
    config = inputs["generation_config"]
    if getattr(config, "return_token_timestamps", False):
        inputs["generation_config"] = copy.copy(config)
        inputs["generation_config"].output_attentions = False
    return original(**inputs)


HANDED_ON = ("encoder_outputs", "encoder_hidden_states")
"""Arguments of `generate` that carry an encoder's tokens."""
GENERATION = {
    "generate": generate,
    "_prepare_text_encoder_decoder_kwargs_for_generation": encode,
    "_prepare_encoder_decoder_kwargs_for_generation": encode,
    "_expand_inputs_for_generation": repeat,
}
"""Methods of `transformers`' models that generate, of any release."""


def _tokens(outputs: Any) -> Tensor:
    tokens: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return tokens


def _attentions(text_model: str, modules: Mapping[str, nn.Module], native: int, timed: bool) -> tuple[Attention, ...]:
    """The innermost modules of a layer's cross-attention that take an encoder's tokens and a mask."""
    found: dict[str, Attention] = {}
    for path, module in modules.items():
        if not path.startswith(f"{text_model}.") or not set(path[len(text_model) :].split(".")) & {*CALLED}:
            continue
        arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
        tokens, mask = (next((name for name in names if name in arguments), None) for names in (TOKENS, MASKS))
        if tokens is not None and mask is not None:
            found = {p: each for p, each in found.items() if not path.startswith(f"{p}.")}
            found[path] = Attention(path, arguments, tokens, mask, native, timed)
    return tuple(found.values())


def _no_bias(attention: Any, remedies: str) -> str | None:
    """Why an attention cannot add log s, or None."""
    config = getattr(attention, "config", None)
    found = None if config is None else getattr(config, "_attn_implementation", None)
    if config is None or found in ADDS_BIAS:  # without a config it attends in one way alone, and adds its mask
        return None
    return (
        f"attn_implementation={found!r}: merged tokens are read by their sizes, which this attention cannot add to its "
        f"scores: load the model with one of {', '.join(map(repr, ADDS_BIAS))}, {remedies}"
    )


def _remedies(timed: bool) -> str:
    """What to do instead; where places are times, every position is needed."""
    return DENSE if timed else f"{DENSE}, or with proportional=False, which counts all tokens alike"


def _join(*paths: str) -> str:
    return ".".join(filter(None, paths))
