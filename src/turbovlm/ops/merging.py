"""Bipartite merging: the r candidates of highest information degree go, each into its most similar destination."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import overload

import torch
from torch import Tensor

from turbovlm.errors import ConfigError
from turbovlm.ops import averaging, plain
from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.degree import DegreeFunction
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.pairs import same_for_both
from turbovlm.ops.partition import Partition, partition_tokens, published_order
from turbovlm.ops.plain import row_offsets


@dataclass(frozen=True)
class Ranking:
    """The candidates of one merge, compared and ranked.

    Attributes:
        partition: who may be merged into whom.
        tokens: N, the prefix included.
        redundancy: R of the candidates, `[batch, candidates]`.
        nearest: the index among the destinations of each one's most similar, `[batch, candidates]`, int64.
        degree: E, `[batch, candidates]`; infinite for padding, which is merged before all else.
        chosen: the tokens that go and their destinations, where their number was known.
    """

    partition: Partition
    tokens: int
    redundancy: Tensor
    nearest: Tensor
    degree: Tensor
    chosen: plain.Chosen | None = None


@dataclass(frozen=True)
class Merge:
    """Which token went where in one merge of N tokens into M = N − r.

    Attributes:
        rows: for each of the batch's tokens, the row of the `batch · M` left that it became part of, `[batch · N]`,
            int64.
        src: the r tokens of each image that were merged into another or dropped, `[batch, r]`, int64.
        weights: the share of each of the N in its destination, `[batch, N]`; 0 for a token that is dropped.
        sizes: patches that each of the M stands for, `[batch, M]`.
        keep_norm: whether a merged token is as long as its parts are on average, instead of their plain mean.
        bags: the tokens sorted by their rows, once for all calls of `merge`, where `merge_ranked` had no tokens yet;
            None where the backend does not sort.
        logs: `log_sizes` of `sizes`, `[batch, M]`, where they came with the merged tokens.
    """

    rows: Tensor
    src: Tensor
    weights: Tensor
    sizes: Tensor
    keep_norm: bool = False
    bags: averaging.Bags | None = None
    logs: Tensor | None = None

    @property
    def source(self) -> Tensor:
        """For each of the N tokens, the token it became part of, `[batch, N]`, int64."""
        return self.rows.view(self.weights.shape) % self.sizes.shape[1]

    @property
    def kept(self) -> Tensor:
        """For each of the M tokens, the one of the N whose place it took, `[batch, M]`, int64."""
        tokens, left = self.weights.shape[1], self.sizes.numel()
        everyone = torch.arange(len(self.rows), device=self.rows.device)
        src_rows = (self.src + everyone.view(self.weights.shape)[:, :1]).flatten()
        # every token writes its number into its row, merged ones into an additional row that is cut off
        written = self.rows.new_empty(left + 1).scatter(0, self.rows.index_fill(0, src_rows, left), everyone)
        return written[:left].view(self.sizes.shape) % tokens

    def merge(self, x: Tensor, *, path: ModuleType | None = None) -> Tensor:
        """The tokens of `x`, `[batch, N, width]`, averaged by size: `[batch, M, width]` in the same dtype.

        With `keep_norm` each is as long as its parts are on average; a token that nothing joined is bit for bit itself.
        `path` is from `path_for`, which is asked if None.
        """
        path = path_for(x) if path is None else path
        merged: Tensor = path.average(x, self.rows, self.weights, self.sizes.shape, self.keep_norm, self.bags)
        return merged

    def lost(self, x: Tensor, merged: Tensor) -> Tensor:
        """What set tokens apart from what they became part of, `[batch, 2r, width]`; see `unmerge`.

        First of the r merged ones, then of their destinations, each destination once and zeros where it repeats.

        Args:
            x: before the merge, `[batch, N, width]`.
            merged: behind it, `[batch, M, width]`.
        """
        src_rows, dst_rows, merged_rows = self._changed_rows()
        order = torch.arange(len(merged_rows), device=merged_rows.device)
        last = merged_rows.new_zeros(self.sizes.numel()).scatter(0, merged_rows, order)
        once = (last.index_select(0, merged_rows) == order).unsqueeze(1)  # of several into one destination, the last
        before, behind = x.flatten(0, 1), merged.flatten(0, 1).index_select(0, merged_rows)
        apart = [before.index_select(0, src_rows) - behind, (before.index_select(0, dst_rows) - behind) * once]
        return torch.cat([each.view(*self.src.shape, x.shape[-1]) for each in apart], dim=1)

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
            src_rows, dst_rows, _ = self._changed_rows()
            of_src, of_dst = lost.chunk(2, dim=1)
            out = averaging.add_rows(out, src_rows, of_src.flatten(0, 1))
            out = averaging.add_rows(out, dst_rows, of_dst.flatten(0, 1))
        return out.view(*self.weights.shape, y.shape[-1])

    def _changed_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the r merged tokens and of their destinations, before the merge, and the row they share behind it.

        `[batch · r]` each; the first two of the `batch · N`, the third of the `batch · M`.
        """
        first = row_offsets(self.weights)
        src_rows = (self.src + first).flatten()
        merged_rows = self.rows.index_select(0, src_rows)
        return src_rows, (self.kept + first).flatten().index_select(0, merged_rows), merged_rows


def mutual_redundancy(
    features: Tensor, partition: Partition, *, path: ModuleType | None = None
) -> tuple[Tensor, Tensor]:
    """`R_i = max_j cos(f_i, f_j)`, i a candidate and j a destination (Turbo, equation 6 and §6.1).

    Args:
        features: `[batch, tokens, width]`: keys averaged over heads, or any other features.
        partition: who may be merged into whom.
        path: from `path_for`, which is asked if None.

    Returns:
        R in [−1, 1], in float32 or better, and the index of the most similar destination among the destinations,
        int64, `[batch, candidates]` each. Without destinations, R is −1.
    """
    path = path_for(features) if path is None else path
    redundancy, nearest = path.most_similar(features, partition)
    return (same_for_both(redundancy, nearest) if partition.all_pairs else redundancy), nearest


def rank_candidates(
    features: Tensor,
    partition: Partition,
    semantic: Tensor | None,
    block: int = 0,
    *,
    degree: str | DegreeFunction,
    alpha: float | None = None,
    seed: int = 0,
    sizes: Tensor | None = None,
    squares: Tensor | None = None,
    r: int | None = None,
    path: ModuleType | None = None,
) -> Ranking:
    """Compare every candidate with the destinations, and rank it by its information degree.

    Args:
        features: what is compared, `[batch, tokens, width]`.
        partition: who may be merged into whom.
        semantic: A of every token, `[batch, tokens]`, or by head, `[batch, heads, tokens]`; None where the degree does
            not need it.
        block: index of the merging block, counted from 0.
        degree, alpha, seed: as in `TurboConfig`.
        sizes: patches each token stands for, `[batch, tokens]`, where some are padding, of size 0; else None.
        squares: squared lengths of parts of the features, `[batch, parts, tokens]`, where they are known.
        r: how many are going to be merged, where that is known before the degree: it saves a pass.
        path: from `path_for`, which is asked if None.

    Raises:
        ConfigError: see `information_degree`.
    """
    path = path_for(features) if path is None else path
    padding = None if sizes is None else sizes == 0
    # halves may merge into padding, which weighs nothing; a tree must not lead through it
    redundancy, nearest = path.most_similar(features, partition, padding if partition.all_pairs else None, squares)
    redundancy, e, chosen = path.rank(
        *(redundancy, nearest, semantic, partition, block),
        degree=degree,
        alpha=alpha,
        seed=seed,
        padding=padding,
        r=r,
    )
    return Ranking(partition, features.shape[1], redundancy, nearest, e, chosen)


@overload
def merge_ranked(
    ranking: Ranking,
    r: int,
    x: Tensor,
    *,
    sizes: Tensor | None = None,
    order: str,
    reduce: str,
    path: ModuleType | None = None,
) -> tuple[Merge, Tensor]: ...
@overload
def merge_ranked(
    ranking: Ranking,
    r: int,
    x: None = None,
    *,
    sizes: Tensor | None = None,
    order: str,
    reduce: str,
    path: ModuleType | None = None,
) -> tuple[Merge, None]: ...
def merge_ranked(
    ranking: Ranking,
    r: int,
    x: Tensor | None = None,
    *,
    sizes: Tensor | None = None,
    order: str,
    reduce: str,
    path: ModuleType | None = None,
) -> tuple[Merge, Tensor | None]:
    """Merge the `r` candidates of highest degree into their most similar destinations.

    Args:
        ranking: from `rank_candidates`.
        r: tokens to merge, at most the number of candidates; what `rank_candidates` was told.
        x: tokens to merge in the same pass, `[batch, tokens, width]`; `Merge.merge` does it later, too.
        sizes: patches each token stands for, `[batch, tokens]`; ones if None.
        order: `"partition"`: prefix, candidates left, destinations, suffix; or `"spatial"`: the order before.
        reduce: `"merge"`; `"keep_norm"`: as long as the parts are on average; or `"prune"`: the destination keeps its
            own value and size.
        path: from `path_for`, which is asked if None.

    Returns:
        The merge, and the merged tokens `[batch, tokens − r, width]`, or None without `x`.

    Raises:
        ConfigError: another `r` than the candidates were ranked for.
    """
    degree = ranking.degree
    path = path_for(degree if x is None else x) if path is None else path
    chosen = ranking.chosen
    if chosen is not None and chosen[0].shape[1] != r:
        raise ConfigError(f"r={r}: the candidates were ranked to choose {chosen[0].shape[1]} of them")
    src, dst = path.choose(degree, ranking.nearest, ranking.partition, r) if chosen is None else chosen
    slots = None if order == "spatial" else published_order(ranking.partition, ranking.tokens, degree.device)
    if x is not None:
        merged, rows, weights, merged_sizes, logs = path.merge_tokens(x, sizes, src, dst, slots, reduce)
        return Merge(rows, src, weights, merged_sizes, reduce == "keep_norm", logs=logs), merged
    chosen = src, dst
    return merge_chosen(chosen, ranking.tokens, precise_dtype(degree), sizes, slots, reduce=reduce, path=path), None


def merge_chosen(
    chosen: plain.Chosen,
    tokens: int,
    dtype: torch.dtype,
    sizes: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    reduce: str,
    path: ModuleType,
) -> Merge:
    """Merge the tokens that were chosen, each into its destination, as `path.merge_books` books them.

    Args:
        chosen: the r tokens that go and their destinations.
        tokens, dtype, sizes, slots: as in `plain.merge_books`.
        reduce: as in `merge_ranked`.
        path: from `path_for`.
    """
    rows, weights, merged_sizes, bags = path.merge_books(*chosen, tokens, dtype, sizes, slots, reduce)
    return Merge(rows, chosen[0], weights, merged_sizes, reduce == "keep_norm", bags)


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
    """Choose the `r` tokens that carry least information and the destinations they are merged into (Turbo, §6.1).

    Args:
        features: what is compared, `[batch, tokens, width]`: keys averaged over heads in the paper.
        r: tokens to merge, clamped to the number of candidates and to `(tokens − prefix) // 2` for halves.
        semantic: A of every token, `[batch, tokens]`; not needed for `"redundancy"` and `"random"`.
        sizes: patches each token stands for, `[batch, tokens]`; ones if None.
        prefix: tokens at the front (CLS, distillation, registers) that never merge.
        block: the index of the merging block, which a `LayeredDegree` and the seed go by.
        degree: as in `TurboConfig`.
        alpha: as in `TurboConfig`.
        partition: as in `TurboConfig`.
        grid: as in `TurboConfig`.
        order: as in `TurboConfig`.
        reduce: as in `TurboConfig`.
        seed: as in `TurboConfig`.

    Returns:
        A `Merge` of `tokens` into `tokens − r`.

    Raises:
        ConfigError: A is missing where the degree needs it, the patches do not fill the grid, or all pairs are to be in
            the order of a partition.
    """
    tokens, path = features.shape[1], path_for(features)
    split = partition_tokens(tokens, prefix, partition, block=block, seed=seed, grid=grid, device=features.device)
    ranking = rank_candidates(
        features, split, semantic, block, degree=degree, alpha=alpha, seed=seed, sizes=sizes, path=path
    )
    most = ranking.degree.shape[1] if partition == "grid" else (tokens - prefix) // 2
    return merge_ranked(ranking, min(r, most), sizes=sizes, order=order, reduce=reduce, path=path)[0]
