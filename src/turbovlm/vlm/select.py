"""Which of an image's visual tokens the language model reads, and what the others become.

Works on what the projector returns, `[images, tokens, width]`, one group of equally many tokens at a time. Only
`question`, and a selector of the user's that looks at the text, depend on it; else a prompt's prefix stays valid in
caches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.config import ReadConfig
from turbovlm.errors import ConfigError
from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.degree import needs_semantic
from turbovlm.ops.greedy import PAIRS, Chosen, choose_greedily
from turbovlm.ops.partition import hashed_uniform
from turbovlm.ops.tracing import without_autocast
from turbovlm.read_config import GREEDY
from turbovlm.vlm.question import NO_TEXT, ImageText
from turbovlm.vlm.rounds import choose_by_rounds
from turbovlm.vlm.selection import Selection, average_rest, keep_alone
from turbovlm.vlm.selectors import Grid, ask_selector

TOGETHER = 4096
"""Tokens of an image that are compared with each other at most; of more, parts that follow one another are."""
LEAST_ATTENTION = 1e-4
"""A of every token, relative to the image's mean, counts as at least this."""
ROUNDING = 1e-5
"""How far from each other the cosines of equal tokens may be."""


def kept_count(keep: float | int, tokens: int, name: str = "visual_keep", fewest: int = 0) -> int:
    """How many of an image's `tokens` stay: a share of them, rounded, or a count; at most all, and at least `fewest`.

    Raises:
        ConfigError: that is less than one token; `name` is the setting's.
    """
    wanted = max(keep if isinstance(keep, int) else math.floor(keep * tokens + 0.5), fewest)
    if wanted < 1:
        raise ConfigError(
            f"{name}={keep}: not one of an image's {tokens} visual tokens would be left; "
            f"at least {1 / tokens:.3g} keeps one, and {name}=1 does for every image"
        )
    return min(wanted, tokens)


def needs_attention(config: ReadConfig) -> bool:
    """Whether `select` needs the tower's attention A."""
    if config.visual_keep is None:  # all that is left is read
        return False
    if config.visual_select == "information":
        return needs_semantic(config.degree)
    return config.visual_select == "attention" or config.saliency > 0


def reads_attention(config: ReadConfig) -> bool:
    """Whether `select` needs A, or hands it to a selector of the user's, who may do without."""
    return needs_attention(config) or (config.visual_keep is not None and callable(config.visual_select))


def select(
    features: Tensor,
    semantic: Tensor | None,
    k: int,
    config: ReadConfig,
    sizes: Tensor | None = None,
    text: ImageText = NO_TEXT,
    grid: Grid | None = None,
) -> Selection:
    """Choose `k` of the n tokens of each image.

    `"information"`: rounds of bipartite matching by the information degree (Turbo, equation 12), R from the features
    and A from the tower's attention; `"redundancy"` (E = R) and `"attention"` (E = −A) in the same way. `"random"` and
    `"uniform"` (every n/k-th token) drop the others; `"pooling"` averages cells of 2×2. `"coverage"`, `"diversity"`,
    `"mmr"` and `"dpp"` compare all pairs and take one token after another (`ops.greedy.choose_greedily`), with weights
    w = (A/Ā)^α · e^(question · Q), Ā the image's mean and Q from the prompt's text.

    Args:
        features: `[images, n, width]`.
        semantic: A of every token, `[images, n]`; None where `needs_attention(config)` is false.
        k: tokens left, 1 ≤ k ≤ n.
        config: `visual_select`, `reduce`, `degree`, `alpha`, `question` and `seed` are used.
        sizes: patches that each token stands for, `[images, n]`; ones if None.
        text: what each image's prompt says; none if it is not known here.
        grid: frames, rows and columns of the tokens where they are known, for a selector of the user's.

    Raises:
        ConfigError: `"pooling"` of tokens that are no square grid, or that cells of 2×2 do not bring down to `k`; or
            what a selector of the user's returned names no `k` tokens of each image.
    """
    n = features.shape[1]
    how = config.visual_select
    if not isinstance(how, str):
        kept = ask_selector(how, features, semantic, text.words, grid, k)
        return with_rest(features, kept, config, sizes)
    if how == "uniform":
        middle = (torch.arange(k, device=features.device) + 0.5) * (n / k)
        return keep_alone(middle.long().expand(len(features), -1), n)
    if how == "random":
        return keep_alone(_drawn(features, k, config.seed), n)
    if how == "pooling":
        return _pool(features, k)
    if how not in GREEDY:
        return choose_by_rounds(features, semantic, k, config, sizes)
    if k == n:
        everyone = torch.arange(n, device=features.device).expand(len(features), -1)
        return average_rest(everyone, everyone, sizes)
    weights = log_weights(features, semantic, config, text)
    if n > TOGETHER:
        return _select_in_parts(features, weights, k, config, sizes)
    return _in_order(choose_greedily(features, k, how, weights, sizes), n, config, sizes)


def select_within(
    features: Tensor,
    semantic: Tensor | None,
    fewest: int,
    most: int,
    config: ReadConfig,
    text: ImageText = NO_TEXT,
) -> list[Selection]:
    """Choose as few of the n tokens of each image as leave none farther than `visual_tolerance` from one that stays.

    They are the first ones in the order of `select`; `fewest` at least, and `most` at most, which may leave some
    farther.

    Args:
        features, semantic, config, text: as in `select`; `config.visual_select` is a greedy one.

    Returns:
        A selection for each image.
    """
    assert isinstance(config.visual_select, str) and config.visual_tolerance is not None
    weights = log_weights(features, semantic, config, text)
    until = 1 - config.visual_tolerance - ROUNDING
    chosen = choose_greedily(features, most, config.visual_select, weights, None, until, fewest)
    found = []
    for image, count in enumerate(chosen.counts.tolist()):
        one = slice(image, image + 1)
        alone = Chosen(chosen.order[one, :count], chosen.nearest[one], chosen.counts[one])
        found.append(_in_order(alone, features.shape[1], config, None))
    return found


def log_weights(features: Tensor, semantic: Tensor | None, config: ReadConfig, text: ImageText) -> Tensor | None:
    """log w = α log(A/Ā) + question · Q, `[images, n]`; None where all tokens weigh alike."""
    found: Tensor | None = None
    if config.saliency > 0:
        assert semantic is not None
        share = semantic.to(precise_dtype(semantic)).nan_to_num()
        share = share / share.mean(dim=1, keepdim=True).clamp(min=1e-30)
        found = share.clamp(min=LEAST_ATTENTION).log() * config.saliency
    if config.question > 0:
        asked = text.relevance(features) * config.question
        found = asked if found is None else found + asked
    return found


def _in_order(chosen: Chosen, n: int, config: ReadConfig, sizes: Tensor | None) -> Selection:
    """The chosen tokens in the image's order."""
    kept, place = chosen.order.sort(dim=1)
    if config.reduce == "prune":
        return keep_alone(kept, n)
    slots = torch.arange(kept.shape[1], device=kept.device).expand_as(place)
    slots = torch.empty_like(place).scatter(1, place, slots)  # of each step's token
    return average_rest(kept, slots.gather(1, chosen.nearest), sizes)


def _select_in_parts(
    features: Tensor, weights: Tensor | None, k: int, config: ReadConfig, sizes: Tensor | None
) -> Selection:
    """Choose from parts of an image that follow one another, of `TOGETHER` tokens at most, as large a share of each."""
    assert isinstance(config.visual_select, str)
    n = features.shape[1]
    parts = max(1, min(-(-n // TOGETHER), k // 2))  # so that one token of each stays
    ends = [n * (part + 1) // parts for part in range(parts)]
    read = [k * end // n for end in ends]
    found = []
    for start, end, before, behind in zip([0, *ends], ends, [0, *read], read):
        here = slice(start, end)
        weight, size = (None if each is None else each[:, here] for each in (weights, sizes))
        chosen = choose_greedily(features[:, here], behind - before, config.visual_select, weight, size)
        found.append(_in_order(chosen, end - start, config, size))
    return Selection(
        torch.cat([each.kept + start for each, start in zip(found, [0, *ends])], dim=1),
        torch.cat([each.destination + before for each, before in zip(found, [0, *read])], dim=1),
        torch.cat([each.weights for each in found], dim=1),
    )


def with_rest(features: Tensor, kept: Tensor, config: ReadConfig, sizes: Tensor | None) -> Selection:
    """What becomes of the tokens beside those at `kept`, `[images, k]`."""
    if config.reduce == "prune":
        return keep_alone(kept, features.shape[1])
    x = F.normalize(features.to(precise_dtype(features)), dim=-1).nan_to_num()
    staying = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])).transpose(1, 2)
    at_once = max(1, PAIRS // kept.numel())
    with without_autocast(x.device):
        nearest = torch.cat([(some @ staying).argmax(dim=2) for some in torch.split(x, at_once, dim=1)], dim=1)
    return average_rest(kept, nearest, sizes)


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
