"""Blocks of packed sequences: several images in a row, `[tokens, width]`, each attending within itself or its windows.

A packed sequence is a batch of one whose attention and merges stay within segments. Merging needs blocks in which each
image, or frame of a video, attends to all of itself; in the others, windows become shorter by what has merged.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from turbovlm.encoder.block import block_forward
from turbovlm.encoder.reading import keep_asked
from turbovlm.encoder.state import ASKED, STATE
from turbovlm.patching import Patch


def packed_forward(
    patch: Patch, block: nn.Module, original: Any, /, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run one block on a packed sequence, `[tokens, width]`, as on a batch of one."""

    def own(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = original(x.squeeze(0), *args, **kwargs)
        return out.unsqueeze(0)

    if patch.detail == 0:
        keep_asked(patch.feature, hidden)  # type: ignore[arg-type]
    out = block_forward(patch, block, own, _moved(hidden, hidden.unsqueeze(0)), *args, **kwargs)
    assert isinstance(out, Tensor)
    return _moved(out, out.squeeze(0))


def _moved(x: Tensor, view: Tensor) -> Tensor:
    """The view of `x`, with what `x` carries."""
    for name in (STATE, ASKED):
        if (value := getattr(x, name, None)) is not None:
            setattr(view, name, value)
    return view
