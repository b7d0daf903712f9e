"""The accelerated block: attention, merge, MLP, through the block's own modules."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.encoder.layout import Path, Spelling, fetch, run_steps
from turbovlm.encoder.schedule import EncoderShape, clamp, requested_amounts
from turbovlm.encoder.state import PREFIX, STATE, State, traced
from turbovlm.errors import StateError
from turbovlm.ops.attention import attention_row, biased_attention, size_bias
from turbovlm.ops.degree import needs_semantic
from turbovlm.ops.merging import Merge, merge_ranked, rank_candidates
from turbovlm.ops.partition import Partition, count, partition_tokens, positions
from turbovlm.ops.tracing import constant_in_graphs, is_exporting, is_readable


@dataclass(frozen=True)
class Heads:
    """What a block attends with.

    Attributes:
        q, k, v: queries, keys (both rotated, where the model rotates) and values, `[batch, heads, tokens, head_dim]`.
        content: the unrotated keys, or queries for `similarity="queries"`.
        bias: what attention adds to its scores, `[batch, 1, 1, tokens]`, or None.
        scale: what it multiplies them by before.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    content: Tensor
    bias: Tensor | None
    scale: float


@dataclass(frozen=True)
class Clues:
    """What the heads say about the tokens, small beside them.

    Attributes:
        features: what is compared, `[batch, tokens, head_dim]`, or all heads' for `similarity="heads"`; None for
            `"hidden"`.
        semantic: A, `[batch, tokens]`; None where the degree does not need it.
    """

    features: Tensor | None
    semantic: Tensor | None


@dataclass(eq=False)
class Plan:
    """What the blocks of one accelerated encoder share.

    `restore` says how every position gets its token back behind the last block, `"copy"` or `"residual"`; None where
    tokens are handed on merged. `last` is the state at the end of the last forward; it is not copied or pickled.
    """

    config: TurboConfig
    spelling: Spelling
    shape: EncoderShape
    tower: str
    names: tuple[str, ...]
    native_tokens: int
    guidance: str
    similarity: str
    restore: str | None
    plain_stem: bool
    last: State | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    @property
    def guided(self) -> bool:
        """Whether the merge needs the semantic value."""
        return needs_semantic(self.config.degree)

    @constant_in_graphs
    def solved_amounts(self, tokens: int, prefix: int) -> tuple[int, ...]:
        """How many tokens each block merges.

        A method, as Dynamo of torch 2.11 wants constants for all arguments of such a function, but not for `self`.
        """
        return requested_amounts(self.config, replace(self.shape, prefix=prefix), tokens)


def accelerated_forward(
    block: nn.Module, plan: Plan, index: int, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor | tuple[Tensor]:
    """The forward of block `index`: attention, merge, MLP, through the block's own modules.

    A block that has nothing to merge, on tokens that were never merged, runs its own forward.
    """
    arguments = {**dict(zip(plan.spelling.arguments, args)), **kwargs}
    state = _begin(plan, hidden) if index == 0 else _resume(plan, index, hidden)
    config = plan.config
    asked = state.amounts[index] if config.thresholds is None else hidden.shape[1]
    r = clamp(asked, hidden.shape[1], state.prefix, config.min_tokens)
    if r == 0 and not state.merges and not config.trace:
        out = type(block).forward(block, hidden, *args, **kwargs)
        return _hand_on(plan, replace(state, block=index + 1), out[0] if plan.spelling.returns_tuple else out)
    _check_arguments(plan, index, arguments)
    if state.sizes is None and plan.spelling.mask is not None:
        sizes = _sizes_from_mask(arguments.get(plan.spelling.mask), hidden)
        state = replace(state, sizes=sizes, padded=sizes is not None)
    x, state = _attend_and_merge(block, plan, index, state, r, hidden, arguments)
    return _hand_on(plan, replace(state, block=index + 1), _second_half(block, plan.spelling, x))


def unmerged_forward(
    block: nn.Module, spelling: Spelling, config: TurboConfig, x: Tensor, state: State, arguments: Mapping[str, Any]
) -> Tensor:
    """Both halves of a block without a merge between them."""
    x = _attend(block, spelling, x, _heads(block, spelling, config, x, state, arguments))
    return _second_half(block, spelling, x)


@torch.no_grad()
def attention_of_guide(
    block: nn.Module,
    spelling: Spelling,
    config: TurboConfig,
    prefix: int,
    guidance: str,
    hidden: Tensor,
    arguments: Mapping[str, Any],
) -> Tensor:
    """A of every patch, `[batch, patches]`, in a block that attends to `hidden`, `[batch, tokens, width]`.

    Where tokens were merged before, the patches of one share what it gets.
    """
    state: State = getattr(hidden, STATE, State(0, (), prefix))
    if state.sizes is None and spelling.mask is not None:
        state = replace(state, sizes=_sizes_from_mask(arguments.get(spelling.mask), hidden))
    heads = _heads(block, spelling, config, hidden, state, arguments)
    row = attention_row(_guide(heads, guidance, prefix, state.sizes), heads.k, heads.bias)
    source = state.source()
    if source is not None and state.sizes is not None:
        row = (row / state.sizes).gather(1, source)
    return row[:, prefix:]


def _begin(plan: Plan, hidden: Tensor) -> State:
    prefix: int = getattr(hidden, PREFIX, plan.shape.prefix)
    if isinstance(plan.config.r, tuple):
        return State(0, plan.config.r, prefix)
    if plan.config.r is not None:
        return State(0, (cast(int, plan.config.r),) * plan.shape.depth, prefix)
    amounts: tuple[int, ...] = plan.solved_amounts(operator.index(hidden.shape[1]), operator.index(prefix))
    return State(0, amounts, prefix)


def _resume(plan: Plan, index: int, hidden: Tensor) -> State:
    state: State | None = getattr(hidden, STATE, None)
    if state is None or state.block != index:
        found = "tokens without turbovlm's state" if state is None else f"the tokens of block {state.block - 1}"
        raise StateError(
            f"{plan.names[index]} got {found} instead of the output of {plan.names[index - 1]}: something between the "
            "two blocks replaces the hidden states, so it is not known which tokens were merged; "
            "handle.remove() gives the model back"
        )
    return state


def _hand_on(plan: Plan, state: State, x: Tensor) -> Tensor | tuple[Tensor]:
    """Attach the state for the next block; at the end of the encoder, keep it, and restore what needs restoring."""
    if state.block < plan.shape.depth or not plan.restore:
        setattr(x, STATE, state)
    else:
        x = state.restored(x)
    if state.block == plan.shape.depth and not is_exporting():
        plan.last = replace(state, lost=())
    return (x,) if plan.spelling.returns_tuple else x


def _check_arguments(plan: Plan, index: int, arguments: Mapping[str, Any]) -> None:
    known = (*plan.spelling.understood, plan.spelling.mask)
    for name, value in arguments.items():
        if name == "output_attentions" and value:
            raise StateError(
                f"output_attentions=True: {plan.names[index]} is accelerated and never builds its attention map; "
                "TurboConfig(trace=True) records the guide's attention row, handle.remove() brings the map back"
            )
        if name not in known and (isinstance(value, Tensor) or (name == "is_causal" and value)):
            raise StateError(f"{plan.names[index]} got {name}, which an accelerated block cannot honour")


def _attend_and_merge(
    block: nn.Module, plan: Plan, index: int, state: State, r: int, hidden: Tensor, arguments: Mapping[str, Any]
) -> tuple[Tensor, State]:
    """A function of its own, so that what it computed is gone from memory before the MLP needs some."""
    heads = _heads(block, plan.spelling, plan.config, hidden, state, arguments)
    if r == 0 and not plan.config.trace:
        return _attend(block, plan.spelling, hidden, heads), state
    clues = _clues(plan, state, heads)
    return _merge(block, plan, index, state, r, _attend(block, plan.spelling, hidden, heads), clues)


def _heads(
    block: nn.Module,
    spelling: Spelling,
    config: TurboConfig,
    hidden: Tensor,
    state: State,
    arguments: Mapping[str, Any],
) -> Heads:
    """Queries, keys and values of `norm1(hidden)`, and attention's bias."""
    normed = _normed(block, spelling.norm1, hidden)
    if callable(spelling.project):
        flat = spelling.project(block, normed)
    elif len(spelling.project) == 1:
        flat = fetch(block, spelling.project[0])(normed).chunk(3, dim=-1)
    else:
        flat = tuple(fetch(block, path)(normed) for path in spelling.project)
    heads = fetch(block, spelling.heads)
    q, k, v = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in flat)
    if spelling.query_norm is not None:
        q = fetch(block, spelling.query_norm)(q)
    if spelling.key_norm is not None:
        k = fetch(block, spelling.key_norm)(k)
    content = q if config.similarity == "queries" else k
    if spelling.rotary is not None:
        q, k = spelling.rotary(block, q, k, state.home, arguments)
    attended = state.attended(config.proportional)
    bias = None if attended is None else size_bias(attended, q.dtype)
    scale = q.shape[-1] ** -0.5 if spelling.scale is None else fetch(block, spelling.scale)
    return Heads(q, k, v, content, bias, scale)


def _attend(block: nn.Module, spelling: Spelling, hidden: Tensor, heads: Heads) -> Tensor:
    """The first half: `hidden + attention`, `[batch, tokens, width]`."""
    mixed = biased_attention(
        heads.q, heads.k, heads.v, heads.bias, scale=heads.scale, dropout_p=_dropout(block, spelling)
    )
    out = hidden + run_steps(block, spelling.after_attention, mixed.transpose(1, 2).flatten(2))
    return _normed(block, spelling.norm_after_attention, out)


def _second_half(block: nn.Module, spelling: Spelling, x: Tensor) -> Tensor:
    return _normed(block, spelling.norm_after_mlp, x + run_steps(block, spelling.mlp, x))


def _normed(block: nn.Module, norm: Path | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    normed: Tensor = fetch(block, norm)(x)
    return normed


def _clues(plan: Plan, state: State, heads: Heads) -> Clues:
    features = semantic = None
    content = heads.content.detach()
    if plan.similarity == "heads":
        features = content.transpose(1, 2).flatten(2)
    elif plan.similarity != "hidden":  # the sum over heads: its cosine is the mean's
        features = content.sum(dim=1, dtype=torch.promote_types(content.dtype, torch.float32))
    if plan.guided or plan.config.trace:
        guide = _guide(heads, plan.guidance, state.prefix, state.sizes).detach()
        semantic = attention_row(guide, heads.k.detach(), heads.bias)
    return Clues(features, semantic)


def _merge(
    block: nn.Module,
    plan: Plan,
    index: int,
    state: State,
    r: int,
    x: Tensor,
    clues: Clues,
) -> tuple[Tensor, State]:
    """Merge `r` tokens of `x`, `[batch, tokens, width]`, and bring the state up to date."""
    config = plan.config
    partition = _partition(plan, state, index, x)
    features, semantic = clues.features, clues.semantic
    if features is None:
        norm2 = plan.spelling.mlp[0] if plan.spelling.norm_after_attention is None else None
        features = _normed(block, norm2, x).detach()
    ranking = rank_candidates(
        features,
        partition,
        semantic,
        len(state.merges),
        degree=config.degree,
        alpha=config.alpha,
        seed=config.seed,
        sizes=state.sizes if state.padded else None,
    )
    r = min(r, count(partition.candidates))
    if config.thresholds is not None:
        r = min(r, _spared(ranking.degree, config.thresholds[index]))
    if r > 0:
        merge, merged = merge_ranked(ranking, r, x, sizes=state.sizes, order=config.order, reduce=config.reduce)
        if plan.restore == "residual":
            state = replace(state, lost=(*state.lost, merge.lost(x, merged)))
        x, state = merged, _follow(plan, state, merge, partition)
    if config.trace:
        assert semantic is not None
        trace = traced(plan.names[index], state, x, ranking, semantic)
        state = replace(state, traces=(*state.traces, trace))
    return x, state


def _spared(degree: Tensor, threshold: float) -> int:
    """How many tokens every picture of the batch can spare."""
    if torch.compiler.is_compiling() or is_exporting():
        raise StateError("thresholds make the number of tokens depend on the picture, which cannot be compiled: use r")
    return int((degree > threshold).sum(dim=1).amin())


def _follow(plan: Plan, state: State, merge: Merge, partition: Partition) -> State:
    home, destinations, prefix = state.home, state.destinations, state.prefix
    if plan.spelling.rotary is not None:
        kept = merge.kept[:, prefix:] - prefix
        home = kept if home is None else home.gather(1, kept)
    if plan.config.partition == "grid":
        old = positions(partition.destinations, merge.source.device).expand(merge.source.shape[0], -1)
        destinations = merge.source.gather(1, old)
    return replace(state, sizes=merge.sizes, merges=(*state.merges, merge), home=home, destinations=destinations)


def _partition(plan: Plan, state: State, index: int, x: Tensor) -> Partition:
    prefix, tokens, device = state.prefix, x.shape[1], x.device
    if state.destinations is None:
        kind, seed, grid = plan.config.partition, plan.config.seed, plan.config.grid
        return partition_tokens(tokens, prefix, kind, block=index, seed=seed, grid=grid, device=device)
    batch, destinations = state.destinations.shape
    # what is no candidate is numbered last, so that sorting puts the candidates first, in ascending order
    place = torch.arange(tokens, device=device).expand(batch, -1).scatter(1, state.destinations, tokens)
    place[:, :prefix] = tokens
    candidates = place.sort(dim=1).values[:, : tokens - prefix - destinations]
    return Partition(candidates, state.destinations)


def _guide(heads: Heads, guidance: str, prefix: int, sizes: Tensor | None) -> Tensor:
    """The guide's query, scaled: CLS's, or the mean of the patches', weighted by size."""
    q = heads.q
    if guidance == "cls":
        guide = q[:, :, :1]
    elif sizes is None:
        guide = q[:, :, prefix:].mean(dim=2, keepdim=True)
    else:
        weights = sizes[:, prefix:] / sizes[:, prefix:].sum(dim=1, keepdim=True)
        guide = (q[:, :, prefix:] * weights.to(q.dtype)[:, None, :, None]).sum(dim=2, keepdim=True)
    return guide * heads.scale


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


def _dropout(block: nn.Module, spelling: Spelling) -> float:
    if not block.training or spelling.dropout is None:
        return 0.0
    dropout = fetch(block, spelling.dropout)
    return float(dropout.p if isinstance(dropout, nn.Dropout) else dropout)
