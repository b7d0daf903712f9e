"""Merge before a part of a block, restore behind it (Turbo, §6.2, equation 14).

The merge is decided once for a group of blocks, on what its first part reads: R is the cosine of the tokens, A the
attention that they get from the mean query. One token in every 2×2 cell is a destination, so what is restored is never
far from its place.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.diffusion.plan import DiffusionPlan, Spot
from turbovlm.errors import ConfigError, StateError
from turbovlm.functional.backend import is_readable
from turbovlm.functional.informativity import attention_row, needs_semantic
from turbovlm.functional.matching import Merge, match

FEWEST = 64
"""Tokens below which nothing is merged."""


def part_forward(
    module: nn.Module,
    plan: DiffusionPlan,
    inner: Any,
    method: Any,
    spot: Spot,
    guide: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The forward of one part of a block: its class's (`method`), or `inner`, where another library has set one."""
    forward = functools.partial(method, module) if inner is None else inner
    x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    if spot.leads:
        plan.held[spot.group] = decide(plan, spot, guide, x)
    merge = _held(plan, spot, x)
    if merge is None:
        return forward(x, *rest, **kwargs)
    if not spot.part.merges:
        return _restored(spot, merge, forward(x, *rest, **kwargs))
    text = x.shape[1] - merge.weights.shape[1]
    x = merge.merge(x) if text == 0 else torch.cat([x[:, :text], merge.merge(x[:, text:])], dim=1)
    if kwargs.get("image_rotary_emb") is not None:
        out = _one_by_one(forward, merge, x, rest, kwargs)
    else:
        out = forward(x, *rest, **kwargs)
    return _restored(spot, merge, out) if spot.part.restores else out


def _held(plan: DiffusionPlan, spot: Spot, x: Tensor) -> Merge | None:
    """The merge of the part's group, which a part before it has decided in this forward.

    Raises:
        StateError: none has, or of other pictures.
    """
    merge = plan.held.get(spot.group, _NEVER)
    if merge is _NEVER:
        raise StateError(
            f"{spot.name} runs without the block before it that decides what is merged: something skips blocks, such "
            "as a cache between steps; handle.remove() gives the model back"
        )
    if isinstance(merge, Merge) and not spot.part.text_in_front and merge.weights.shape != x.shape[:2]:
        raise StateError(
            f"{spot.name} was given {tuple(x.shape[:2])} of {tuple(merge.weights.shape)} (batch, tokens): something "
            "skips the block that decides what is merged, or cuts the tokens into chunks; handle.remove() gives the "
            "model back"
        )
    return cast("Merge | None", merge)


_NEVER = object()


@torch.no_grad()
def decide(plan: DiffusionPlan, spot: Spot, guide: Any, x: Tensor) -> Merge | None:
    """Which tokens of `x`, `[batch, tokens, width]`, are merged, text in front left out; None where there are too few.

    Raises:
        ConfigError: the tokens fill no grid that is known.
    """
    config = plan.config
    assert config.keep is not None
    rows, columns = plan.grid or config.grid or _square(x)
    tokens = rows * columns
    text = x.shape[1] - tokens if spot.part.text_in_front else 0
    features = x[:, text:]
    r = tokens - math.floor(config.keep * tokens + 0.5)
    if r == 0 or tokens < max(config.min_tokens, FEWEST):
        return None
    semantic = mean_attention(guide, features) if needs_semantic(config.degree) else None
    return match(
        features,
        r,
        semantic,
        degree=config.degree,
        alpha=config.alpha,
        beta=config.beta,
        gamma=config.gamma,
        partition="grid",
        grid=(rows, columns),
        order="spatial",
        reduce=config.reduce,
        seed=config.seed,
    )


def mean_attention(attention: Any, x: Tensor) -> Tensor:
    """A: the attention that the mean query pays to each token of `x`, `[batch, tokens]`, sums to 1.

    Queries and keys are linear in the tokens, so neither is made for all of them: the mean query is that of the mean
    token, and its product with a key is that of the token with one vector per head.
    """
    heads = attention.heads
    query = attention.to_q(x.mean(dim=1, keepdim=True)).unflatten(-1, (heads, -1)).transpose(1, 2)
    scale = query.shape[-1] ** -0.5
    plain = type(attention.to_k) is nn.Linear and getattr(attention, "norm_k", None) is None
    if plain:
        weight = attention.to_k.weight.view(heads, query.shape[-1], -1)
        along = torch.einsum("bhqd,hdc->bhc", query * scale, weight)
        return torch.matmul(x, along.transpose(1, 2)).float().softmax(dim=1).mean(dim=2)
    key = attention.to_k(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    if getattr(attention, "norm_k", None) is not None:
        query, key = attention.norm_q(query), attention.norm_k(key)
    return attention_row(query * scale, key, None)


def _one_by_one(forward: Any, merge: Merge, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A part with rotary positions, which are the same for a whole batch: one picture after another, each with its own.

    A merged token has the position of the one it went into.
    """
    outs = []
    kept = merge.kept
    for i, tokens in enumerate(torch.split(x, 1)):
        text = len(kwargs["image_rotary_emb"][0]) - merge.weights.shape[1]
        index = torch.cat([torch.arange(text, device=x.device), kept[i] + text])
        own = {name: value[i : i + 1] if _of_batch(value, x) else value for name, value in kwargs.items()}
        own["image_rotary_emb"] = tuple(angles[index] for angles in kwargs["image_rotary_emb"])
        outs.append(forward(tokens, *rest, **own))
    if isinstance(outs[0], Tensor):
        return torch.cat(outs)
    return tuple(torch.cat(parts) for parts in zip(*outs))


def _of_batch(value: Any, x: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(x)


def _restored(spot: Spot, merge: Merge, out: Any) -> Any:
    if isinstance(out, Tensor):
        text = out.shape[1] - merge.sizes.shape[1]
        if text == 0:
            return merge.unmerge(out)
        return torch.cat([out[:, :text], merge.unmerge(out[:, text:])], dim=1)
    return tuple(merge.unmerge(part) if i in spot.part.restored else part for i, part in enumerate(out))


def _square(x: Tensor) -> tuple[int, int]:
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        raise ConfigError(f"{x.shape[1]} tokens are no square: give grid=(rows, columns)")
    return side, side


def picture_forward(
    module: nn.Module, plan: DiffusionPlan, inner: Any, method: Any, patch: int, *args: Any, **kwargs: Any
) -> Any:
    """The forward of what holds the blocks, which knows how many rows and columns of tokens there are."""
    forward = functools.partial(method, module) if inner is None else inner
    picture = args[0] if args else kwargs["hidden_states"]
    plan.grid = (picture.shape[-2] // patch, picture.shape[-1] // patch)
    return forward(*args, **kwargs)


def sequence_forward(module: nn.Module, plan: DiffusionPlan, inner: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for FLUX, whose tokens come with the rows and columns where they stand."""
    forward = functools.partial(method, module) if inner is None else inner
    places = kwargs.get("img_ids")
    if places is not None and is_readable(places):
        rows, columns = (places.reshape(-1, places.shape[-1])[:, 1:].amax(dim=0) + 1).long().tolist()
        plan.grid = (rows, columns)
    return forward(*args, **kwargs)
