"""Rounds of bipartite matching, as in the blocks of an encoder, until so many visual tokens are left."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from turbovlm.config import ReadConfig
from turbovlm.ops.degree import needs_semantic
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.merging import merge_ranked, rank_candidates
from turbovlm.ops.partition import Partition, partition_tokens
from turbovlm.vlm.selection import Selection

ROUND_SHARE = 4
"""A round of matching takes at most one token in so many, so that the best of them are chosen and not whole halves."""
OWN_DEGREES: dict[Any, str] = {"redundancy": "redundancy", "attention": "semantics"}
"""Degrees of selections that have their own."""


def choose_by_rounds(
    features: Tensor, semantic: Tensor | None, k: int, config: ReadConfig, sizes: Tensor | None
) -> Selection:
    """Choose `k` tokens of each image by rounds of bipartite matching: see `select`, whose arguments these are."""
    degree = OWN_DEGREES.get(config.visual_select, config.degree)
    x, path, device, seed = features, path_for(features), features.device, config.seed
    counts = _counts(features.shape[1], k)
    splits = [partition_tokens(n, kind="random", block=i, seed=seed, device=device) for i, n in enumerate(counts[:-1])]
    everyone = torch.arange(counts[0], device=device).expand(features.shape[:2])
    chosen = Selection(everyone, everyone, torch.ones(features.shape[:2], device=device))
    padded = sizes is not None  # a token of size 0 is padding; merging makes none
    for turn, (split, (tokens, left)) in enumerate(zip(splits, pairwise(counts))):
        if tokens == 2 and semantic is not None and needs_semantic(degree):  # halves of one leave E no choice
            lower = semantic.argmin(dim=1, keepdim=True)
            split = Partition(lower, 1 - lower)
        ranking = rank_candidates(
            x,
            split,
            semantic,
            turn,
            degree=degree,
            alpha=config.alpha,
            seed=seed,
            sizes=sizes if padded else None,
            path=path,
        )
        found, x = merge_ranked(
            ranking, tokens - left, x, sizes=sizes, order="spatial", reduce=config.reduce, path=path
        )
        sizes = found.sizes
        if semantic is not None:
            counted = semantic * found.weights if config.reduce == "prune" else semantic
            sums = counted.new_zeros(sizes.numel(), dtype=sizes.dtype)
            semantic = sums.scatter_add(0, found.rows, counted.flatten().to(sizes)).view(sizes.shape)
        shares = found.weights.gather(1, chosen.destination).to(chosen.weights)
        chosen = Selection(
            chosen.kept.gather(1, found.kept), found.source.gather(1, chosen.destination), chosen.weights * shares
        )
    return chosen


def _counts(tokens: int, k: int) -> list[int]:
    """How many tokens there are before each round, and k at the end."""
    counts = [tokens]
    while counts[-1] > k:
        counts.append(max(k, counts[-1] - max(1, counts[-1] // ROUND_SHARE)))
    return counts
