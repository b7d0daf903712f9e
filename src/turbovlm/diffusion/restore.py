"""What every position gets back behind merged tokens, as `restore` of the settings says (`turbovlm.ops.restoring`)."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from turbovlm.config import DenoiseConfig
from turbovlm.errors import StateError
from turbovlm.ops.merging import Merge
from turbovlm.ops.restoring import sample_count
from turbovlm.ops.tracing import is_exporting_to_onnx


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


def restore_update(merge: Merge, x: Tensor, merged: Tensor, out: Tensor, linear: bool, path: ModuleType) -> Tensor:
    """`x_i + (out_j − merged_j)` for each position i of token j: its own input, and what its token has gained.

    Args:
        merge: what was done.
        x: what all positions would have read, `[batch, N, width]`.
        merged: what was read, `[batch, M, width]`.
        out: what it came to, `[batch, M, width]`.
        linear: whether the gain differs by position as linear regression says, instead of being copied.
        path: from `path_for`.

    Returns:
        `[batch, N, width]`, in the dtype of `x` and `out`.
    """
    samples = _samples(merge, x) if linear else 0
    restored: Tensor = path.restore(x, merged, out, merge.rows, True, samples)
    return restored


def restore_linear(merge: Merge, x: Tensor, merged: Tensor, out: Tensor, path: ModuleType) -> Tensor:
    """`out_j + (x_i − merged_j)·W` for each position i of token j, W by ridge regression of `out` on `merged`.

    Args:
        merge, x, merged, path: as in `restore_update`.
        out: what it came to, `[batch, M, out_width]`.

    Returns:
        `[batch, N, out_width]`, in the dtype of `out`.
    """
    restored: Tensor = path.restore(x, merged, out, merge.rows, False, _samples(merge, x))
    return restored


def _samples(merge: Merge, x: Tensor) -> int:
    return sample_count(x.shape[2], merge.sizes.shape[1], merge.src.shape[1])
