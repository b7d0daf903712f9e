"""Every position gets its token's result back, and what linear regression says of the difference between the two.

Parts of a block, blocks, and stacks of blocks are smooth: tokens that are close come to results that are close, and how
these differ is nearly linear in how the tokens do. The merged tokens and their results, which are there anyway, tell
that linear map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.ops.averaging import SHORTEST, precise_dtype
from turbovlm.ops.tracing import without_autocast

RIDGE = 0.3
"""Added to the variance of every direction, as a share of the mean one."""

SAMPLES = 32
"""Most tokens that the regression sees; and it never sees more than half as many as there are directions, or as
positions are gone, or it would cost more than merging saves."""


def sample_count(width: int, left: int, gone: int) -> int:
    """How many of `left` tokens the regression sees, where `gone` were merged; at least one."""
    samples = min(SAMPLES, width // 2)
    for most in (left, gone):  # of symbols, a branch is simpler for compilers than a minimum
        samples = samples if samples <= most else most
    return max(1, samples)


def restore(x: Tensor, merged: Tensor, out: Tensor, rows: Tensor, update: bool, samples: int) -> Tensor:
    """`y_i = out_j + (x_i − merged_j)·W` for each position i of token j.

    W is that of `linear_map`, of `out` on `merged`. With `update`, what a token has gained is restored, and a position
    keeps its own input beside it: W is that of `out − merged`, and one more times x_i − merged_j is added, so that
    `y_i = x_i + (out_j − merged_j) + (x_i − merged_j)·W`. A token that nothing joined gets its `out_j`, bit for bit.

    Args:
        x: what all positions would have read, `[batch, N, width]`.
        merged: what was read, `[batch, M, width]`.
        out: what it came to, `[batch, M, out_width]`; with `update` of the same width.
        rows: `Merge.rows`, `[batch · N]`.
        samples: tokens that the regression sees; 0 for W = 0.

    Returns:
        `[batch, N, out_width]`, in the dtype of `out`, or with `update` of `x` and `out`.
    """
    apart = x - _of_positions(merged, rows, x)
    restored = _of_positions(out, rows, x)
    if update:
        restored = restored + apart
    if samples == 0:
        return restored
    across, weights = linear_map(merged, out - merged if update else out, samples)
    with without_autocast(x.device):
        apart, precise = apart.to(across.dtype) @ across, restored.to(weights.dtype)
        return torch.baddbmm(precise, apart, weights).to(restored.dtype)


def _of_positions(tokens: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    return tokens.flatten(0, 1).index_select(0, rows).view(*x.shape[:2], tokens.shape[2])


def linear_map(merged: Tensor, out: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """W of the ridge regression of `out`, `[batch, M, out_width]`, on `merged`, `[batch, M, width]`, both centred.

    Of `samples` evenly spaced tokens, by the system of their products, which is small and quickly solved. They are
    scaled to unit mean length before, so that no product leaves what lower precision holds.

    Returns:
        Two factors of W, `[batch, width, samples]` and `[batch, samples, out_width]`, in fp32 at least.
    """
    precise, every = precise_dtype(out), merged.shape[1] // samples
    if torch.compiler.is_compiling():  # a stride that is a symbol would be a condition on the size
        some = torch.arange(samples, device=out.device) * every
        z, y = (value.index_select(1, some).to(precise) for value in (merged, out))
    else:
        z, y = (value[:, ::every][:, :samples].to(precise) for value in (merged, out))
    z, y = z - z.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    length = torch.linalg.vector_norm(z, dim=(1, 2), keepdim=True).clamp_min(SHORTEST) * samples**-0.5
    z = z / length
    with without_autocast(out.device):
        system = z @ z.transpose(1, 2)
        # their squares sum to `samples`: this is RIDGE · samples · the mean square
        system.diagonal(dim1=1, dim2=2).add_(RIDGE * samples / z.shape[2])
        return z.transpose(1, 2), torch.cholesky_solve(y / length, torch.linalg.cholesky_ex(system).L)
