"""What every position gets back behind a feed-forward beside its token's result: what linear regression says of the
difference.

A feed-forward is smooth: tokens that are close come to results that are close, and how these differ is nearly linear in
how the tokens do. The merged tokens and their results, which are there anyway, tell that linear map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.ops.merging import Merge

RIDGE = 0.3
"""Added to the variance of every direction, as a share of the mean one."""

SAMPLES = 0.5
"""Most tokens that the regression sees, per direction; and it never sees more than positions are gone."""


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
    samples = min(out.shape[1], int(SAMPLES * x.shape[2]), merge.src.shape[1])
    across, weights = (factor.to(out.dtype) for factor in linear_map(merged, out, max(1, samples)))
    places = _moved(merge) + torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]
    flat = places.flatten()
    apart = x.flatten(0, 1).index_select(0, flat) - merged.flatten(0, 1).index_select(0, merge.rows[flat])
    moved = apart.to(out.dtype).view(*places.shape, -1) @ across @ weights
    return merge.unmerge(out).flatten(0, 1).index_add(0, flat, moved.flatten(0, 1)).view(*x.shape[:2], -1)


def _moved(merge: Merge) -> Tensor:
    """The positions whose token is not theirs alone, those gone and where they went, `[batch, ≤ 2r]`; each once."""
    largest = merge.sizes.topk(min(merge.src.shape[1], merge.sizes.shape[1])).indices
    return torch.cat([merge.src, merge.kept.gather(1, largest)], dim=1)


def linear_map(merged: Tensor, out: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """W of the ridge regression of `out`, `[batch, M, out_width]`, on `merged`, `[batch, M, width]`, both centred.

    Of `samples` evenly spaced tokens, fewer than `width`: by the system of their products, which is the smaller one.

    Returns:
        Two factors of W, `[batch, width, samples]` and `[batch, samples, out_width]`, in fp32 at least.
    """
    precise = torch.promote_types(out.dtype, torch.float32)
    seen = torch.arange(samples, device=out.device) * merged.shape[1] // samples
    z, y = (value.index_select(1, seen).to(precise) for value in (merged, out))
    z, y = z - z.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    with torch.autocast(out.device.type, enabled=False):
        products = z @ z.transpose(1, 2)
        ridge = RIDGE * samples * z.square().mean(dim=(1, 2)).clamp_min(1e-6)  # of equal tokens, too
        system = products + ridge.view(-1, 1, 1) * torch.eye(samples, dtype=precise, device=out.device)
        return z.transpose(1, 2), torch.cholesky_solve(y, torch.linalg.cholesky_ex(system).L)
