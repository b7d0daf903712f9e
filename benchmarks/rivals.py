"""Token merging as others ship it, on the same blocks, to be compared with; and what merging for free would cost.

Each is written for any block that turbovlm has a layout of, so that every model of the benchmark has it. The first two
follow published code in what they compute and in which operators they use:

- `published`: ToMe as released (Bolya et al., ICLR 2023), which is also how the Turbo paper's code runs: attention as
  softmax over a stored N×N map, a full argsort, gathers and scatters with expanded indices, x and sizes merged in turn.
- `with_sdpa`: the same matching, attention through SDPA with the sizes as a mask, x and sizes merged together, as in
  Pruna 0.3.4's `token_merging` (which itself knows one class, `ViTForImageClassification` of older transformers).
- `sliced`: no merging. The last tokens are cut off, which costs nothing: what a schedule's arithmetic takes on this
  machine, the most that any way of merging by that schedule can gain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.encoder.attention import apply_steps, normalised, project_heads
from turbovlm.encoder.towers import Tower, find_towers


def published(r: int) -> Callable[[nn.Module], None]:
    """Prepares a model with ToMe as released."""
    return functools.partial(_install, r=r, attend=_stored_attention, merge=_merge_in_turn)


def with_sdpa(r: int) -> Callable[[nn.Module], None]:
    """Prepares a model with ToMe on SDPA."""
    return functools.partial(_install, r=r, attend=_sdpa, merge=_merge_together)


def sliced(amounts: Sequence[int]) -> Callable[[nn.Module], None]:
    """Prepares a model that drops its last `amounts[l]` tokens in block l."""
    return functools.partial(_install, r=amounts, attend=_sdpa, merge=None)


def _install(model: nn.Module, r: int | Sequence[int], attend: Any, merge: Any) -> None:
    for tower in find_towers(model):
        shared: dict[str, Any] = {"size": None}
        amounts = [r] * len(tower.blocks) if isinstance(r, int) else r
        for index, ((_, block), amount) in enumerate(zip(tower.blocks, amounts, strict=True)):
            block.forward = functools.partial(_forward, block, tower, shared, index, amount, attend, merge)


def _forward(
    block: nn.Module,
    tower: Tower,
    shared: dict[str, Any],
    index: int,
    r: int,
    attend: Any,
    merge: Any,
    hidden: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if index == 0:
        shared["size"] = None
    parts = tower.layout.parts(block)
    q, k, v = project_heads(block, parts, normalised(parts.norm1, hidden))
    x = hidden + apply_steps(parts.after_attention, attend(q, k, v, shared["size"]).transpose(1, 2).flatten(2))
    if merge is None:
        x = x[:, : x.shape[1] - r]
    else:
        x, shared["size"] = merge(_matched(k.mean(dim=1), r, tower.prefix > 0), x, shared["size"])
    x = x + apply_steps(parts.mlp, x)
    return (x,) if tower.layout.returns_tuple else x


def _stored_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if size is not None:
        scores = scores + size.log()[:, None, None, :, 0]
    return scores.softmax(dim=-1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
    mask = None if size is None else size.log()[:, None, None, :, 0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _matched(metric: Tensor, r: int, protect_first: bool) -> Callable[[Tensor], Tensor]:
    """Alternate halves; the r pairs of highest cosine; a function that sums a tensor's rows accordingly."""
    r = min(r, (metric.shape[1] - protect_first) // 2)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    if protect_first:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True)[..., None]
    stay, go = ranked[:, r:], ranked[:, :r]
    into = partner[..., None].gather(dim=1, index=go)
    if protect_first:
        stay = stay.sort(dim=1).values

    def summed(x: Tensor) -> Tensor:
        first, second = x[:, ::2], x[:, 1::2]
        batch, left, width = first.shape[0], first.shape[1] - r, x.shape[-1]
        staying = first.gather(1, stay.expand(batch, left, width))
        going = first.gather(1, go.expand(batch, r, width))
        return torch.cat([staying, second.scatter_reduce(1, into.expand(batch, r, width), going, reduce="sum")], dim=1)

    return summed


def _merge_in_turn(summed: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    size = torch.ones_like(x[..., :1]) if size is None else size
    x, size = summed(x * size), summed(size)
    return x / size, size


def _merge_together(summed: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    size = torch.ones_like(x[..., :1]) if size is None else size
    both = summed(torch.cat([x * size, size], dim=-1))
    return both[..., :-1] / both[..., -1:], both[..., -1:]
