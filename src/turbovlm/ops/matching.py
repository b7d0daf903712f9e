"""Bipartite matching: the r candidates of highest information degree go, each into its most similar partner."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.ops.backend import fused_kernels, has_bags
from turbovlm.ops.degree import DegreeFunction
from turbovlm.ops.informativity import SHORTEST, candidates_of, degree_of_candidates, mutual_redundancy
from turbovlm.ops.partition import Partition, count, look_up, partition_tokens, positions


@dataclass(frozen=True)
class Merge:
    """Which token went where in one merge of N tokens into M.

    Attributes:
        rows: for each of the batch's tokens, the row of the `batch · M` left that it became part of, `[batch · N]`,
            int64.
        gone: the r tokens of each picture that have no place of their own any more, `[batch, r]`, int64.
        weights: the share of each of the N in its destination, `[batch, N]`; 0 for a token that is dropped.
        sizes: patches that each of the M stands for, `[batch, M]`.
        keep_norm: whether a merged token is as long as its parts are on average, instead of their plain mean.
    """

    rows: Tensor
    gone: Tensor
    weights: Tensor
    sizes: Tensor
    keep_norm: bool = False

    @property
    def source(self) -> Tensor:
        """For each of the N tokens, the token it became part of, `[batch, N]`, int64."""
        return self.rows.view(self.weights.shape) - _first_rows(self.sizes)

    @property
    def kept(self) -> Tensor:
        """For each of the M tokens, the one of the N whose place it took, `[batch, M]`, int64."""
        tokens, left = self.weights.shape[1], self.sizes.numel()
        gone = (self.gone + _first_rows(self.weights)).flatten()
        everyone = torch.arange(len(self.rows), device=self.rows.device)
        spill = self.rows.new_empty(left + 1).scatter(0, self.rows.index_fill(0, gone, left), everyone)
        return spill[:left].view(self.sizes.shape) % tokens

    def merge(self, x: Tensor) -> Tensor:
        """The tokens of `x`, `[batch, N, width]`, averaged by size: `[batch, M, width]` in the same dtype.

        With `keep_norm` each is as long as its parts are on average; a token that nothing joined is bit for bit itself.
        """
        mean = self._gathered(x) if has_bags(x) else self._scattered(x)
        return self._lengthened(x, mean) if self.keep_norm else mean

    def _gathered(self, x: Tensor) -> Tensor:
        """One pass over `x`: each of the M is a bag of weighted rows, and no weighted copy of `x` is made."""
        bag, starts, weights = self._sorted() if torch.compiler.is_compiling() else self._bags
        kernels = fused_kernels(x)
        if kernels is not None and not (x.requires_grad and torch.is_grad_enabled()):
            mean: Tensor = kernels.mean_of_bags(x, bag, starts, weights)
            return mean
        out = F.embedding_bag(bag, x.flatten(0, 1), starts, mode="sum", per_sample_weights=weights.to(x.dtype))
        return out.view(*self.sizes.shape, x.shape[-1])

    @functools.cached_property
    def _bags(self) -> tuple[Tensor, Tensor, Tensor]:
        """`_sorted`, kept for the next tensor that is merged alike."""
        return self._sorted()

    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The `batch · N` rows in the order of what they become, where each of the `batch · M` begins, and weights."""
        row, bag = self.rows.sort(stable=True)
        starts = torch.searchsorted(row, torch.arange(self.sizes.numel(), device=row.device))
        return bag, starts, self.weights.flatten().index_select(0, bag)

    def _scattered(self, x: Tensor) -> Tensor:
        """The same in operators that every backend and exporter has."""
        weighted = (x * self.weights.unsqueeze(-1)).flatten(0, 1)
        out = weighted.new_zeros(self.sizes.numel(), x.shape[-1]).index_add(0, self.rows, weighted)
        return out.view(*self.sizes.shape, x.shape[-1]).to(x.dtype)

    def _lengthened(self, x: Tensor, mean: Tensor) -> Tensor:
        """Each of the M as long as what it is made of, on average by size; a token alone stays as it is."""
        precise = torch.promote_types(x.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(x, dim=-1, dtype=precise) * self.weights.to(precise)
        wanted = lengths.new_zeros(self.sizes.numel()).index_add(0, self.rows, lengths.flatten()).view(self.sizes.shape)
        found = torch.linalg.vector_norm(mean, dim=-1, dtype=precise)
        scale = torch.where(found > SHORTEST, wanted / found.clamp_min(SHORTEST), 1)
        return mean * scale.to(mean.dtype).unsqueeze(-1)

    def lost(self, x: Tensor, merged: Tensor) -> Tensor:
        """What set tokens apart from what they became part of, `[batch, 2r, width]`; see `unmerge`.

        Of the r that are gone, then of those that they went into, each once and zeros for its repetitions.

        Args:
            x: before the merge, `[batch, N, width]`.
            merged: behind it, `[batch, M, width]`.
        """
        gone, stayed, into = self._parted()
        order = torch.arange(len(into), device=into.device)
        last = into.new_zeros(self.sizes.numel()).scatter(0, into, order).index_select(0, into) == order
        before, behind = x.flatten(0, 1), merged.flatten(0, 1).index_select(0, into)
        apart = [before.index_select(0, gone) - behind, (before.index_select(0, stayed) - behind) * last.unsqueeze(1)]
        return torch.cat([each.view(*self.gone.shape, x.shape[-1]) for each in apart], dim=1)

    def unmerge(self, y: Tensor, lost: Tensor | None = None) -> Tensor:
        """Give every one of the N tokens its destination's row of `y`, and what the merge has taken from it.

        Args:
            y: `[batch, M, width]`.
            lost: as `lost` gives it.

        Returns:
            `[batch, N, width]`.
        """
        out = y.flatten(0, 1).index_select(0, self.rows)
        if lost is not None:
            gone, stayed, _ = self._parted()
            of_gone, of_stayed = lost.chunk(2, dim=1)
            out = out.index_add(0, gone, of_gone.flatten(0, 1)).index_add(0, stayed, of_stayed.flatten(0, 1))
        return out.view(*self.weights.shape, y.shape[-1])

    def _parted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the r that are gone and of the tokens that they went into, and their row now, `[batch · r]` each."""
        first = _first_rows(self.weights)
        gone = (self.gone + first).flatten()
        into = self.rows.index_select(0, gone)
        return gone, (self.kept + first).flatten().index_select(0, into), into


def match(
    features: Tensor,
    r: int,
    semantic: Tensor | None = None,
    *,
    sizes: Tensor | None = None,
    prefix: int = 0,
    block: int = 0,
    degree: str | DegreeFunction = "weighted_difference",
    alpha: float | None = None,
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
        block, degree, alpha, partition, grid, order, reduce, seed: as in `TurboConfig`.

    Returns:
        A `Merge` of `tokens` into `tokens − r`.

    Raises:
        ConfigError: A is missing where the degree needs it, or the patches do not fill the grid.
    """
    tokens = features.shape[1]
    split = partition_tokens(tokens, prefix, partition, block=block, seed=seed, grid=grid, device=features.device)
    redundancy, partner = mutual_redundancy(features, split)
    e = degree_of_candidates(redundancy, semantic, split.candidates, block, degree=degree, alpha=alpha, seed=seed)
    if sizes is not None:
        e = padding_first(e, sizes, split)
    limit = count(split.candidates) if partition == "grid" else (tokens - prefix) // 2
    return bipartite_merge(e, partner, split, min(r, limit), tokens, sizes=sizes, order=order, reduce=reduce)


def padding_first(degree: Tensor, sizes: Tensor, partition: Partition) -> Tensor:
    """E, `[batch, candidates]`, but infinite for candidates of size 0, so that padding is merged before all else."""
    return degree.masked_fill(candidates_of(sizes, partition.candidates) == 0, torch.inf)


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
        degree, partner: E, and the index among the partners of each candidate's own, `[batch, candidates]`; where
            there is padding, E as `padding_first` gives it.
        partition: the split that both refer to.
        r: tokens to merge, at most the number of candidates.
        tokens: N, the prefix included.
        sizes: patches each token stands for, `[batch, tokens]`; ones if None.
        order: `"partition"`: prefix, candidates left, partners; or `"spatial"`: the order before.
        reduce: `"merge"`; `"keep_norm"`: as long as the parts are on average; or `"prune"`: the destination keeps its
            own value and size.
    """
    gone, into = _choose(degree, partner, partition, r)
    if sizes is None:
        precise = torch.promote_types(degree.dtype, torch.float32)
        sizes = torch.ones(degree.shape[0], tokens, dtype=precise, device=degree.device)
    return _merge_of(gone, into, partition, sizes, order, reduce)


def merge_tokens(
    x: Tensor,
    degree: Tensor,
    partner: Tensor,
    partition: Partition,
    r: int,
    *,
    sizes: Tensor | None = None,
    order: str = "partition",
    reduce: str = "merge",
) -> tuple[Tensor, Merge]:
    """`bipartite_merge` and its `.merge(x)`, `[batch, tokens, width]`, in one launch where there are kernels for it."""
    kernels = fused_kernels(x)
    if kernels is None or (reduce == "keep_norm" and x.requires_grad and torch.is_grad_enabled()):
        merge = bipartite_merge(degree, partner, partition, r, x.shape[1], sizes=sizes, order=order, reduce=reduce)
        return merge.merge(x), merge
    gone, into = _choose(degree, partner, partition, r)
    layout = None if order == "spatial" else _layout(partition, x)
    merged, rows, weights, merged_sizes = kernels.merge_tokens(x, sizes, gone, into, layout, reduce)
    return merged, Merge(rows, gone, weights, merged_sizes, reduce == "keep_norm")


def _choose(degree: Tensor, partner: Tensor, partition: Partition, r: int) -> tuple[Tensor, Tensor]:
    """The r candidates of highest degree, and the partners that they go into, `[batch, r]` each."""
    kernels = fused_kernels(degree)
    if kernels is not None and degree.shape[1] <= kernels.MOST_RANKED:
        candidates, partners = (positions(index, degree.device) for index in (partition.candidates, partition.partners))
        gone, into = kernels.choose(degree.detach(), partner, candidates, partners, r)
        return gone, into
    chosen = degree.topk(r, dim=1, sorted=False).indices
    return look_up(partition.candidates, chosen), look_up(partition.partners, partner.gather(1, chosen))


def _layout(partition: Partition, x: Tensor) -> Tensor:
    """Where each token lies in prefix, candidates, partners, `[batch, tokens]`."""
    batch, tokens, device = x.shape[0], x.shape[1], x.device
    halves = [positions(index, device).expand(batch, -1) for index in (partition.candidates, partition.partners)]
    prefix = torch.arange(tokens - sum(half.shape[1] for half in halves), device=device).expand(batch, -1)
    return torch.cat([prefix, *halves], dim=1).argsort(dim=1)


def _merge_of(gone: Tensor, into: Tensor, partition: Partition, sizes: Tensor, order: str, reduce: str) -> Merge:
    (batch, tokens), r, first = sizes.shape, gone.shape[1], _first_rows(sizes)
    gone_rows, into_rows = (gone + first).flatten(), (into + first).flatten()
    stays = torch.ones(batch * tokens, dtype=torch.bool, device=gone.device).index_fill_(0, gone_rows, False)
    slots = _slots(stays, partition, batch, r, order)
    rows = slots.index_copy_(0, gone_rows, slots.index_select(0, into_rows))
    counted = sizes.flatten() * stays if reduce == "prune" else sizes.flatten()
    merged_sizes = sizes.new_zeros(batch * (tokens - r)).scatter_add_(0, rows, counted)
    if reduce == "prune":
        weights = stays.to(sizes.dtype)
    else:
        weights = counted / merged_sizes.index_select(0, rows).clamp_min(1e-6)
    return Merge(rows, gone, weights.view(batch, tokens), merged_sizes.view(batch, tokens - r), reduce == "keep_norm")


def _slots(stays: Tensor, partition: Partition, batch: int, r: int, order: str) -> Tensor:
    """The row that each token comes to lie in, `[batch · tokens]`; meaningless for tokens that do not stay."""
    if order == "spatial":
        return stays.cumsum(0).sub_(1)
    candidates = positions(partition.candidates, stays.device).expand(batch, -1)
    partners = positions(partition.partners, stays.device).expand(batch, -1)
    tokens = len(stays) // batch
    prefix = tokens - candidates.shape[1] - partners.shape[1]
    among_candidates = stays.view(batch, tokens).gather(1, candidates).cumsum(1)
    slot = torch.arange(tokens, device=stays.device).expand(batch, -1)
    slot = slot.scatter(1, candidates, prefix + among_candidates - 1)
    behind = prefix + candidates.shape[1] - r + torch.arange(partners.shape[1], device=stays.device)
    slot = slot.scatter(1, partners, behind.expand(batch, -1))
    return (slot + torch.arange(batch, device=stays.device).unsqueeze(1) * (tokens - r)).flatten()


def _first_rows(values: Tensor) -> Tensor:
    """The row at which each picture begins when `values`, `[batch, k]`, is flattened, `[batch, 1]`."""
    batch, length = values.shape
    return torch.arange(0, batch * length, length, device=values.device).unsqueeze(1)
