"""Attention in proportion to the patches that each token stands for (Turbo, equation 16), and the guide's row of it."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from turbovlm.ops.dispatch import path_for
from turbovlm.ops.plain import log_sizes


def size_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """`log s` as an additive attention bias.

    Args:
        sizes: patches each token stands for, `[batch, tokens]`; 0 for a padding token, which nobody attends to.
        dtype: that of the queries.

    Returns:
        `[batch, 1, 1, tokens]`, finite: a size of 0 gives `plain.LOG_0`.
    """
    return log_sizes(sizes).to(dtype)[:, None, None, :]


def proportional_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sizes: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    path: ModuleType | None = None,
) -> Tensor:
    """`softmax(QKᵀ·scale + log s) V`; the map itself is never stored whole.

    Args:
        queries: `[batch, heads, tokens, head_dim]`.
        keys: the same.
        values: the same.
        sizes: `[batch, tokens]`; None (all ones) leaves plain attention, and its fastest kernel.
        scale: 1/√head_dim if None.
        dropout_p: dropout of the attention weights, for training.
        path: from `path_for`, which is asked if None.

    Returns:
        `[batch, heads, tokens, head_dim]`.
    """
    path = path_for(queries) if path is None else path
    bias = None if sizes is None else size_bias(sizes, queries.dtype)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    attended: Tensor = path.attend(queries, keys, values, bias, scale, dropout_p)
    return attended


def semantic_value(guide: Tensor, keys: Tensor, sizes: Tensor | None = None) -> Tensor:
    """A, what each token contributes to the guide: the guide's attention row, averaged over heads.

    Args:
        guide: the guide's query (CLS, or the mean query), `[batch, heads, 1, head_dim]`, already scaled.
        keys: `[batch, heads, tokens, head_dim]`.
        sizes: patches each token stands for, `[batch, tokens]`; None before the first merge.

    Returns:
        `[batch, tokens]`, in the keys' dtype, non-negative, summing to 1. Turbo, equations (8) and (16).
    """
    bias = None if sizes is None else size_bias(sizes, keys.dtype)
    rows: Tensor = path_for(keys).attention_rows(guide, keys, bias)[0]
    return rows.mean(dim=1).to(keys.dtype)
