"""Merge before a part of a block, restore behind it (Turbo, §6.2, equation 14).

The merge is decided once for a group of blocks, on what its first part reads, and may hold for several steps.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.diffusion.biasing import biased_attention_on
from turbovlm.diffusion.deciding import decide, fewest, square, twins_of
from turbovlm.diffusion.plan import DiffusionPlan, Spot
from turbovlm.diffusion.restoring import likeness, restore_linear
from turbovlm.diffusion.steps import follow
from turbovlm.errors import ConfigError, StateError, UnsupportedModelError
from turbovlm.ops.attention import size_bias
from turbovlm.ops.merging import Merge
from turbovlm.ops.tracing import is_readable


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
    _check_running(plan, spot)
    x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    text = kwargs.get("encoder_hidden_states", rest[0] if rest else None)
    merge = _merge_of(plan, spot, guide, module, x, text, kwargs.get("attention_mask"))
    if merge is None:
        return forward(x, *rest, **kwargs)
    _check_positions(spot, kwargs)
    front = x.shape[1] - merge.weights.shape[1]
    biased = plan.config.proportional and _takes_bias(spot, module)
    if biased:
        kwargs["attention_mask"] = _size_bias(spot, merge, text, front, x.dtype)
    image = x[:, front:]
    merged = merge.merge(image)
    x = merged if front == 0 else torch.cat([x[:, :front], merged], dim=1)
    try:
        with biased_attention_on(x) if biased else nullcontext():
            if kwargs.get("image_rotary_emb") is not None:
                out = _one_by_one(forward, merge, x, rest, kwargs)
            else:
                out = forward(x, *rest, **kwargs)
    except ValueError as error:
        if biased and "attn_mask" in str(error):
            raise StateError(
                f"{spot.name}: its attention backend takes no mask, in which the sizes of merged tokens would be: give "
                f"proportional=False, or another backend ({error})"
            ) from error
        raise
    restore = plan.config.restore
    if restore == "auto":
        restore = "linear" if x.device.type == "cpu" else "copy"
    if restore == "linear" and spot.part.smooth:
        return restore_linear(merge, image, merged, out)
    return _restored(spot, merge, out, likeness(merge, image, merged) if restore == "weighted" else None)


def _check_running(plan: DiffusionPlan, spot: Spot) -> None:
    """Refuse to go by what an earlier forward has left; but gradient checkpointing runs a part of it once more.

    Raises:
        StateError: no forward of the denoiser is under way that is known of.
    """
    if not plan.running and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1):
        raise StateError(
            f"{spot.name} runs outside of its denoiser's forward, or that was replaced since turbovlm.apply: remove "
            "and apply again"
        )


def _merge_of(
    plan: DiffusionPlan, spot: Spot, guide: Any, part: Any, x: Tensor, text: Any, bias: Tensor | None
) -> Merge | None:
    """The merge of the part's group, decided by the first of it that runs in a forward.

    Raises:
        StateError: some of the latents only.
    """
    if x.shape[0] != plan.batch:
        raise StateError(
            f"{spot.name} was given {x.shape[0]} of {plan.batch} latents: something cuts the batch into chunks, which "
            "cannot be merged"
        )
    held = plan.held.get(spot.merge)
    if spot.merge not in plan.decided or (held is not None and not _fits(held, spot, x)):
        held = decide(plan, spot, guide, part, x, text, bias)
        plan.held[spot.merge] = held
        plan.decided.add(spot.merge)
    return held


def _fits(merge: Merge, spot: Spot, x: Tensor) -> bool:
    """Whether a merge is of as many pictures and tokens as `x`."""
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


def _takes_bias(spot: Spot, attention: Any) -> bool:
    """Whether its keys are merged tokens, and its processor takes a bias on them.

    Those of perturbed attention guidance cut the batch in two, but not the bias.
    """
    cut = type(getattr(attention, "processor", None)).__name__.startswith("PAG")
    return spot.part.bias > 0 and not cut and not getattr(attention, "is_cross_attention", False)


def _size_bias(spot: Spot, merge: Merge, text: Any, front: int, dtype: torch.dtype) -> Tensor:
    """log s of every key, so that a merged token counts as many times as it stands for (equation 16); 0 for words."""
    words = front if text is None else text.shape[1]
    bias = F.pad(size_bias(merge.sizes, dtype), (words, 0))
    return bias if spot.part.bias == bias.ndim else bias.squeeze(1)


def _one_by_one(forward: Any, merge: Merge, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A part with rotary positions, which are the same for a whole batch: one picture after another, each with its own.

    A merged token has the position of the one it went into.
    """
    outs = []
    kept = merge.kept
    for i, tokens in enumerate(torch.split(x, 1)):
        text = len(kwargs["image_rotary_emb"][0]) - merge.weights.shape[1]
        index = torch.cat([torch.arange(text, device=x.device), kept[i] + text])
        own = {name: _of_one(value, i, len(x)) for name, value in kwargs.items()}
        own["image_rotary_emb"] = tuple(angles[index] for angles in kwargs["image_rotary_emb"])
        outs.append(forward(tokens, *rest, **own))
    if isinstance(outs[0], Tensor):
        return torch.cat(outs)
    return tuple(torch.cat(parts) for parts in zip(*outs))


def _of_one(value: Any, index: int, batch: int) -> Any:
    """What belongs to one picture of an argument: of tensors with an entry for each, also in lists."""
    if isinstance(value, Tensor):
        return value[index : index + 1] if value.ndim > 1 and len(value) == batch else value
    return [_of_one(one, index, batch) for one in value] if isinstance(value, list | tuple) else value


def _restored(spot: Spot, merge: Merge, out: Any, share: Tensor | None) -> Any:
    """Every position its token's result, or a `share` of it, `[batch, N, 1]`; the text's as they are."""

    def back(tokens: Tensor) -> Tensor:
        return merge.unmerge(tokens) if share is None else merge.unmerge(tokens) * share.to(tokens.dtype)

    if isinstance(out, Tensor):
        text = out.shape[1] - merge.sizes.shape[1]
        return back(out) if text == 0 else torch.cat([out[:, :text], back(out[:, text:])], dim=1)
    return tuple(back(part) if i in spot.part.restored else part for i, part in enumerate(out))


def denoiser_forward(
    module: nn.Module,
    plan: DiffusionPlan,
    inner: Any,
    method: Any,
    begins: bool,
    patch: int,
    names: tuple[str, ...],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The forward of what knows how tokens lie: a denoiser, or what holds blocks inside it.

    Args:
        begins: whether it is a denoiser, and not what is inside.
        patch: latent pixels a side of a token; 0 where the module is given no picture, or splits it later.
        names: of the arguments.
    """
    forward = functools.partial(method, module) if inner is None else inner
    if not plan.active:
        return forward(*args, **kwargs)
    given: dict[str, Any] = {**dict(zip(names, args)), **kwargs}
    latent = given["sample"] if "sample" in given else given["hidden_states"]
    if not begins:
        plan.grid = latent.shape[-2] // patch, latent.shape[-1] // patch
        return forward(*args, **kwargs)
    _begin(plan, latent)
    try:
        if patch:
            plan.grid = latent.shape[-2] // patch, latent.shape[-1] // patch
        elif given.get("img_ids") is not None:
            plan.grid = _grid_of(given["img_ids"], latent, plan.config.grid)
        plan.finest = math.prod(plan.grid or latent.shape[-2:])
        out = forward(*args, **kwargs)
    except BaseException:
        plan.counting = False  # the run ends here, and its merges with it
        raise
    finally:
        plan.running, plan.thread = False, None
    if not torch.compiler.is_compiling():
        _warn_of_nothing(plan)
    return out


def _begin(plan: DiffusionPlan, latent: Tensor) -> None:
    """A forward of the denoiser: whether it decides anew, and which latents belong together.

    Raises:
        StateError: another thread's forward is under way.
    """
    if not torch.compiler.is_compiling():
        if plan.running and plan.thread != threading.get_ident():
            raise StateError(
                "another thread's forward of this denoiser is under way: let one run at a time, or copy it"
            )
        plan.thread = threading.get_ident()
        follow(plan)
    plan.running, plan.batch = True, len(latent)
    if plan.due or not plan.counting:
        plan.decided.clear()
    plan.due = False
    plan.pairs.clear()
    plan.grid = None
    guided = latent.ndim == 4  # FLUX is guided in forwards of their own
    plan.twins = twins_of(latent) if plan.config.share_guidance and guided and len(latent) > 1 else None


def _grid_of(places: Tensor, latent: Tensor, otherwise: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of FLUX's tokens, which come with the places where they stand, `[tokens, 3]`.

    Where Python may not look at these, `otherwise`, or a square.

    Raises:
        UnsupportedModelError: they are not those of one picture.
        ConfigError: there are not as many as `otherwise` says.
    """
    if not is_readable(places):
        rows, columns = otherwise or square(latent)
        if rows * columns != latent.shape[1]:
            raise ConfigError(f"grid={otherwise}: the picture has {latent.shape[1]} tokens; give its rows and columns")
        return rows, columns
    flat = places.reshape(-1, places.shape[-1])
    rows, columns = (flat.amax(dim=0) - flat.amin(dim=0) + 1).long().tolist()[1:]
    if rows * columns != latent.shape[1] or bool((flat[:, 0] != flat[0, 0]).any()):
        raise UnsupportedModelError(
            f"img_ids place {latent.shape[1]} tokens on {rows}×{columns} positions: not one picture, row by row, so "
            "turbovlm does not know how they lie"
        )
    return rows, columns


def _keeps_all(keep: Any) -> bool:
    return all(share == 1 for share in (keep if isinstance(keep, tuple) else (keep,)))


def _warn_of_nothing(plan: DiffusionPlan) -> None:
    """Where a forward has merged nothing at all, though it should have."""
    tokens = [tokens for tokens, _ in plan.seen.values()]
    if not _keeps_all(plan.config.keep) and tokens and max(tokens) < fewest(plan.config):
        warnings.warn(
            f"turbovlm merges nothing in this denoiser: its blocks read at most {max(tokens)} tokens, and those of "
            f"fewer than {fewest(plan.config)} are left as they are",
            stacklevel=2,
        )
