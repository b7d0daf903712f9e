"""Which of an image's visual tokens the language model reads, and what the others become.

Works on what the projector returns, `[images, tokens, width]`, one group of equally many tokens at a time. Nothing
here depends on the text, so a prompt's prefix stays valid in caches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from turbovlm.config import ReadConfig
from turbovlm.errors import ConfigError
from turbovlm.ops.degree import needs_semantic
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.merging import merge_ranked, rank_candidates
from turbovlm.ops.partition import Partition, hashed_uniform, partition_tokens

ROUND_SHARE = 4
"""A round of matching takes at most one token in so many, so that the best of them are chosen and not whole halves."""


@dataclass(frozen=True)
class Selection:
    """What becomes of the n visual tokens of each image of a group.

    Attributes:
        kept: positions of the k tokens that stay, ascending, `[images, k]`, int64.
        destination: the one of the k that each token is averaged into, `[images, n]`, int64.
        weights: the share of each token in its destination, `[images, n]`; 0 for a token that is dropped.
    """

    kept: Tensor
    destination: Tensor
    weights: Tensor

    def of_image(self, image: int) -> Selection:
        """What becomes of one image's tokens: a group of one."""
        one = slice(image, image + 1)
        return Selection(self.kept[one], self.destination[one], self.weights[one])

    def take(self, x: Tensor) -> Tensor:
        """`[images, n, width]` to `[images, k, width]`: averages where tokens are merged."""
        images, k, width = *self.kept.shape, x.shape[-1]
        index = self.destination.unsqueeze(-1).expand(-1, -1, width)
        precise = torch.promote_types(x.dtype, torch.float32)
        weighted = x.to(precise) * self.weights.unsqueeze(-1).to(precise)
        return weighted.new_zeros(images, k, width).scatter_add(1, index, weighted).to(x.dtype)


def kept_count(keep: float | int, tokens: int, name: str = "visual_keep") -> int:
    """How many of an image's `tokens` stay: a share of them, rounded, or a count; at most all.

    Raises:
        ConfigError: the share is less than one token; `name` is the setting's.
    """
    wanted = keep if isinstance(keep, int) else math.floor(keep * tokens + 0.5)
    if wanted < 1:
        raise ConfigError(
            f"{name}={keep}: not one of an image's {tokens} visual tokens would be left; "
            f"at least {1 / tokens:.3g} keeps one, and {name}=1 does for every image"
        )
    return min(wanted, tokens)


def needs_attention(config: ReadConfig) -> bool:
    """Whether `select` needs the tower's attention A."""
    return config.visual_select == "attention" or (
        config.visual_select == "information" and needs_semantic(config.degree)
    )


def select(
    features: Tensor, semantic: Tensor | None, k: int, config: ReadConfig, sizes: Tensor | None = None
) -> Selection:
    """Choose `k` of the n tokens of each image.

    `"information"`: rounds of bipartite matching by the information degree (Turbo, equation 12), R from the features
    and A from the tower's attention; `"redundancy"` (E = R) and `"attention"` (E = −A) in the same way. `"random"` and
    `"uniform"` (every n/k-th token) drop the others; `"pooling"` averages cells of 2×2.

    Args:
        features: `[images, n, width]`.
        semantic: A of every token, `[images, n]`; None where `needs_attention(config)` is false.
        k: tokens left, 1 ≤ k ≤ n.
        config: `visual_select`, `reduce`, `degree`, `alpha` and `seed` are used.
        sizes: patches that each token stands for, `[images, n]`; ones if None.

    Raises:
        ConfigError: `"pooling"` of tokens that are no square grid, or that cells of 2×2 do not bring down to `k`.
    """
    match config.visual_select:
        case "uniform":
            middle = (torch.arange(k, device=features.device) + 0.5) * (features.shape[1] / k)
            return _drop_all_but(middle.long().expand(len(features), -1), features)
        case "random":
            return _drop_all_but(_drawn(features, k, config.seed), features)
        case "pooling":
            return _pool(features, k)
    return _by_rounds(features, semantic, k, config, sizes)


def _by_rounds(
    features: Tensor, semantic: Tensor | None, k: int, config: ReadConfig, sizes: Tensor | None
) -> Selection:
    degree = {"redundancy": "redundancy", "attention": "semantics"}.get(config.visual_select, config.degree)
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


def _drop_all_but(kept: Tensor, features: Tensor) -> Selection:
    images, n = features.shape[:2]
    slots = torch.arange(kept.shape[1], device=kept.device).expand(images, -1)
    destination = torch.zeros(images, n, dtype=torch.int64, device=kept.device).scatter(1, kept, slots)
    weights = torch.zeros(images, n, device=kept.device).scatter(1, kept, 1.0)
    return Selection(kept, destination, weights)


def _drawn(features: Tensor, k: int, seed: int) -> Tensor:
    """`k` positions drawn from `seed`, ascending; the same for every image, so that beams agree."""
    images, n = features.shape[:2]
    return hashed_uniform(n, seed, 0, features.device).argsort()[:k].sort().values.expand(images, -1)


def _pool(features: Tensor, k: int) -> Selection:
    images, n = features.shape[:2]
    side = math.isqrt(n)
    cells = -(-side // 2)
    if side * side != n or cells * cells != k:
        raise ConfigError(
            f"visual_select='pooling': {n} visual tokens cannot become {k}; cells of 2×2 make "
            f"{cells * cells if side * side == n else 'nothing'} of them"
            + ("" if side * side == n else ", because they are no square")
        )
    place = torch.arange(n, device=features.device)
    row, column = place // side, place % side
    destination = (row // 2) * cells + column // 2
    sizes = torch.bincount(destination, minlength=k)
    first = place[(row % 2 == 0) & (column % 2 == 0)]
    weights = 1.0 / sizes[destination]
    return Selection(*(values.expand(images, -1) for values in (first, destination, weights)))
