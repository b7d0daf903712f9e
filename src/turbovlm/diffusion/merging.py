"""Merge before a part of a block, restore behind it (Turbo, §6.2, equation 14).

The merge is decided once for a group of blocks, on what its first part reads, and may hold for several steps.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.diffusion.deciding import decide, fewest, twins_of
from turbovlm.diffusion.plan import DiffusionPlan, Spot
from turbovlm.diffusion.steps import follow
from turbovlm.errors import StateError
from turbovlm.functional.backend import is_readable
from turbovlm.functional.matching import Merge


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
    if not plan.active:
        return forward(*args, **kwargs)
    x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    if spot.leads and (plan.decides or not _fits(plan.held.get(spot.merge), spot, x)):
        text = kwargs.get("encoder_hidden_states", rest[0] if rest else None)
        plan.held[spot.merge] = decide(plan, spot, guide, module, x, text, kwargs.get("attention_mask"))
    merge = _held(plan, spot, x)
    if merge is None:
        return forward(x, *rest, **kwargs)
    if not spot.part.merges:
        return _restored(spot, merge, forward(x, *rest, **kwargs))
    _check_positions(spot, kwargs)
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
    merge = plan.held.get(spot.merge, _NEVER)
    if merge is _NEVER:
        raise StateError(
            f"{spot.name} runs without the block before it that decides what is merged: something skips blocks, such "
            "as a cache between steps; handle.remove() gives the model back"
        )
    if isinstance(merge, Merge) and spot.part.merges and not _fits(merge, spot, x):
        raise StateError(
            f"{spot.name} was given {tuple(x.shape[:2])} of {tuple(merge.weights.shape)} (batch, tokens): something "
            "skips the block that decides what is merged, runs it again, as gradient checkpointing does, or cuts the "
            "tokens into chunks; handle.remove() gives the model back"
        )
    return cast("Merge | None", merge)


_NEVER = object()


def _fits(merge: Merge | None, spot: Spot, x: Tensor) -> bool:
    """Whether a merge is of as many pictures and tokens as `x`."""
    if merge is None:
        return False
    batch, tokens = merge.weights.shape
    return batch == x.shape[0] and (tokens <= x.shape[1] if spot.part.text_in_front else tokens == x.shape[1])


def _check_positions(spot: Spot, kwargs: dict[str, Any]) -> None:
    """Refuse what speaks of the positions that are merged.

    Raises:
        StateError: naming it.
    """
    spoken = "ip_adapter_masks" if spot.part.by_text else "attention_mask"
    if kwargs.get(spoken) is not None:
        raise StateError(
            f"{spot.name} was given {spoken}, which are of the picture's positions, and these are merged: leave "
            f"{spot.part.component!r} out of components"
        )


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


def denoiser_forward(
    module: nn.Module, plan: DiffusionPlan, inner: Any, method: Any, begins: bool, patch: int, *args: Any, **kwargs: Any
) -> Any:
    """The forward of what knows how tokens lie: a denoiser, which `begins` a step, or what holds blocks inside it.

    Args:
        patch: latent pixels a side of a token; 0 where the module is given no picture, or splits it later.
    """
    forward = functools.partial(method, module) if inner is None else inner
    if not plan.active:
        return forward(*args, **kwargs)
    picture: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
    if begins:
        _begin(plan, picture)
    places = kwargs.get("img_ids")
    if patch:
        plan.grid = (picture.shape[-2] // patch, picture.shape[-1] // patch)
    elif places is not None and is_readable(places):
        rows, columns = (places.reshape(-1, places.shape[-1])[:, 1:].amax(dim=0) + 1).long().tolist()
        plan.grid = (rows, columns)
    out = forward(*args, **kwargs)
    if begins and not torch.compiler.is_compiling():
        _warn_of_nothing(plan)
    return out


def _warn_of_nothing(plan: DiffusionPlan) -> None:
    """Where a forward has merged nothing at all, though it should have."""
    tokens = [tokens for tokens, _ in plan.seen.values()]
    if plan.config.keep != 1 and tokens and max(tokens) < fewest(plan.config):
        warnings.warn(
            f"turbovlm merges nothing in this denoiser: its blocks read at most {max(tokens)} tokens, and those of "
            f"fewer than {fewest(plan.config)} are left as they are",
            stacklevel=2,
        )


def _begin(plan: DiffusionPlan, latent: Tensor) -> None:
    """A denoising step: whether it decides anew, and which pictures belong together."""
    if not torch.compiler.is_compiling():
        follow(plan)
    plan.decides, plan.again = not plan.again, False
    plan.pairs = {}
    plan.twins = twins_of(latent) if plan.config.share_guidance and len(latent) > 1 else None
