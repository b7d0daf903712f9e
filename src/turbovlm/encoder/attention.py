"""The first half of a block, `hidden + attention(norm1(hidden))`, through the block's own projections."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.layout import Layout, Parts, fetch
from turbovlm.encoder.state import STATE, State
from turbovlm.errors import StateError
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.plain import log_sizes
from turbovlm.ops.segments import Segments, attend_within
from turbovlm.ops.tracing import is_readable
from turbovlm.ops.whole import Guide
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


def first_half(
    block: nn.Module,
    parts: Parts,
    path: ModuleType,
    layout: Layout,
    config: Any,
    hidden: Tensor,
    state: State,
    arguments: Mapping[str, Any],
    through: bool = False,
    look: Callable[[Heads], None] | None = None,
) -> Tensor:
    """`hidden + attention`, `[batch, tokens, width]`.

    Args:
        through: whether attention is called as a module, so that hooks on it run.
        look: is called with the heads, which are gone from memory at the end if it keeps none.
    """

    def attention(normed: Tensor) -> Tensor:
        heads = _heads(block, parts, layout, config, normed, state, arguments)
        if look is not None:
            look(heads)
        if state.segments is not None:
            return _within(path, heads, state.segments).flatten(2)
        mixed: Tensor = path.attend(heads.q, heads.k, heads.v, heads.bias, heads.scale, heads.dropout)
        return mixed.transpose(1, 2).flatten(2)

    normed = normalised(parts.norm1, hidden)
    if not through:
        out = apply_steps(parts.after_attention, attention(normed))
    else:
        inside, outside = (
            parts.after_attention[: layout.attention_steps],
            parts.after_attention[layout.attention_steps :],
        )
        assert layout.attention is not None
        module = fetch(block, layout.attention)
        packed = state.segments is not None  # a module of a packed sequence has no batch

        def run(x: Tensor) -> Tensor:
            out = apply_steps(inside, attention(x.unsqueeze(0) if packed else x))
            return out.squeeze(0) if packed else out

        called = _call(module, normed.squeeze(0) if packed else normed, run)
        out = apply_steps(outside, called.unsqueeze(0) if packed else called)
    return normalised(parts.norm_after_attention, hidden + out)


def _within(path: ModuleType, heads: Heads, segments: Segments) -> Tensor:
    """Attention within the segments of a packed sequence, `[1, tokens, heads, head_dim]`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.transpose(2, 3)
        mixed: Tensor = path.attend(q, k, v, bias, heads.scale, heads.dropout)
        return mixed.transpose(1, 2)

    biases = () if heads.bias is None else (heads.bias.transpose(2, 3),)
    return attend_within(attend, segments, heads.q, heads.k, heads.v, *biases)


_CALL = threading.local()  # of the attention module that is being called in this thread: `run`


def _call(module: nn.Module, normed: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Call an attention module, hooks and all, with `run` as its forward."""
    _CALL.run = run
    try:
        out = module(*(normed,) * (3 if isinstance(module, nn.MultiheadAttention) else 1))
        if _CALL.run is not None:
            raise StateError(
                f"a {type(module).__name__} of an accelerated encoder has a forward of its own that does not call the "
                "one before: take it off, or call handle.remove()"
            )
    finally:
        _CALL.run = None
    tokens: Tensor = out[0] if isinstance(out, tuple) else out
    return tokens


def attention_forward(patch: Patch, module: nn.Module, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Attend as the accelerated block around wants it; by the module's own forward for all others who call it."""
    run = getattr(_CALL, "run", None)
    if run is None:
        return original(*args, **kwargs)
    _CALL.run = None
    if not all(_same(args[0], other) for other in args[1:]):
        raise StateError(
            f"a hook gives this {type(module).__name__} queries that are not its keys and values, which an accelerated "
            "block cannot honour: let it change all three, or call handle.remove()"
        )
    out = run(args[0])
    feature: EncoderFeature = patch.feature  # type: ignore[assignment]
    return (out, None) if feature.pair else out


def _same(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or two names of the same memory, as hooks on the gradient make them."""
    return other is x or (is_readable(x) and other.shape == x.shape and other.data_ptr() == x.data_ptr())


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
    if state.tokens is not None:
        hidden = state.tokens
    if state.sizes is None and layout.mask is not None:
        state = replace(state, sizes=sizes_from_mask(arguments.get(layout.mask), hidden))
    parts, path = layout.parts(block), path_for(hidden)
    heads = _heads(block, parts, layout, config, normalised(parts.norm1, hidden), state, arguments)
    row = guide_of(heads, guidance, state).rows(path)[0].mean(dim=1)
    if state.merges:
        source = state.source()
        assert source is not None and state.sizes is not None
        row = (row / state.sizes).gather(1, source)
    return row[:, prefix : row.shape[1] - state.suffix]


def _heads(
    block: nn.Module,
    parts: Parts,
    layout: Layout,
    config: Any,
    normed: Tensor,
    state: State,
    arguments: Mapping[str, Any],
) -> Heads:
    """Queries, keys and values of what norm1 gives, and attention's bias."""
    q, k, v = project_heads(block, parts, normed)
    q, k = normalised(parts.query_norm, q), normalised(parts.key_norm, k)
    content = q if getattr(config, "similarity", None) == "queries" else k
    if layout.rotary is not None:
        q, k = layout.rotary(block, q, k, state.positions, arguments)
    bias = _bias(state, config.proportional)
    scale = q.shape[-1] ** -0.5 if parts.scale is None else parts.scale
    dropout = parts.dropout.p if isinstance(parts.dropout, nn.Dropout) else parts.dropout or 0.0
    return Heads(q, k, v, content, bias, scale, float(dropout) if block.training else 0.0)


def _bias(state: State, proportional: bool) -> Tensor | None:
    """What attention adds to its scores, `[batch, 1, 1, tokens]`; None where all tokens count alike."""
    if state.sizes is None:
        return None
    if proportional:
        logs = log_sizes(state.sizes) if state.logs is None else state.logs
        return logs[:, None, None, :]
    return log_sizes((state.sizes > 0).to(state.sizes.dtype))[:, None, None, :] if state.padded else None


def project_heads(block: nn.Module, parts: Parts, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of what norm1 gives, `[batch, heads, tokens, head_dim]` each, not normed yet."""
    if callable(parts.project):
        flat = parts.project(block, normed)
    elif len(parts.project) == 1:
        packed = parts.project[0](normed)
        q, k, v = packed.view(*packed.shape[:2], 3, parts.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
    else:
        flat = tuple(project(normed) for project in parts.project)
    return tuple(each.view(*each.shape[:2], parts.heads, -1).transpose(1, 2) for each in flat)


def guide_of(heads: Heads, guidance: str, state: State, of_features: bool = False) -> Guide:
    """CLS, or the mean of the patches weighted by size.

    Args:
        of_features: see `Guide`.
    """
    by_cls = guidance == "cls"
    return Guide(
        q=heads.q.detach(),
        keys=heads.k.detach(),
        content=None if heads.content is heads.k else heads.content.detach(),
        bias=heads.bias,
        weights=None if by_cls else state.sizes,
        guides=(0, 1) if by_cls else (state.prefix, heads.q.shape[2] - state.suffix),
        scale=heads.scale,
        of_features=of_features,
    )


def apply_steps(steps: tuple[Any, ...], x: Tensor) -> Tensor:
    """Call what can be called, take the first of a tuple, multiply by tensors and numbers, skip None, in order."""
    for step in steps:
        if callable(step):
            out = step(x)
            x = out[0] if isinstance(out, tuple) else out
        elif step is not None:
            x = x * step
    return x


def normalised(norm: Any, x: Tensor) -> Tensor:
    """What a norm gives; `x` itself where there is none."""
    normed: Tensor = x if norm is None else norm(x)
    return normed


def sizes_from_mask(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
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
