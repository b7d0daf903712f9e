"""One merging block as the paper writes it: the truth that every setting and every fast path is compared with.

One image at a time, float64, no cleverness, and no code of the library. Numbers in brackets are the paper's equations.
N tokens, of which the first `prefix` never merge; H heads of d channels; `s` `[N]` counts the patches that each token
stands for, 0 for padding. The candidates may merge, each into one of the partners; they come as index lists, one
`(candidates, partners)` per window; where both are the same list, any of it may merge into any other. Of equals nothing
is said: tests draw continuous data, which has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Windows = Sequence[tuple[Sequence[int], Sequence[int]]]

DEGREES: dict[str, Callable[..., Tensor]] = {  # E of the candidates, from their R and A, `[candidates]` each
    "weighted_difference": lambda R, A, alpha: R - alpha * A,  # (17), S1
    "coupled_division": lambda R, A, alpha: R / (A + 1e-3),  # (18), S2 with the epsilon of the authors' code
    "damped": lambda R, A, alpha: R * (1 - alpha * A),  # (19), S3
    "redundancy": lambda R, A, alpha: R,  # ToMe
    "semantics": lambda R, A, alpha: -A,
    "weighted_distance": lambda R, A, alpha: -(1 - R) * (1 + alpha * (A / A.mean()).sqrt()),  # ours
}
OWN_ALPHA = {"weighted_distance": 1.0}  # 2 for all others


@dataclass(frozen=True)
class Block:
    """R, partner and E of the candidates, A `[N]`; of the M left, whose place, token, size; the place of each N."""

    candidates: list[int]
    partners: list[int]
    redundancy: Tensor
    semantic: Tensor
    degree: Tensor
    kept: list[int]
    tokens: Tensor
    sizes: Tensor
    source: Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: float) -> Tensor:
    """(16): `softmax(QKᵀ·scale + log s) V` of each head, `[H, N, d]`."""
    return (scale * q @ k.mT + s.log()).softmax(dim=-1) @ v


def guide_of(q: Tensor, s: Tensor, prefix: int, guidance: str) -> Tensor:
    """The query of CLS, or the mean query of the patches that all tokens stand for, `[H, d]`."""
    if guidance == "cls":
        return q[:, 0]
    return sum(s[i] * q[:, i] for i in range(prefix, q.shape[1])) / s[prefix:].sum()


def semantic_value(guide: Tensor, k: Tensor, s: Tensor, scale: float) -> Tensor:
    """(8) with (16): the guide's attention row, the mean of all heads', `[N]`."""
    rows = [(scale * k[h] @ guide[h] + s.log()).softmax(dim=-1) for h in range(len(k))]
    return sum(rows) / len(rows)


def mutual_redundancy(
    features: Tensor, windows: Windows, s: Tensor | None = None
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """(6): `R_i = max_j cos(f_i, f_j)` of each candidate, and the partner j that has it; −1 where there is none.

    Among all pairs nobody is its own partner, nor is padding, of size 0, anybody's where there is anything else.
    """
    unit = features / features.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    R, partner = {}, {}
    for candidates, partners in windows:
        for i in candidates:
            others = partners
            if partners == candidates:
                others = [j for j in partners if j != i and (s is None or s[j] > 0)]
            cosines = [unit[i] @ unit[j] for j in others]
            R[i] = max(cosines, default=-unit.new_ones(()))
            partner[i] = others[cosines.index(R[i])] if cosines else -1
            if not cosines and s is not None and s[i] == 0 and i != partners[0]:
                partner[i] = partners[0]  # nothing but padding, which goes together
    return dict(sorted(R.items())), partner


def paired(E: dict[int, Tensor], partner: dict[int, int], r: int) -> dict[int, int]:
    """Ours: which r tokens go among all pairs, by E, and where each goes.

    Everybody points to its partner; of two that point to each other the one of lower E, or the second of equals, is
    a root. Those an odd number of steps from their root go to their partner; if more must, those an even number of
    steps away that nobody goes to go where their partner went. Padding, of infinite E, goes before all else.
    """

    def steps(i: int) -> int:
        j = partner[i]
        return 0 if j < 0 or (partner[j] == i and (E[i], -i) < (E[j], -j)) else 1 + steps(j)

    go = {i: partner[i] for i in E if steps(i) % 2 == 1}
    follow = {i: go[partner[i]] for i in E if steps(i) % 2 == 0 and steps(i) and i not in go.values()}
    order = sorted({**go, **follow}, key=lambda i: (i in follow and E[i] < torch.inf, -E[i]))
    return {i: {**go, **follow}[i] for i in order[:r]}


def merge(
    x: Tensor, s: Tensor, into: dict[int, int], windows: Windows, order: str, reduce: str
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """(13): whose places stay, tokens that are averaged by size, sizes that are added, and where each of the N went."""
    candidates, partners = (sorted(i for window in windows for i in window[side]) for side in (0, 1))
    prefix = [i for i in range(len(x)) if i not in {*candidates, *partners}]
    kept = [i for i in (*prefix, *candidates, *partners) if i not in into]
    kept = sorted({*kept}) if order == "spatial" or not into else kept  # where nothing merges, nothing moves
    source = [kept.index(into.get(i, i)) for i in range(len(x))]
    tokens, sizes = x[kept].clone(), s[kept].clone()
    for place in range(len(kept)):
        parts = [i for i in range(len(x)) if source[i] == place]
        if reduce == "prune" or (len(parts) == 1 and sizes[place] > 0):
            continue
        sizes[place] = s[parts].sum()
        if sizes[place] == 0:  # padding means nothing; zeros it becomes
            tokens[place] = 0
            continue
        share = s[parts] / sizes[place]
        tokens[place] = share @ x[parts]
        if reduce == "keep_norm":  # as long as its parts are on average
            tokens[place] *= share @ x[parts].norm(dim=-1) / tokens[place].norm()
    return kept, tokens, sizes, torch.tensor(source)


def merging_block(
    x: Tensor,
    features: Tensor,
    q: Tensor,
    k: Tensor,
    s: Tensor,
    *,
    scale: float,
    prefix: int,
    windows: Windows,
    r: int,
    guidance: str = "cls",
    degree: str | Callable[[Tensor, Tensor, int], Tensor] = "weighted_difference",
    alpha: float | None = None,
    merges_before: int = 0,
    order: str = "partition",
    reduce: str = "merge",
    proportional: bool = True,
) -> Block:
    """Between attention and MLP: merge the `r` tokens of `x` `[N, D]` that carry least information (12)."""
    attended = s if proportional else (s > 0).to(s)
    A = semantic_value(guide_of(q, s, prefix, guidance), k, attended, scale)
    redundancy, partner = mutual_redundancy(features, windows, s)
    candidates = list(redundancy)
    R = torch.stack(list(redundancy.values())) if candidates else A[:0]
    if callable(degree):
        E = degree(R[None], A[None, candidates], merges_before)[0]
    else:
        E = DEGREES[degree](R, A[candidates], OWN_ALPHA.get(degree, 2.0) if alpha is None else alpha)
    ranked = E.masked_fill(s[candidates] == 0, torch.inf)  # padding goes before all else
    if windows and windows[0][0] == windows[0][1] and r > 0:
        into = paired(dict(zip(candidates, ranked)), partner, r)
    else:
        into = {candidates[i]: partner[candidates[i]] for i in ranked.argsort(descending=True, stable=True)[:r]}
    merged = merge(x, s, into, windows, order, reduce)
    return Block(candidates, [partner[i] for i in candidates], R, A, ranked, *merged)


def clamped(r: int, tokens: int, prefix: int, min_tokens: int) -> int:
    """At most half of the tokens that may merge, and none in a block that starts with fewer than `min_tokens`."""
    return 0 if tokens < min_tokens else min(r, (tokens - prefix) // 2)


def restored(y: Tensor, blocks: Sequence[tuple[Tensor, Block]], residual: bool) -> Tensor:
    """(14): every position of the input gets its token back, with `residual` also what set it apart at its merge."""
    for x, block in reversed(blocks):
        apart = x - block.tokens[block.source] if residual else 0
        y = y[block.source] + apart
    return y
