"""What every position gets back: what its token came to, and what linear regression says of the difference.

Parts of a block, blocks, and stacks of blocks are smooth: tokens that are close come to results that are close, and how
these differ is nearly linear in how the tokens do. The merged tokens and their results, which are there anyway, tell
that linear map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.config import DenoiseConfig
from turbovlm.errors import StateError
from turbovlm.ops.merging import Merge
from turbovlm.ops.tracing import is_exporting_to_onnx, without_autocast

RIDGE = 0.3
"""Added to the variance of every direction, as a share of the mean one."""

SAMPLES = 32
"""Most tokens that the regression sees; and it never sees more than half as many as there are directions, or as
positions are gone, or it would cost more than merging saves."""


def is_linear(config: DenoiseConfig, x: Tensor) -> bool:
    """Whether `restore_linear` restores; a small system of equations outlasts most parts of a block on a GPU."""
    return config.restore == "linear" or (
        config.restore == "auto" and (config.where != "part" or x.device.type == "cpu")
    )


def check_has_operator(config: DenoiseConfig, name: str) -> None:
    """See that what runs has an operator for `restore_linear`.

    Raises:
        StateError: ONNX has none.
    """
    if is_exporting_to_onnx():
        raise StateError(
            f'restore={config.restore!r}: the regression behind {name} has no operator in ONNX: restore="copy" has'
        )


def restore_update(merge: Merge, x: Tensor, merged: Tensor, out: Tensor, linear: bool) -> Tensor:
    """`x_i + (out_j − merged_j)` for each position i of token j: its own input, and what its token has gained.

    Args:
        merge: what was done.
        x: what all positions would have read, `[batch, N, width]`.
        merged: what was read, `[batch, M, width]`.
        out: what it came to, `[batch, M, width]`.
        linear: whether the gain is restored by `restore_linear` instead of copied.

    Returns:
        `[batch, N, width]`, in the dtype of `out`.
    """
    update = out - merged
    return x + (restore_linear(merge, x, merged, update) if linear else merge.unmerge(update))


def restore_linear(merge: Merge, x: Tensor, merged: Tensor, out: Tensor) -> Tensor:
    """`y_i = out_j + (x_i − merged_j)·W` for each position i of token j, W by ridge regression of `out` on `merged`.

    Args:
        merge: what was done.
        x: what all positions would have read, `[batch, N, width]`.
        merged: what was read, `[batch, M, width]`.
        out: what it came to, `[batch, M, out_width]`.

    Returns:
        `[batch, N, out_width]`, in the dtype of `out`.
    """
    samples = min(SAMPLES, x.shape[2] // 2)
    for most in (out.shape[1], merge.src.shape[1]):  # of symbols, a branch is simpler for compilers than a minimum
        samples = samples if samples <= most else most
    across, weights = (factor.to(out.dtype) for factor in linear_map(merged, out, max(1, samples)))
    # the difference is taken where it is narrow; of a token that nothing joined it is zero
    apart = x.to(out.dtype) @ across - merge.unmerge(merged.to(out.dtype) @ across)
    return torch.baddbmm(merge.unmerge(out), apart, weights)


def linear_map(merged: Tensor, out: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """W of the ridge regression of `out`, `[batch, M, out_width]`, on `merged`, `[batch, M, width]`, both centred.

    Of `samples` evenly spaced tokens, by the system of their products, which is small and quickly solved.

    Returns:
        Two factors of W, `[batch, width, samples]` and `[batch, samples, out_width]`, in fp32 at least.
    """
    precise, every = torch.promote_types(out.dtype, torch.float32), merged.shape[1] // samples
    if torch.compiler.is_compiling():  # a stride that is a symbol would be a condition on the size
        some = torch.arange(samples, device=out.device) * every
        z, y = (value.index_select(1, some).to(precise) for value in (merged, out))
    else:
        z, y = (value[:, ::every][:, :samples].to(precise) for value in (merged, out))
    z, y = z - z.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    with without_autocast(out.device):
        products = z @ z.transpose(1, 2)
        # its trace is the sum of all squares: this is RIDGE · samples · the mean square; above 0 of equal tokens, too
        ridge = products.diagonal(dim1=1, dim2=2).mean(dim=1).mul(RIDGE * samples / z.shape[2]).clamp_min(1e-6)
        system = products + torch.diag_embed(ridge.unsqueeze(1).expand(-1, samples))
        return z.transpose(1, 2), torch.cholesky_solve(y, torch.linalg.cholesky_ex(system).L)
