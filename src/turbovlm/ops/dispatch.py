"""The one place that decides what runs: Triton's kernels where they take the tensors, plain operators elsewhere."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from turbovlm.ops import plain
from turbovlm.ops.tracing import is_exporting


def path_for(x: Tensor) -> ModuleType:
    """`turbovlm.ops.fused` where kernels take `x`; `turbovlm.ops.plain` on other devices, and for exported programs.

    Both have the same functions. Who runs several of them asks once, and passes the answer on.
    """
    if not x.is_cuda or is_exporting():
        return plain
    from turbovlm.ops import fused  # imports triton

    return fused if fused.usable(x) else plain
