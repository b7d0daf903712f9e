"""Which tokens of a picture are merged: R from their features, A from the image's own attention or the text's.

One token in every 2×2 cell is a destination, so what is restored is never far from its place.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.diffusion.plan import DiffusionPlan, Pairs, Spot
from turbovlm.errors import ConfigError, StateError
from turbovlm.ops.degree import needs_semantic
from turbovlm.ops.merging import Merge, Ranking, degree_of_candidates, merge_ranked, mutual_redundancy
from turbovlm.ops.partition import partition_tokens

FEWEST = 64
"""Tokens below which nothing is merged, unless `min_tokens` asks for more."""

BAND = 4096
"""Larger pictures are cut into bands of about as many tokens, from top to bottom, and merged within them: to compare
all tokens with all would cost their square."""


def fewest(config: TurboConfig) -> int:
    """Tokens below which nothing is merged."""
    return max(config.min_tokens, FEWEST)


@torch.no_grad()
def decide(
    plan: DiffusionPlan, spot: Spot, guide: Any, part: Any, x: Tensor, text: Any, bias: Tensor | None
) -> Merge | None:
    """Which tokens of `x`, `[batch, tokens, width]`, are merged, text in front left out; None where there are too few.

    Args:
        plan, spot: of the part that reads `x`.
        guide: the block's self-attention.
        part: the part itself.
        text: what it attends to, `[batch, words, width]`, where it does; the first, where there are several.
        bias: added to the attention's logits, `[batch, 1, words]`: words of −10,000 are padding.

    Raises:
        ConfigError: the tokens fill no grid that is known.
        StateError: only some of them were given.
    """
    config = plan.config
    rows, columns = plan.grid or square(x)
    tokens = rows * columns
    if x.shape[1] != tokens and not spot.part.text_in_front:
        raise StateError(
            f"{spot.name} was given {x.shape[1]} of {tokens} tokens: something cuts them into chunks, which cannot be "
            "merged"
        )
    features = x[:, x.shape[1] - tokens :]
    r = tokens - max(math.floor(_share(plan, tokens) * tokens + 0.5), -(-rows // 2) * -(-columns // 2))
    if tokens < fewest(config):
        r = 0
    if not torch.compiler.is_compiling():
        plan.seen[spot.group] = tokens, tokens - r
    if r == 0:
        return None
    if spot.group not in plan.pairs:
        split = partition_tokens(tokens, kind="grid", grid=(rows, columns), device=x.device)
        split = replace(split, windows=max(1, tokens // BAND))
        plan.pairs[spot.group] = Pairs(split, *mutual_redundancy(_shared(plan, features), split))
    pairs = plan.pairs[spot.group]
    semantic = None
    if needs_semantic(config.degree):
        if text is not None and getattr(part, "is_cross_attention", False):
            semantic = text_attention(part, features, text, bias)
        elif getattr(guide, "is_cross_attention", False):  # a block without self-attention: nothing says what matters
            semantic = features.new_zeros(features.shape[:2])
        else:
            semantic = mean_attention(guide, features)
        semantic = _shared(plan, semantic)
    e = degree_of_candidates(
        pairs.redundancy,
        semantic,
        pairs.split.candidates,
        spot.index,
        degree=config.degree,
        alpha=config.alpha,
        seed=config.seed,
    )
    ranking = Ranking(pairs.split, tokens, pairs.redundancy, pairs.nearest, e)
    return merge_ranked(ranking, r, order="spatial", reduce=config.reduce)[0]


def _share(plan: DiffusionPlan, tokens: int) -> float:
    """Of `tokens` tokens, what blocks read: by how often the picture's rows were halved, where resolutions differ."""
    keep = plan.config.keep
    if isinstance(keep, tuple):
        halved = round(math.log(plan.finest / tokens, 4))
        return float(keep[min(halved, len(keep) - 1)])
    assert isinstance(keep, float)
    return keep


def twins_of(latents: Tensor) -> Tensor:
    """For each latent of a batch, the share of each that is the same one, `[batch, batch]`; rows sum to 1.

    Both halves of classifier-free guidance denoise one latent, and so do the thirds of some other kinds. This tells
    which belong together without asking the pipeline; other latents are never taken for the same.
    """
    flat, batch = latents.flatten(1), len(latents)
    place = torch.arange(batch, device=flat.device)
    apart = place.unsqueeze(0) - place.unsqueeze(1)
    alike = (flat.unsqueeze(0) == flat.unsqueeze(1)).all(dim=-1)
    halves, thirds = (apart % (batch // count) == 0 if batch % count == 0 else apart == 0 for count in (2, 3))
    if batch % 6 == 0:  # three prompts in halves, or two in thirds
        halves = torch.where((alike | ~halves).all(), halves, thirds)
    elif batch % 3 == 0:
        halves = thirds
    same = alike & halves | (apart == 0)
    return same / same.sum(dim=-1, keepdim=True)


def _shared(plan: DiffusionPlan, x: Tensor) -> Tensor:
    """The average over pictures with the same latent: `[batch, …]`."""
    if plan.twins is None:
        return x
    finite = x.flatten(1).nan_to_num()  # of one picture that is not, nothing gets into the others
    return (plan.twins.to(x.dtype) @ finite).view_as(x)


def mean_attention(attention: Any, x: Tensor) -> Tensor:
    """A: the attention that the mean query pays to each token of `x`, `[batch, tokens]`, sums to 1."""
    query = attention.to_q(x.mean(dim=1, keepdim=True)).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    norms = getattr(attention, "norm_q", None), getattr(attention, "norm_k", None)
    return _attention_row(attention.to_k, norms[1], query if norms[0] is None else norms[0](query), x)


def text_attention(attention: Any, x: Tensor, text: Any, bias: Tensor | None) -> Tensor:
    """A: the attention that the mean word pays to each token of `x`, `[batch, tokens]`, sums to 1.

    The image's tokens ask and the words answer in cross-attention; here their product is read the other way round.
    """
    words = text[0] if isinstance(text, tuple | list) else text
    if bias is None:
        word = words.mean(dim=1, keepdim=True)
    else:
        word = torch.matmul(bias.reshape(len(words), 1, -1).softmax(dim=-1).to(words.dtype), words)
    key = attention.to_k(word).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    norms = getattr(attention, "norm_q", None), getattr(attention, "norm_k", None)
    return _attention_row(attention.to_q, norms[0], key if norms[1] is None else norms[1](key), x)


def _attention_row(project: Any, norm: Any, guide: Tensor, x: Tensor) -> Tensor:
    """The attention of `guide`, `[batch, heads, 1, head_dim]`, to the projected tokens of `x`, averaged over heads.

    A projection is linear in the tokens, so it is not made of all of them: its product with the guide is that of the
    token with one vector per head. Unless there is more to it: a norm, LoRA, or weights that are elsewhere, or in
    another dtype, until it is called.
    """
    heads, width = guide.shape[1], guide.shape[-1]
    guide = guide * width**-0.5
    if norm is None and type(project) is nn.Linear and "forward" not in project.__dict__ and _is_plain(project.weight):
        along = torch.einsum("bhqd,hdc->bhc", guide, project.weight.view(heads, width, -1))
        scores = torch.matmul(x, along.transpose(1, 2))
    else:
        made = project(x).unflatten(-1, (heads, width))
        made = made if norm is None else norm(made.transpose(1, 2)).transpose(1, 2)
        scores = (made * guide.transpose(1, 2)).sum(dim=-1)
    return scores.float().softmax(dim=1).mean(dim=2)


def _is_plain(weight: Tensor) -> bool:
    """Whether it is a tensor of PyTorch's own, not one that a quantiser or FSDP has put there."""
    return type(weight) is nn.Parameter


def square(x: Tensor) -> tuple[int, int]:
    """Rows and columns of as many tokens as `x` has, `[batch, tokens, width]`, where nothing else tells.

    Raises:
        ConfigError: they are no square.
    """
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        raise ConfigError(f"{x.shape[1]} tokens are no square: give grid=(rows, columns)")
    return side, side
