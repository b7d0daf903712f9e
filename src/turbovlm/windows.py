"""`batch_windows`: packed vision towers attend to windows of one length in one call. Nothing is merged."""

from __future__ import annotations

import torch.nn as nn

from turbovlm.apply import Handle
from turbovlm.errors import TurboError
from turbovlm.patching import install, patches_on
from turbovlm.vlm.windows import WindowsFeature, find_windows


def batch_windows(model: nn.Module) -> Handle:
    """Have the packed vision towers in `model` attend to all windows, frames and images of one length in one call.

    No token is merged and the outputs are the same; it can stand beside `turbovlm.apply`, whichever came first. Worth
    it where windows are many and small, as in Qwen2.5-VL (docs/language.md). With flash attention, `transformers` has
    one call for all of them already, and goes on with it.

    Args:
        model: a `transformers` model with a tower of Qwen's kind in it, or such a tower.

    Returns:
        A handle; `handle.remove()` gives the model back.

    Raises:
        UnsupportedModelError: no such tower, or one that the installed release computes otherwise.
        TurboError: its windows are batched already, or another library has replaced an attention's forward.
    """
    if any(isinstance(patch.feature, WindowsFeature) for patch in patches_on(model)):
        raise TurboError(f"the windows of this {type(model).__name__} are batched already, and one handle has them")
    feature = find_windows(model)
    install(feature.patches(model))
    return Handle(model, [feature])
