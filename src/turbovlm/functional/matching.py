"""Bipartite matching: the r candidates of highest information degree go, each into its most similar partner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turbovlm.config import DegreeFunction
from turbovlm.functional.informativity import candidates_of, information_degree, mutual_redundancy
from turbovlm.functional.partition import Partition, count, partition_tokens, positions


@dataclass(frozen=True)
class Merge:
    """Which token went where in one merge of N tokens into M.

    Attributes:
        source: for each of the N tokens, the token it became part of, `[batch, N]`, int64.
        kept: for each of the M tokens, the one of the N whose place it took, `[batch, M]`, int64.
        weights: the share of each of the N in its destination, `[batch, N]`; 0 for a token that is dropped.
        sizes: patches that each of the M stands for, `[batch, M]`.
    """

    source: Tensor
    kept: Tensor
    weights: Tensor
    sizes: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """Average the tokens of `x`, `[batch, N, width]`, by size: `[batch, M, width]` in the same dtype."""
        batch, _, width = x.shape
        merged = self.sizes.shape[1]
        weighted = (x * self.weights.unsqueeze(-1)).flatten(0, 1)
        rows = _flat(self.source, merged)
        out = weighted.new_zeros(batch * merged, width).index_add(0, rows, weighted)
        return out.view(batch, merged, width).to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        """Give every one of the N tokens its destination's row of `y`: `[batch, M, width]` to `[batch, N, width]`."""
        rows = y.flatten(0, 1).index_select(0, _flat(self.source, y.shape[1]))
        return rows.view(*self.source.shape, y.shape[-1])


def match(
    features: Tensor,
    r: int,
    semantic: Tensor | None = None,
    *,
    sizes: Tensor | None = None,
    prefix: int = 0,
    block: int = 0,
    degree: str | DegreeFunction = "weighted_difference",
    alpha: float = 2.0,
    beta: float = 1.0,
    gamma: float = 0.0,
    partition: str = "alternate",
    grid: tuple[int, int] | None = None,
    order: str = "partition",
    reduce: str = "merge",
    seed: int = 0,
) -> Merge:
    """Choose the `r` tokens that carry least information and the partners they are merged into (Turbo, §6.1).

    Args:
        features: what is compared, `[batch, tokens, width]`: keys averaged over heads in the paper.
        r: tokens to merge, clamped to the number of candidates and to `(tokens − prefix) // 2` for halves.
        semantic: A of every token, `[batch, tokens]`; not needed for `"redundancy"` and `"random"`.
        sizes: patches each token stands for, `[batch, tokens]`; ones if None.
        prefix: tokens at the front (CLS, distillation, registers) that never merge.
        block, degree, alpha, beta, gamma, partition, grid, order, reduce, seed: as in `TurboConfig`.

    Returns:
        A `Merge` of `tokens` into `tokens − r`.

    Raises:
        ConfigError: A is missing where the degree needs it, or the patches do not fill the grid.
    """
    tokens = features.shape[1]
    split = partition_tokens(tokens, prefix, partition, block=block, seed=seed, grid=grid, device=features.device)
    redundancy, partner = mutual_redundancy(features, split)
    candidate_semantic = None if semantic is None else candidates_of(semantic, split.candidates)
    e = information_degree(
        redundancy, candidate_semantic, block, degree=degree, alpha=alpha, beta=beta, gamma=gamma, seed=seed
    )
    limit = count(split.candidates) if partition == "grid" else (tokens - prefix) // 2
    return bipartite_merge(e, partner, split, min(r, limit), tokens, sizes=sizes, order=order, reduce=reduce)


def bipartite_merge(
    degree: Tensor,
    partner: Tensor,
    partition: Partition,
    r: int,
    tokens: int,
    *,
    sizes: Tensor | None = None,
    order: str = "partition",
    reduce: str = "merge",
) -> Merge:
    """Merge the `r` candidates of highest `degree` into their partners.

    Args:
        degree, partner: E, and the index among the partners of each candidate's own, `[batch, candidates]`.
        partition: the split that both refer to.
        r: tokens to merge, at most the number of candidates.
        tokens: N, the prefix included.
        sizes: patches each token stands for, `[batch, tokens]`; ones if None. Tokens of size 0 (padding) go first.
        order: `"partition"`: prefix, candidates left, partners; or `"spatial"`: the order before.
        reduce: `"merge"`, or `"prune"`: the destination keeps its own value and size.
    """
    device, batch = degree.device, degree.shape[0]
    candidates = positions(partition.candidates, device).expand(batch, -1)
    partners = positions(partition.partners, device).expand(batch, -1)
    if sizes is None:
        sizes = torch.ones(batch, tokens, dtype=torch.promote_types(degree.dtype, torch.float32), device=device)
    else:
        degree = degree.masked_fill(sizes.gather(1, candidates) == 0, torch.inf)
    chosen = degree.topk(r, dim=1, sorted=False).indices
    gone, into = candidates.gather(1, chosen), partners.gather(1, partner.gather(1, chosen))

    stays = torch.ones(batch, tokens, dtype=torch.bool, device=device).scatter(1, gone, False)
    slot = _slots(stays, candidates, partners, r, order)
    left = tokens - r
    source = slot.scatter(1, gone, slot.gather(1, into))
    spill = torch.where(stays, slot, left)
    everyone = torch.arange(tokens, device=device).expand(batch, -1)
    kept = torch.empty(batch, left + 1, dtype=torch.int64, device=device).scatter(1, spill, everyone)[:, :left]
    if reduce == "prune":
        return Merge(source, kept, stays.to(sizes.dtype), sizes.gather(1, kept))
    merged_sizes = torch.zeros(batch, left, dtype=sizes.dtype, device=device).scatter_add(1, source, sizes)
    weights = sizes / merged_sizes.gather(1, source).clamp_min(1e-6)
    return Merge(source, kept, weights, merged_sizes)


def _slots(stays: Tensor, candidates: Tensor, partners: Tensor, r: int, order: str) -> Tensor:
    """Where each token that stays comes to lie, `[batch, tokens]`; meaningless for the others."""
    if order == "spatial":
        return stays.long().cumsum(1) - 1
    prefix = stays.shape[1] - candidates.shape[1] - partners.shape[1]
    among_candidates = stays.gather(1, candidates).long().cumsum(1)
    slot = torch.arange(stays.shape[1], device=stays.device).expand(stays.shape[0], -1)
    slot = slot.scatter(1, candidates, prefix + among_candidates - 1)
    behind = prefix + candidates.shape[1] - r + torch.arange(partners.shape[1], device=stays.device)
    return slot.scatter(1, partners, behind.expand(partners.shape[0], -1))


def _flat(index: Tensor, rows: int) -> Tensor:
    """`[batch, k]` row numbers per picture as one list into the flattened batch."""
    return (index + torch.arange(index.shape[0], device=index.device).unsqueeze(1) * rows).flatten()
