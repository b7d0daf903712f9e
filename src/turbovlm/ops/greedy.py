"""Tokens chosen one after another, each for what it adds to those chosen before, over all pairs of tokens.

The cosines of all pairs are made once. A step then looks at few of them: what a token adds changes only through the
tokens that the latest choice has come closer to, and these become fewer from step to step.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.tracing import is_exporting, is_readable, without_autocast

LEAST_GAIN = 1e-3
"""Coverage that every token is taken to add at least, so that weights order those that add nothing."""
RIDGE = 1e-3
"""Added to every token's cosine with itself in the determinant, which more tokens than directions would make 0."""
LEAST_LEFT = 3 * RIDGE
"""Of a token's cosine with itself, what is taken to be left of it at least: of a copy of a chosen one, 2 RIDGE is."""
LAST = -1e30
"""Log weight of padding, which comes behind all tokens."""
TIE = 1e-3
"""How much less than the best counts as much: of a logarithm, for `"coverage"` and `"dpp"`, else of a cosine."""
PAIRS = 1 << 26
"""Pairs of tokens whose cosines are held together, 256 MB of them; images beyond that follow one another."""


class Chosen(NamedTuple):
    """Tokens of each image in the order in which they were chosen.

    Attributes:
        order: positions, `[images, k]`, int64.
        nearest: for each token, which of the chosen it is most similar to, as an index of `order`, `[images, n]`.
        counts: how many of `order` each image needs, `[images]`; k without a tolerance.
    """

    order: Tensor
    nearest: Tensor
    counts: Tensor


@torch.no_grad()
def choose_greedily(
    features: Tensor,
    k: int,
    by: str,
    log_weights: Tensor | None = None,
    sizes: Tensor | None = None,
    until: float | None = None,
    fewest: int = 1,
) -> Chosen:
    """Choose tokens of each image greedily; of equals, the first.

    w is a token's weight, C the tokens chosen so far, and cos the cosine of features. A step takes the token that has
    most of what follows, and of all that come within `TIE` of it the first, so that rounding does not decide between
    copies of a token: `"coverage"` and `"dpp"` are compared by their logarithms, the others as they stand.

    - `"coverage"`: w · Σ_u s_u [cos(u, ·) − max_{c ∈ C ∪ 0} cos(u, c)]₊, what it adds to how well all tokens u, of
      size s, are covered by the most similar chosen one (facility location; SCOPE has w = A^α);
    - `"diversity"`: 1 − max_{c ∈ C} cos(·, c), its distance to the nearest chosen one; the first is the token that is
      farthest from its own nearest (max–min diversity, DivPrune);
    - `"mmr"`: log w − max_{c ∈ C} cos(·, c) (maximal marginal relevance);
    - `"dpp"`: det L_{C ∪ ·} / det L_C with L_ij = √w_i (cos(i, j) + RIDGE · [i = j]) √w_j (a determinantal point
      process, greedily as CDPruner's, by one row of its Cholesky factor each).

    Args:
        features: `[images, n, width]`.
        k: tokens to choose at most, 1 ≤ k ≤ n.
        by: one of the four.
        log_weights: log w, `[images, n]`; zeros if None. `"diversity"` has none.
        sizes: `[images, n]`; ones if None. Tokens of size 0 are padding: they come last and need no cover.
        until: an image needs no more tokens once the cosine of every token to a chosen one is at least this.
        fewest: tokens that it needs even then.
    """
    x = features.to(precise_dtype(features))
    x = F.normalize(x, dim=-1).nan_to_num()
    images, n = x.shape[:2]
    sizes = x.new_ones(images, n) if sizes is None else sizes.to(x)
    weights = x.new_zeros(images, n) if log_weights is None else log_weights.to(x)
    at_once = max(1, PAIRS // (n * n))
    found = []
    for some, size, weight in zip(*(torch.split(each, at_once) for each in (x, sizes, weights))):
        with without_autocast(x.device):
            cosines = some @ some.transpose(1, 2)
        looks = is_readable(cosines) and not is_exporting()
        take = take_in_turn if looks else choose_in_turn  # the operator's first call takes seconds, of imports
        found.append(take(cosines, weight, size, k, by, until, fewest))
    return Chosen(*(torch.cat(parts) for parts in zip(*found)))


def take_in_turn(
    cosines: Tensor, log_weights: Tensor, sizes: Tensor, k: int, by: str, until: float | None, fewest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`choose_greedily` of the cosines of all pairs, `[images, n, n]`: the three parts of `Chosen`."""
    padding = sizes <= 0
    weights = log_weights.nan_to_num(nan=LAST, neginf=LAST).masked_fill(padding, LAST)  # -inf: what is taken
    state = STATES[by](cosines, sizes, k)
    if cosines.is_cuda:
        from turbovlm.ops import kernels  # imports triton

        if kernels.usable(cosines) and cosines.dtype == torch.float32 and cosines.shape[1] <= kernels.MOST_TAKEN_FROM:
            steps = (k, by, until, fewest, state.least or 0.0, TIE, RIDGE)
            return kernels.take_in_turn(cosines, weights, sizes, state.value, *steps)
    images, n = log_weights.shape
    image = torch.arange(images, device=cosines.device)
    closest = torch.full_like(log_weights, -torch.inf)
    order = torch.zeros(images, k, dtype=torch.int64, device=cosines.device)
    nearest = torch.zeros(images, n, dtype=torch.int64, device=cosines.device)
    counts = torch.full_like(image, k)
    done = torch.zeros_like(image, dtype=torch.bool)
    for step in range(k):
        adds = state.value if state.least is None else state.value.clamp(min=state.least).log()
        score = weights + adds
        token = (score >= score.amax(dim=1, keepdim=True) - TIE).int().argmax(dim=1)
        order[:, step] = token
        row = cosines[image, token]
        nearest = torch.where((row > closest) & ~done.unsqueeze(1), step, nearest)
        weights[image, token] = -torch.inf
        after = torch.maximum(closest, row)
        state.take(step, token, row, closest, after)
        closest = after
        if until is not None and step + 1 >= fewest:
            reached = closest.masked_fill(padding, torch.inf).amin(dim=1) >= until
            counts = torch.where(reached & ~done, step + 1, counts)
            done = done | reached
            if bool(done.all()):
                break
    return order, nearest, counts


@torch.library.custom_op("turbovlm::choose_in_turn", mutates_args=())
def choose_in_turn(
    cosines: Tensor, log_weights: Tensor, sizes: Tensor, k: int, by: str, until: float | None, fewest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`take_in_turn`, as an operator that compilers and tracers do not look into."""
    return take_in_turn(cosines, log_weights, sizes, k, by, until, fewest)


@choose_in_turn.register_fake
def _(
    cosines: Tensor, log_weights: Tensor, sizes: Tensor, k: int, by: str, until: float | None, fewest: int
) -> tuple[Tensor, Tensor, Tensor]:
    images, n = log_weights.shape
    order = torch.empty(images, k, dtype=torch.int64, device=cosines.device)
    return order, order.new_empty(images, n), order.new_empty(images)


class _State(Protocol):
    """What is kept from step to step.

    Attributes:
        least: of a token's value whose logarithm counts; None where the value itself does.
        value: what each token would add, `[images, n]`.
    """

    least: float | None
    value: Tensor

    def __init__(self, cosines: Tensor, sizes: Tensor, k: int) -> None: ...

    def take(self, step: int, token: Tensor, row: Tensor, before: Tensor, after: Tensor) -> None:
        """Take a token of each image.

        Args:
            step: how many were taken before.
            token: its position, `[images]`.
            row: its cosines to all, `[images, n]`.
            before, after: the highest cosine of each token to one that is taken, without it and with it.
        """


class _Coverage:
    """What each token adds to the cover of all."""

    least: float | None = LEAST_GAIN

    def __init__(self, cosines: Tensor, sizes: Tensor, k: int) -> None:
        self.cosines, self.sizes = cosines, sizes
        precise = torch.float32 if cosines.device.type == "mps" else torch.float64  # mps has no other
        self.value = (cosines.clamp(min=0) * sizes.unsqueeze(2)).sum(dim=1, dtype=precise)

    def take(self, step: int, token: Tensor, row: Tensor, before: Tensor, after: Tensor) -> None:
        """Lower the values by what this token has covered of the tokens that it is closest to."""
        covered = before.clamp(min=0)
        rise = after.clamp(min=0) - covered
        most = int((rise > 0).sum(dim=1).max())  # tokens beyond an image's own rise by 0
        where = rise.topk(most, dim=1).indices
        images, n = rise.shape
        first = torch.arange(0, images * n, n, device=where.device).unsqueeze(1)
        rows = self.cosines.flatten(0, 1).index_select(0, (where + first).flatten()).view(images, most, n)
        rises = rise.gather(1, where).unsqueeze(2)
        lost = rows.sub_(covered.gather(1, where).unsqueeze(2)).clamp_(min=0).minimum(rises)
        lost *= self.sizes.gather(1, where).unsqueeze(2)
        self.value -= lost.sum(dim=1, dtype=self.value.dtype)


class _Apart:
    """How far each token is from the chosen ones: minus its highest cosine to one."""

    least: float | None = None

    def __init__(self, cosines: Tensor, sizes: Tensor, k: int) -> None:
        self.value = torch.zeros_like(sizes)

    def take(self, step: int, token: Tensor, row: Tensor, before: Tensor, after: Tensor) -> None:
        self.value = -after


class _Diverse(_Apart):
    """The same, beginning with the token that is farthest from its nearest."""

    def __init__(self, cosines: Tensor, sizes: Tensor, k: int) -> None:
        others = cosines.masked_fill(torch.eye(cosines.shape[1], dtype=torch.bool, device=cosines.device), -torch.inf)
        self.value = -others.amax(dim=2)


class _Determinant:
    """How much of each token no chosen one explains."""

    least: float | None = LEAST_LEFT

    def __init__(self, cosines: Tensor, sizes: Tensor, k: int) -> None:
        self.rows = cosines.new_empty(len(cosines), k, cosines.shape[1])  # of the cosines' Cholesky factor
        self.value = torch.diagonal(cosines, dim1=1, dim2=2) + RIDGE

    def take(self, step: int, token: Tensor, row: Tensor, before: Tensor, after: Tensor) -> None:
        place = token.unsqueeze(1)
        known = self.rows[:, :step]
        own = known.gather(2, place.unsqueeze(1).expand(-1, step, 1))
        explained = (own.transpose(1, 2) @ known).squeeze(1)
        length = self.value.gather(1, place).clamp(min=RIDGE).sqrt()
        new = (row - explained) / length
        new.scatter_(1, place, length)
        self.rows[:, step] = new
        self.value = self.value - new.square()


STATES: dict[str, type[_State]] = {"coverage": _Coverage, "diversity": _Diverse, "mmr": _Apart, "dpp": _Determinant}
"""By name of what they go by."""
