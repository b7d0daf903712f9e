"""Giving every position back what its token came to, and what linear regression says of the difference.

A feed-forward is smooth: tokens that are close come to results that are close, and how these differ is nearly linear in
how the tokens do. The merged tokens and their results, which are there anyway, tell that linear map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.functional.matching import Merge

RIDGE = 0.03
"""Added to the variance of every direction, as a share of the mean one."""

SAMPLES = 4
"""Tokens that the regression sees, per direction; more tell it hardly more."""


@torch.no_grad()
def linear_map(merged: Tensor, out: Tensor) -> Tensor:
    """W of the ridge regression of `out`, `[batch, M, out_width]`, on `merged`, `[batch, M, width]`, both centred.

    Returns:
        `[batch, width, out_width]`, in fp32 at least.
    """
    precise = torch.promote_types(out.dtype, torch.float32)
    with torch.autocast(out.device.type, enabled=False):
        apart = max(1, merged.shape[1] // (SAMPLES * merged.shape[2]))
        seen = merged[:, ::apart].to(precise), out[:, ::apart].to(precise)
        z, y = (value - value.mean(dim=1, keepdim=True) for value in seen)
        tokens, width = z.shape[1:]
        across, ridge = z.transpose(1, 2), RIDGE * tokens * z.square().mean(dim=(1, 2)).view(-1, 1, 1)
        if tokens < width:  # the same solution, by the smaller of two systems
            return across @ _solved(z @ across, ridge, y)
        return _solved(across @ z, ridge, across @ y)


def _solved(gram: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """`(gram + ridge·I)⁻¹·right`; the ridge is kept above 0, so that equal tokens are no trouble."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram + ridge.clamp_min(1e-6) * identity).L)


def restore_linear(merge: Merge, x: Tensor, merged: Tensor, out: Tensor) -> Tensor:
    """`y_i = out_j + (x_i − merged_j)·W` for each position i of token j, W by regression of `out` on `merged`.

    Args:
        merge: what was done.
        x: what all positions would have read, `[batch, N, width]`.
        merged: what was read, `[batch, M, width]`.
        out: what it came to, `[batch, M, out_width]`.

    Returns:
        `[batch, N, out_width]`, in the dtype of `out`.
    """
    apart = (x - merge.unmerge(merged)).to(out.dtype)
    return merge.unmerge(out) + torch.matmul(apart, linear_map(merged, out).to(out.dtype))
