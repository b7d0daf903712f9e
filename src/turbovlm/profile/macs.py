"""Multiply-accumulates of one forward, counted operator by operator as the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import turbovlm.ops.greedy
import turbovlm.ops.kernels  # noqa: F401, its operators must be there before their costs can be told; `plain` has others
from turbovlm.ops.plain import window_slices

Shape = Sequence[int]


def macs(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of `model(*args, **kwargs)`, the model as it is now, accelerated or not.

    Counts matrix products, convolutions and attention (2·N²·D per block), on any device, `meta` included: there a
    model of any size costs nothing to count. Norms, softmax and other elementwise work, about 0.1 % of a vision
    transformer, are left out, and so are operators from outside PyTorch, such as xformers'; those of bitsandbytes are
    counted. A product of integers, as quantised layers have them, counts as one of floats.

    Args:
        model: any module; it runs once, without gradients, in the mode it is in.
        args: what its forward takes by position.
        kwargs: what it takes by name.

    Returns:
        One multiplication with its addition counts as 1; published FLOPs of vision transformers mostly count this way.
    """
    with torch.no_grad(), counting() as total:
        model(*args, **kwargs)
    return total()


@contextlib.contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Counts what runs inside, as `macs` does; gives a function that tells the multiply-accumulates so far."""
    counter = FlopCounterMode(display=False, custom_mapping=_FLOPS | _outside())
    # Only the total is wanted; the tracker of submodules would hook autograd, which fails on a parameter as an input.
    counter.mod_tracker = _Untracked()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused nn.MultiheadAttention is one opaque operator
    try:
        with counter:
            yield lambda: counter.get_total_flops() // 2
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class _Untracked(ModuleTracker):
    """Tracks nothing but the total."""

    def __enter__(self) -> _Untracked:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def _attention_flops(queries: Shape, keys: Shape, values: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


def _similarity_flops(features: Shape, *args: Any, **kwargs: Any) -> int:
    candidates, destinations, windows = args[-1]
    pairs: int = sum(
        (some.stop - some.start) * (allowed.stop - allowed.start)
        for some, allowed in window_slices(windows, candidates, destinations)
    )
    return 2 * int(features[0]) * pairs * int(features[-1])


def _choice_flops(cosines: Shape, weights: Shape, sizes: Shape, k: int, by: str, *args: Any, **kwargs: Any) -> int:
    """Of the rows of the Cholesky factor, where no tolerance ends the choice earlier."""
    return prod(weights) * k * (k - 1) if by == "dpp" else 0


def _product_flops(left: Shape, right: Shape, **kwargs: Any) -> int:
    return 2 * prod(left) * prod(right[1:])


def _added_product_flops(addend: Shape, left: Shape, right: Shape, **kwargs: Any) -> int:
    return _product_flops(left, right)


def _summed_batch_flops(addend: Shape, left: Shape, right: Shape, **kwargs: Any) -> int:
    return 2 * prod(left) * right[-1]


def _packed_product_flops(left: Shape, packed: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(left) * packed[0]


def _mixed_product_flops(left: Shape, rounded: Shape, packed: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(left) * packed[0]


def _unpacked_product_flops(left: Shape, packed: Shape, shape: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(left) * shape[0]


def _outside() -> dict[Any, Callable[..., int]]:
    """The products of bitsandbytes, where it is loaded."""
    loaded = torch.ops.bitsandbytes
    return {getattr(loaded, name): flops for name, flops in _BITSANDBYTES.items() if hasattr(loaded, name)}


_BITSANDBYTES: dict[str, Callable[..., int]] = {
    "int8_linear_matmul": _packed_product_flops,
    "int8_scaled_mm": _packed_product_flops,
    "int8_mixed_scaled_mm": _mixed_product_flops,
    "gemv_4bit": _unpacked_product_flops,
    "gemm_4bit": _unpacked_product_flops,
}
_ATEN, _OWN = torch.ops.aten, torch.ops.turbovlm
_FLOPS = {
    _OWN.biased_attention: _attention_flops,
    _OWN.stored_attention: _attention_flops,
    _OWN.most_similar: _similarity_flops,
    _OWN.choose_in_turn: _choice_flops,
    _ATEN._scaled_dot_product_flash_attention: _attention_flops,
    _ATEN._scaled_dot_product_efficient_attention: _attention_flops,
    _ATEN._scaled_dot_product_cudnn_attention: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_attention_math_for_mps: _attention_flops,
    _ATEN._scaled_dot_product_fused_attention_overrideable: _attention_flops,
    _ATEN.mv: _product_flops,
    _ATEN.dot: _product_flops,
    _ATEN.addmv: _added_product_flops,
    _ATEN.addbmm: _summed_batch_flops,
    _ATEN._int_mm: _product_flops,
    _ATEN._weight_int4pack_mm_for_cpu: _packed_product_flops,
}
"""Our own operators, and those that `FlopCounterMode` counts as 0, or refuses with grouped queries, in some releases of
PyTorch."""
