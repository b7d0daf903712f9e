"""Multiply-accumulates of one forward, counted operator by operator as the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
Shape = Sequence[int]


def _attention_flops(queries: Shape, keys: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    batch, heads, tokens, width = queries
    return 2 * batch * heads * tokens * keys[-2] * (width + values[-1])


def macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of `model(*args, **kwargs)`, the model as it is now, accelerated or not.

    Counts matrix products, convolutions and attention (2·N²·D per block), on any device, `meta` included: there a
    model of any size costs nothing to count. Norms, softmax and other elementwise work, about 0.1 % of a vision
    transformer, are left out. A compiled model must be given uncompiled.

    Args:
        model: any module; it runs once, without gradients, in the mode it is in.
        args, kwargs: what its forward takes.

    Returns:
        One multiplication with its addition counts as 1; published FLOPs of vision transformers mostly count this way.
    """
    counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops})
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused nn.MultiheadAttention is one opaque operator
    try:
        with torch.no_grad(), counter:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops() // 2
