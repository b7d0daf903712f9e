"""Towers that read text and image as one sequence: the text tokens in front are never merged."""

from __future__ import annotations

from typing import Any

from turbovlm.encoder.state import PREFIX
from turbovlm.patching import Patch


def joint_forward(patch: Patch, *args: Any, **kwargs: Any) -> Any:
    """Run the module that puts text and image together, and attach the number of text tokens and CLS.

    Returns:
        The library's own `(tokens, mask)`.
    """
    text = patch.arguments(args, kwargs)["attention_mask"]
    tokens, mask = patch.original(*args, **kwargs)
    setattr(tokens, PREFIX, text.shape[1] + 1)
    return tokens, mask
