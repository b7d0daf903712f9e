"""Towers that read text and image as one sequence: the text tokens in front are never merged."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from turbovlm.encoder.state import PREFIX
from turbovlm.patching import Patch


def joint_forward(patch: Patch, module: nn.Module, original: Any, /, **inputs: Any) -> Any:
    """Run the module that puts text and image together, and attach the number of text tokens and CLS.

    Returns:
        The library's own `(tokens, mask)`.
    """
    tokens, mask = original(**inputs)
    setattr(tokens, PREFIX, inputs["attention_mask"].shape[1] + 1)
    return tokens, mask
