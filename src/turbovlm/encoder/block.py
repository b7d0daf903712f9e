"""The accelerated block: attention, merge, MLP, through the block's own modules.

The data's way: the library's loop calls `block_forward`; the state comes with the hidden tokens, and leaves with them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.encoder.attention import Heads, apply_steps, first_half, guide_of, normalised, sizes_from_mask
from turbovlm.encoder.cells import merge_cells
from turbovlm.encoder.entrance import enter
from turbovlm.encoder.layout import Layout, Parts
from turbovlm.encoder.passed import has_hooks
from turbovlm.encoder.reading import asked_of
from turbovlm.encoder.schedule import clamp
from turbovlm.encoder.state import PREFIX, STATE, State, traced
from turbovlm.errors import StateError
from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.merging import Merge, merge_ranked, rank_candidates
from turbovlm.ops.partition import Split, positions
from turbovlm.ops.plain import over_heads
from turbovlm.ops.segments import segments_of, shortened
from turbovlm.ops.tracing import is_exporting, is_exporting_to_onnx, is_transformed
from turbovlm.ops.whole import Guide, Rules, merge_whole
from turbovlm.patching import Patch

if TYPE_CHECKING:
    from turbovlm.encoder.feature import EncoderFeature

OF_NO_EFFECT = ("num_items_in_batch",)
"""Tensors that `transformers` passes to every block on its way to the loss."""


def block_forward(
    patch: Patch, block: nn.Module, original: Any, /, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor | tuple[Tensor | None, ...]:
    """Run one block of an encoder, with a merge between its halves.

    A block that has nothing to merge, on tokens that were never merged, runs its own forward where it can.
    """
    feature: EncoderFeature = patch.feature  # type: ignore[assignment]
    index, config, layout = patch.detail, feature.config, feature.layout
    arguments = {**dict(zip(layout.arguments, args)), **kwargs}
    state = _begin(feature, hidden) if index == 0 else _resume(feature, index, block, hidden)
    call = asked_of(feature, hidden) if index == 0 else None
    if call is not None and call.standing is not None:
        hidden, state = enter(feature, state, hidden, call.standing)
    if state.tokens is not None:  # what was handed on is restored; the merged tokens came with it
        hidden = state.tokens
    if layout.packed:
        state = _in_segments(feature, index, state, arguments)
        r = sum(state.spare)
    else:
        asked = state.amounts[index] if config.thresholds is None else hidden.shape[1]
        r = clamp(asked, hidden.shape[1], state.prefix + state.suffix, config.min_tokens, feature.shape.unit)
    untouched = r == 0 and len(state.merges) == 0 and not config.trace  # Dynamo knows no `not` of a tuple
    if untouched and not is_exporting_to_onnx():  # to which torch's fused attention, open_clip's own, cannot go
        out = original(hidden, *args, **kwargs)
        return _hand_on(feature, block, state, out[0] if layout.returns_tuple else out)
    _check_arguments(feature, index, state, arguments)
    parts, through = feature.lookups.of(layout, feature.names[index], index, block, feature.passed)
    if state.sizes is None and layout.mask is not None:
        sizes = sizes_from_mask(arguments.get(layout.mask), hidden)
        state = state.changed(sizes=sizes, padded=sizes is not None)
    path = path_for(hidden)
    x, state = _attend_and_merge(block, parts, path, feature, index, state, r, hidden, arguments, through)
    return _hand_on(feature, block, state, _second_half(block, layout, parts, x))


def _in_segments(feature: EncoderFeature, index: int, state: State, arguments: Mapping[str, Any]) -> State:
    """The state with the segments that a block of a packed sequence attends within, and what each is to give up.

    Where tokens merge, segments are whole images or frames, whose first length says how many go.
    """
    bounds: Tensor = arguments["cu_seqlens"]
    segments, first = shortened(bounds, state.positions), segments_of(bounds).lengths
    spare = [0] * len(first)
    if index in feature.shape.merging and len(segments.lengths) == len(first):
        asked = [feature.amounts or feature.solved_amounts(tokens, 0, feature.solved_by) for tokens in first]
        amounts = [own[index] for own in asked]
        if state.entered is not None and feature.config.r is None:  # a share is one of what came in
            entered = shortened(bounds, state.entered).lengths
            amounts = [r * left // tokens for r, left, tokens in zip(amounts, entered, first)]
        least, unit = feature.config.min_tokens, feature.shape.unit
        spare = [clamp(r, left, 0, least, unit) for r, left in zip(amounts, segments.lengths)]
    return state.changed(segments=segments, spare=tuple(spare))


def unmerged_forward(
    block: nn.Module, layout: Layout, config: TurboConfig, x: Tensor, state: State, arguments: Mapping[str, Any]
) -> Tensor:
    """Both halves of a block without a merge between them."""
    parts, path = layout.parts(block), path_for(x)
    return _second_half(block, layout, parts, first_half(block, parts, path, layout, config, x, state, arguments))


def _begin(feature: EncoderFeature, hidden: Tensor) -> State:
    if not isinstance(hidden, Tensor):
        raise StateError(
            f"{feature.names[0]} got a {type(hidden).__name__}, no tensor: an accelerated block merges by the values "
            "of its tokens, which a symbolic trace (torch.fx) does not have; read features by forward hooks on the "
            "blocks and handle.restore, or trace the model after handle.remove()"
        )
    # Plain numbers: with `dynamic=True` Dynamo takes those of a patch for symbols, and reasons about them for minutes.
    own, suffix = operator.index(feature.shape.prefix), operator.index(feature.shape.suffix)
    prefix: int = getattr(hidden, PREFIX, own)
    amounts, asked = () if feature.layout.packed else feature.amounts, asked_of(feature, hidden)
    blocks, maps = (frozenset(), False) if asked is None else (asked.blocks, asked.maps)
    if amounts is None:
        tokens = operator.index(hidden.shape[1])
        amounts = feature.solved_amounts(tokens, operator.index(prefix), feature.solved_by)
    else:
        amounts = tuple(operator.index(each) for each in amounts)
    return State(0, amounts, prefix, suffix, whole=blocks, maps=maps, lengths=(hidden.shape[1],))


def _resume(feature: EncoderFeature, index: int, block: nn.Module, hidden: Tensor) -> State:
    state: State | None = getattr(hidden, STATE, None)
    if state is None:
        state = _of_replaced(feature, index, block, hidden)
    if state is None or state.block != index:
        found = "tokens without turbovlm's state" if state is None else f"the tokens of block {state.block - 1}"
        raise StateError(
            f"{feature.names[index]} got {found} instead of the output of {feature.names[index - 1]}: something "
            "between the two blocks replaces the hidden states, so it is not known which tokens were merged; "
            "handle.remove() gives the model back"
        )
    if state.version is not None and state.version != _version(hidden):
        raise StateError(
            f"what {feature.names[index - 1]} handed out, restored to every position, was changed in place, but "
            f"{feature.names[index]} goes on with the merged tokens: change a copy"
        )
    return state


def _of_replaced(feature: EncoderFeature, index: int, block: nn.Module, hidden: Tensor) -> State | None:
    """The state of a block's output that a hook has replaced by another of its shape, as one that steers does."""
    state = None if torch.compiler.is_compiling() else feature.last_here
    if state is None or state.block != index or not (state.hooked or has_hooks(block, "_forward_pre_hooks")):
        return None
    if index - 1 in state.whole and state.merges:
        raise StateError(
            f"what {feature.names[index - 1]} handed out, restored to every position, was replaced, but "
            f"{feature.names[index]} goes on with the merged tokens: change them in a call that does not ask for them"
        )
    batch = state.merges[-1].sizes.shape[0] if state.merges else hidden.shape[0]
    return state if hidden.shape[:2] == (batch, state.lengths[-1]) else None


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place, where that is counted."""
    if torch.compiler.is_compiling() or x.is_inference() or is_transformed(x):
        return None
    return x._version


def _hand_on(feature: EncoderFeature, block: nn.Module, state: State, x: Tensor) -> Tensor | tuple[Tensor | None, ...]:
    """Attach the state for the next block, and keep it; restore where every position is read."""
    depth, ran = len(feature.names), state.block + 1
    hooked = has_hooks(block, "_forward_hooks")
    state = state.changed(block=ran, tokens=None, version=None, hooked=hooked, lengths=(*state.lengths, x.shape[1]))
    by_number = feature.config.thresholds is None  # thresholds wait for the GPU themselves
    if not torch.compiler.is_compiling() and by_number and state.merges:
        feature.launches.behind(ran, depth, x)
    if not is_exporting():
        feature.last = state.changed(lost=()) if state.lost and ran == depth else state
    if ran == depth and feature.cross_attention is not None and (asked := asked_of(feature)) is not None:
        asked.left = state
    if state.merges and ran == depth and feature.restore:
        x = state.restored(x)
    elif state.merges and ran - 1 in state.whole:
        merged, x = x, state.restored(x)
        setattr(x, STATE, state.changed(tokens=merged, version=_version(x)))
    elif ran < depth or not feature.restore:
        setattr(x, STATE, state)
    entries = feature.layout.returns_tuple
    return (x, *(None,) * (entries - 1)) if entries else x


def _check_arguments(feature: EncoderFeature, index: int, state: State, arguments: Mapping[str, Any]) -> None:
    known = (*feature.layout.understood, feature.layout.mask, *OF_NO_EFFECT)
    if state.maps or arguments.get("output_attentions"):
        raise StateError(
            f"output_attentions=True: {feature.names[index]} is accelerated and never builds its attention map; "
            "TurboConfig(trace=True) records the guide's attention row, handle.remove() brings the map back"
        )
    for name, value in arguments.items():
        if name not in known and (isinstance(value, Tensor) or (name == "is_causal" and value)):
            raise StateError(f"{feature.names[index]} got {name}, which an accelerated block cannot honour")


def _attend_and_merge(
    block: nn.Module,
    parts: Parts,
    path: ModuleType,
    feature: EncoderFeature,
    index: int,
    state: State,
    r: int,
    hidden: Tensor,
    arguments: Mapping[str, Any],
    through: bool,
) -> tuple[Tensor, State]:
    """The first half and the merge; what they computed is gone from memory before the MLP needs some."""
    config, layout = feature.config, feature.layout
    ranks = r > 0 or config.trace
    seen: list[Heads] = []
    look = seen.append if ranks else None
    x = first_half(block, parts, path, layout, config, hidden, state, arguments, through, look)
    if not ranks:
        return x, state
    heads = seen[0]
    if feature.shape.unit > 1 or state.segments is not None:
        merge, merged, cells = merge_cells(
            path, feature, index, state, r, x, _compared(parts, feature, heads, x), heads
        )
        split = Split(feature.partition, state.prefix, state.suffix, index, config.seed)
        return merged, _follow(feature, state, merge, split, x, merged).changed(cells=cells)
    guide = guide_of(heads, feature.guidance, state, feature.similarity == "heads") if feature.semantic else None
    return _merge(path, feature, index, state, r, x, _compared(parts, feature, heads, x), guide)


def _compared(parts: Parts, feature: EncoderFeature, heads: Heads, x: Tensor) -> Tensor:
    """What tokens are compared by, `[batch, tokens, width]`."""
    if feature.similarity == "hidden":  # what the MLP reads, normed already where norms come after the residual
        return normalised(None if parts.norm_after_attention is not None else parts.mlp[0], x).detach()
    content = heads.content.detach()
    if feature.similarity == "heads":
        return content.transpose(1, 2).flatten(2)
    return content.sum(dim=1, dtype=precise_dtype(content))  # its cosine is that of the mean over heads


def _second_half(block: nn.Module, layout: Layout, parts: Parts, x: Tensor) -> Tensor:
    out = normalised(parts.norm_after_mlp, x + apply_steps(parts.mlp, x))
    return out if layout.end is None else layout.end(block, out)


def _merge(
    path: ModuleType,
    feature: EncoderFeature,
    index: int,
    state: State,
    r: int,
    x: Tensor,
    features: Tensor,
    guide: Guide | None,
) -> tuple[Tensor, State]:
    """Merge `r` tokens of `x`, `[batch, tokens, width]`, and bring the state up to date."""
    config, tokens = feature.config, x.shape[1]
    split = Split(feature.partition, state.prefix, state.suffix, index, config.seed, config.grid)
    r = min(r, split.most(tokens, state.destinations))
    if r > 0 and not (config.trace or config.thresholds or callable(config.degree)):
        rules = Rules(config.degree, config.alpha, config.seed, config.order, config.reduce)
        merge, merged = merge_whole(
            *(path, x, features, guide, state.sizes, split, state.destinations, rules),
            r=r,
            index=len(state.merges),
            padded=state.padded,
        )
        return merged, _follow(feature, state, merge, split, x, merged)
    partition, by_degree = split.partition(tokens, x.device, state.destinations), config.thresholds is not None
    semantic, squares = (None, None) if guide is None else guide.rows(path)
    ranking = rank_candidates(
        *(features, partition, semantic, len(state.merges)),
        degree=config.degree,
        alpha=config.alpha,
        seed=config.seed,
        sizes=state.sizes if state.padded else None,
        squares=squares,
        r=None if by_degree or r == 0 else r,
        path=path,
    )
    if config.thresholds is not None:
        r = min(r, _spared(ranking.degree, config.thresholds[index]))
    if r > 0:
        merge, merged = merge_ranked(
            ranking, r, x, sizes=state.sizes, order=config.order, reduce=config.reduce, path=path
        )
        x, state = merged, _follow(feature, state, merge, split, x, merged)
    if config.trace:
        assert semantic is not None
        trace = traced(feature.names[index], state, x, ranking, over_heads(semantic))
        state = state.changed(traces=(*state.traces, trace))
    return x, state


def _spared(degree: Tensor, threshold: float) -> int:
    """How many tokens every image of the batch can spare."""
    if torch.compiler.is_compiling() or is_exporting():
        raise StateError("thresholds make the number of tokens depend on the image, which cannot be compiled: use r")
    return int((degree > threshold).sum(dim=1).amin())


def _follow(feature: EncoderFeature, state: State, merge: Merge, split: Split, x: Tensor, merged: Tensor) -> State:
    """The state behind a merge of `x` into `merged`."""
    lost, where, destinations = state.lost, state.positions, state.destinations
    if feature.how == "residual" and (feature.restore or state.whole):
        lost = (*lost, merge.lost(x, merged))
    if feature.layout.rotary is not None:
        kept = merge.kept[:, state.prefix : merge.kept.shape[1] - state.suffix] - state.prefix
        where = kept if where is None else where.gather(1, kept)
    if split.kind == "grid":
        if destinations is None:
            fixed = positions(split.partition(x.shape[1], x.device).destinations, x.device)
            destinations = fixed.expand(x.shape[0], -1)
        destinations = merge.source.gather(1, destinations)
    return state.changed(
        sizes=merge.sizes,
        logs=merge.logs,
        merges=(*state.merges, merge),
        lost=lost,
        positions=where,
        destinations=destinations,
    )
