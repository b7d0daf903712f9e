"""The accelerated block: attention, merge, MLP, through the block's own modules.

The data's way: the library's loop calls `block_forward`; the state comes with the hidden tokens, and leaves with them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.encoder.layout import Layout, Parts
from turbovlm.encoder.schedule import clamp
from turbovlm.encoder.state import PREFIX, STATE, State, traced
from turbovlm.errors import StateError
from turbovlm.ops.attention import size_bias
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.merging import Merge, merge_ranked, rank_candidates
from turbovlm.ops.partition import Partition, partition_tokens, positions
from turbovlm.ops.tracing import is_exporting, is_readable
from turbovlm.patching import Patch

if TYPE_CHECKING:
    from turbovlm.encoder.feature import EncoderFeature


@dataclass(frozen=True)
class Heads:
    """What a block attends with.

    Attributes:
        q, k, v: queries, keys (both rotated, where the model rotates) and values, `[batch, heads, tokens, head_dim]`.
        content: the unrotated keys, or queries for `similarity="queries"`.
        bias: what attention adds to its scores, `[batch, 1, 1, tokens]`, or None.
        scale: what it multiplies them by before.
        dropout: of the attention weights.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    content: Tensor
    bias: Tensor | None
    scale: float
    dropout: float


def block_forward(
    patch: Patch, block: nn.Module, original: Any, /, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor | tuple[Tensor]:
    """Run one block of an encoder, with a merge between its halves.

    A block that has nothing to merge, on tokens that were never merged, runs its own forward.
    """
    feature: EncoderFeature = patch.feature  # type: ignore[assignment]
    index, config, layout = patch.detail, feature.config, feature.layout
    arguments = {**dict(zip(layout.arguments, args)), **kwargs}
    state = _begin(feature, hidden) if index == 0 else _resume(feature, index, hidden)
    asked = state.amounts[index] if config.thresholds is None else hidden.shape[1]
    r = clamp(asked, hidden.shape[1], state.prefix + state.suffix, config.min_tokens)
    if r == 0 and not state.merges and not config.trace:
        out = original(hidden, *args, **kwargs)
        return _hand_on(feature, replace(state, block=index + 1), out[0] if layout.returns_tuple else out)
    _check_arguments(feature, index, arguments)
    if state.sizes is None and layout.mask is not None:
        sizes = _sizes_from_mask(arguments.get(layout.mask), hidden)
        state = replace(state, sizes=sizes, padded=sizes is not None)
    parts, path = layout.parts(block), path_for(hidden)
    x, state = _attend_and_merge(block, parts, path, feature, index, state, r, hidden, arguments)
    return _hand_on(feature, replace(state, block=index + 1), _second_half(parts, x))


def unmerged_forward(
    block: nn.Module, layout: Layout, config: TurboConfig, x: Tensor, state: State, arguments: Mapping[str, Any]
) -> Tensor:
    """Both halves of a block without a merge between them."""
    parts, path = layout.parts(block), path_for(x)
    heads = _heads(block, parts, layout, config, x, state, arguments)
    return _second_half(parts, _attend(parts, path, x, heads))


@torch.no_grad()
def attention_of_guide(
    block: nn.Module,
    layout: Layout,
    config: Any,
    prefix: int,
    guidance: str,
    hidden: Tensor,
    arguments: Mapping[str, Any],
) -> Tensor:
    """A of every patch, `[batch, patches]`, in a block that attends to `hidden`, `[batch, tokens, width]`.

    Where tokens were merged before, the patches of one share what it gets.

    Args:
        config: one with `proportional`, and `similarity` where it has it.
    """
    state: State = getattr(hidden, STATE, State(0, (), prefix))
    if state.sizes is None and layout.mask is not None:
        state = replace(state, sizes=_sizes_from_mask(arguments.get(layout.mask), hidden))
    parts, path = layout.parts(block), path_for(hidden)
    heads = _heads(block, parts, layout, config, hidden, state, arguments)
    row: Tensor = path.attention_row(_guide(heads, guidance, state), heads.k, heads.bias)
    if state.merges:
        source = state.source()
        assert source is not None and state.sizes is not None
        row = (row / state.sizes).gather(1, source)
    return row[:, prefix : row.shape[1] - state.suffix]


def _begin(feature: EncoderFeature, hidden: Tensor) -> State:
    prefix: int = getattr(hidden, PREFIX, feature.shape.prefix)
    r, suffix = feature.config.r, feature.shape.suffix
    if isinstance(r, tuple):
        return State(0, r, prefix, suffix)
    if r is not None:
        return State(0, (cast(int, r),) * feature.shape.depth, prefix, suffix)
    amounts: tuple[int, ...] = feature.solved_amounts(operator.index(hidden.shape[1]), operator.index(prefix))
    return State(0, amounts, prefix, suffix)


def _resume(feature: EncoderFeature, index: int, hidden: Tensor) -> State:
    state: State | None = getattr(hidden, STATE, None)
    if state is None or state.block != index:
        found = "tokens without turbovlm's state" if state is None else f"the tokens of block {state.block - 1}"
        raise StateError(
            f"{feature.names[index]} got {found} instead of the output of {feature.names[index - 1]}: something "
            "between the two blocks replaces the hidden states, so it is not known which tokens were merged; "
            "handle.remove() gives the model back"
        )
    return state


def _hand_on(feature: EncoderFeature, state: State, x: Tensor) -> Tensor | tuple[Tensor]:
    """Attach the state for the next block; at the end of the encoder, keep it, and restore what needs restoring."""
    depth = len(feature.names)
    if state.block < depth or not feature.restore:
        setattr(x, STATE, state)
    else:
        x = state.restored(x)
    if state.block == depth and not is_exporting():
        feature.last = replace(state, lost=())
    return (x,) if feature.layout.returns_tuple else x


def _check_arguments(feature: EncoderFeature, index: int, arguments: Mapping[str, Any]) -> None:
    known = (*feature.layout.understood, feature.layout.mask)
    for name, value in arguments.items():
        if name == "output_attentions" and value:
            raise StateError(
                f"output_attentions=True: {feature.names[index]} is accelerated and never builds its attention map; "
                "TurboConfig(trace=True) records the guide's attention row, handle.remove() brings the map back"
            )
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
) -> tuple[Tensor, State]:
    """The first half and the merge; what they computed is gone from memory before the MLP needs some."""
    config = feature.config
    heads = _heads(block, parts, feature.layout, config, hidden, state, arguments)
    if r == 0 and not config.trace:
        return _attend(parts, path, hidden, heads), state
    features, semantic = _ranked_by(path, feature, state, heads)
    x = _attend(parts, path, hidden, heads)
    del heads
    if features is None:  # what the MLP reads, normed already where norms come after the residual
        features = _normed(None if parts.norm_after_attention is not None else parts.mlp[0], x).detach()
    return _merge(path, feature, index, state, r, x, features, semantic)


def _heads(
    block: nn.Module,
    parts: Parts,
    layout: Layout,
    config: Any,
    hidden: Tensor,
    state: State,
    arguments: Mapping[str, Any],
) -> Heads:
    """Queries, keys and values of `norm1(hidden)`, and attention's bias."""
    normed = _normed(parts.norm1, hidden)
    if callable(parts.project):
        flat = parts.project(block, normed)
    elif len(parts.project) == 1:
        flat = parts.project[0](normed).chunk(3, dim=-1)
    else:
        flat = tuple(project(normed) for project in parts.project)
    q, k, v = (each.view(*each.shape[:2], parts.heads, -1).transpose(1, 2) for each in flat)
    q, k = _normed(parts.query_norm, q), _normed(parts.key_norm, k)
    content = q if getattr(config, "similarity", None) == "queries" else k
    if layout.rotary is not None:
        q, k = layout.rotary(block, q, k, state.positions, arguments)
    sizes = state.sizes
    if sizes is not None and not config.proportional:  # all alike, but for padding
        sizes = (sizes > 0).to(sizes.dtype) if state.padded else None
    bias = None if sizes is None else size_bias(sizes, q.dtype)
    scale = q.shape[-1] ** -0.5 if parts.scale is None else parts.scale
    dropout = parts.dropout.p if isinstance(parts.dropout, nn.Dropout) else parts.dropout or 0.0
    return Heads(q, k, v, content, bias, scale, float(dropout) if block.training else 0.0)


def _ranked_by(
    path: ModuleType, feature: EncoderFeature, state: State, heads: Heads
) -> tuple[Tensor | None, Tensor | None]:
    """What heads tell: the features that are compared, `[batch, tokens, width]`, and A, `[batch, tokens]`.

    None for hidden states, which are not known yet, and for an A that nobody needs.
    """
    features = semantic = None
    content = heads.content.detach()
    if feature.similarity == "heads":
        features = content.transpose(1, 2).flatten(2)
    elif feature.similarity != "hidden":  # the sum over heads: its cosine is the mean's
        features = content.sum(dim=1, dtype=torch.promote_types(content.dtype, torch.float32))
    if feature.semantic:
        semantic = path.attention_row(_guide(heads, feature.guidance, state).detach(), heads.k.detach(), heads.bias)
    return features, semantic


def _attend(parts: Parts, path: ModuleType, hidden: Tensor, heads: Heads) -> Tensor:
    """The first half: `hidden + attention`, `[batch, tokens, width]`."""
    mixed = path.attend(heads.q, heads.k, heads.v, heads.bias, heads.scale, heads.dropout)
    out = hidden + _apply_steps(parts.after_attention, mixed.transpose(1, 2).flatten(2))
    return _normed(parts.norm_after_attention, out)


def _second_half(parts: Parts, x: Tensor) -> Tensor:
    return _normed(parts.norm_after_mlp, x + _apply_steps(parts.mlp, x))


def _apply_steps(steps: tuple[Any, ...], x: Tensor) -> Tensor:
    """Call modules, multiply by tensors and numbers, skip None, in order."""
    for step in steps:
        if isinstance(step, nn.Module):
            x = step(x)
        elif step is not None:
            x = x * step
    return x


def _normed(norm: Any, x: Tensor) -> Tensor:
    normed: Tensor = x if norm is None else norm(x)
    return normed


def _merge(
    path: ModuleType,
    feature: EncoderFeature,
    index: int,
    state: State,
    r: int,
    x: Tensor,
    features: Tensor,
    semantic: Tensor | None,
) -> tuple[Tensor, State]:
    """Merge `r` tokens of `x`, `[batch, tokens, width]`, and bring the state up to date."""
    config = feature.config
    partition = _partition(config, state, index, x)
    ranking = rank_candidates(
        features,
        partition,
        semantic,
        len(state.merges),
        degree=config.degree,
        alpha=config.alpha,
        seed=config.seed,
        sizes=state.sizes if state.padded else None,
        path=path,
    )
    r = min(r, ranking.degree.shape[1])
    if config.thresholds is not None:
        r = min(r, _spared(ranking.degree, config.thresholds[index]))
    if r > 0:
        merge, merged = merge_ranked(
            ranking, r, x, sizes=state.sizes, order=config.order, reduce=config.reduce, path=path
        )
        if feature.restore == "residual":
            state = replace(state, lost=(*state.lost, merge.lost(x, merged)))
        x, state = merged, _follow(feature, state, merge, partition)
    if config.trace:
        assert semantic is not None
        trace = traced(feature.names[index], state, x, ranking, semantic)
        state = replace(state, traces=(*state.traces, trace))
    return x, state


def _spared(degree: Tensor, threshold: float) -> int:
    """How many tokens every image of the batch can spare."""
    if torch.compiler.is_compiling() or is_exporting():
        raise StateError("thresholds make the number of tokens depend on the image, which cannot be compiled: use r")
    return int((degree > threshold).sum(dim=1).amin())


def _follow(feature: EncoderFeature, state: State, merge: Merge, partition: Partition) -> State:
    where, destinations = state.positions, state.destinations
    if feature.layout.rotary is not None:
        kept = merge.kept[:, state.prefix : merge.kept.shape[1] - state.suffix] - state.prefix
        where = kept if where is None else where.gather(1, kept)
    if feature.config.partition == "grid":
        old = positions(partition.destinations, merge.source.device).expand(merge.source.shape[0], -1)
        destinations = merge.source.gather(1, old)
    return replace(state, sizes=merge.sizes, merges=(*state.merges, merge), positions=where, destinations=destinations)


def _partition(config: TurboConfig, state: State, index: int, x: Tensor) -> Partition:
    prefix, suffix, tokens, device = state.prefix, state.suffix, x.shape[1], x.device
    if state.destinations is None:
        kind, seed, grid = config.partition, config.seed, config.grid
        return partition_tokens(tokens, prefix, kind, suffix=suffix, block=index, seed=seed, grid=grid, device=device)
    # the destinations of a grid stay so: all other patches are candidates, sorted in front of what is left out
    batch, fixed = state.destinations.shape
    place = torch.arange(tokens, device=device).expand(batch, -1).scatter(1, state.destinations, tokens)
    place[:, :prefix] = tokens
    place[:, tokens - suffix :] = tokens
    candidates = place.sort(dim=1).values[:, : tokens - prefix - suffix - fixed]
    return Partition(candidates, state.destinations, suffix=suffix)


def _guide(heads: Heads, guidance: str, state: State) -> Tensor:
    """The guide's query, scaled: CLS's, or the mean of the patches', weighted by size."""
    if guidance == "cls":
        return heads.q[:, :, :1] * heads.scale
    patches = slice(state.prefix, heads.q.shape[2] - state.suffix)
    q = heads.q[:, :, patches]
    if state.sizes is None:
        return q.mean(dim=2, keepdim=True) * heads.scale
    sizes = state.sizes[:, patches]
    weights = sizes / sizes.sum(dim=1, keepdim=True)
    return (q * weights.to(q.dtype)[:, None, :, None]).sum(dim=2, keepdim=True) * heads.scale


def _sizes_from_mask(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Padding as tokens of size 0: nobody attends to them, they weigh nothing, and they are merged first."""
    if mask is None:
        return None
    if mask.ndim == 4:
        alike = mask[:, :1, :1]
        if is_readable(mask) and not torch.equal(alike.expand_as(mask), mask):
            raise StateError("the attention mask differs between queries; only padding can be honoured")
        mask = alike[:, 0, 0]
    seen = mask if mask.dtype == torch.bool else mask > -1
    return seen.to(torch.promote_types(hidden.dtype, torch.float32)).expand(hidden.shape[0], -1)
