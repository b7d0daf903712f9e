"""Tokens averaged into those that they merge into, by weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.ops.tracing import is_exporting, is_transformed

SHORTEST = 1e-12
"""Features of less length than this count as this long."""

Bags = tuple[Tensor, Tensor, Tensor]
"""What `sort_into_bags` gives."""


def average(
    x: Tensor, rows: Tensor, weights: Tensor, left: torch.Size, keep_norm: bool, bags: Bags | None = None
) -> Tensor:
    """The weighted sums of tokens, `[batch, M, width]`.

    Args:
        x: `[batch, N, width]`.
        rows: the sum that each token is part of, `[batch · N]`, int64.
        weights: its weight there, `[batch, N]`.
        left: `(batch, M)`.
        keep_norm: whether each sum is made as long as its parts are on average.
        bags: what `sort_into_bags` gives; sorted here if None.
    """
    if has_bags(x):
        mean = mean_of_bags(x, *(sort_into_bags(rows, weights, left.numel()) if bags is None else bags))
    else:
        mean = mean_of_rows(x, rows, weights, left.numel())
    mean = mean.view(*left, x.shape[-1])
    return keep_norms(x, mean, rows, weights) if keep_norm else mean


def has_bags(x: Tensor) -> bool:
    """Whether `embedding_bag` is there and fast; exporters, `vmap` and some devices lack it."""
    if x.device.type not in ("cpu", "cuda") or is_exporting():
        return False
    return torch.compiler.is_compiling() or not is_transformed(x)


def sort_into_bags(rows: Tensor, weights: Tensor, count: int) -> Bags:
    """Tokens in the order of the `count` rows that they become part of, where each row begins, and their weights."""
    row, bag = rows.sort(stable=True)
    starts = torch.searchsorted(row, torch.arange(count, device=row.device))
    return bag, starts, weights.flatten().index_select(0, bag)


def mean_of_bags(x: Tensor, bag: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of a batch's tokens, `[batch · M, width]`, in one pass and without a weighted copy of `x`.

    Args:
        x: `[batch, N, width]`.
        bag: rows of the `batch · N`, `[batch · N]`, int64: those of the first sum, then of the second, and so on.
        starts: where each sum begins in `bag`, `[batch · M]`, int64.
        weights: of each entry of `bag`.
    """
    return F.embedding_bag(bag, x.flatten(0, 1), starts, mode="sum", per_sample_weights=weights.to(x.dtype))


def mean_of_rows(x: Tensor, rows: Tensor, weights: Tensor, count: int) -> Tensor:
    """The sums of `mean_of_bags` in operators that every backend and exporter has.

    Args:
        x: `[batch, N, width]`.
        rows: the sum that each token is part of, `[batch · N]`, int64.
        weights: its weight there, `[batch, N]`.
        count: how many sums there are, `batch · M`.
    """
    weighted = (x * weights.unsqueeze(-1)).flatten(0, 1)
    return add_rows(weighted.new_zeros(count, x.shape[-1]), rows, weighted).to(x.dtype)


def keep_norms(x: Tensor, mean: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """`mean`, `[batch, M, width]`, each token as long as what it is the mean of, on average by `weights`.

    The rest as in `mean_of_rows`.
    """
    precise = precise_dtype(x)
    lengths = torch.linalg.vector_norm(x, dim=-1, dtype=precise) * weights.to(precise)
    found = torch.linalg.vector_norm(mean, dim=-1, dtype=precise)
    wanted = add_rows(lengths.new_zeros(found.numel()), rows, lengths.flatten()).view(found.shape)
    scale = torch.where(found > SHORTEST, wanted / found.clamp_min(SHORTEST), 1)
    return mean * scale.to(mean.dtype).unsqueeze(-1)


def add_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """`x` with each of `values` added to its row of `x`; a row may come several times.

    Args:
        x: `[N, width]`, or `[N]`.
        rows: `[k]`, int64.
        values: `[k, width]`, or `[k]`.
    """
    if is_exporting():  # the ONNX exporter of TorchScript takes no `index_add` where rows repeat
        return x.scatter_add(0, rows if x.ndim == 1 else rows.unsqueeze(1).expand_as(values), values)
    return x.index_add(0, rows, values)


def precise_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over `x` are taken: float32, or that of `x` where it is more precise."""
    return torch.promote_types(x.dtype, torch.float32)
