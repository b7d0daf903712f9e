"""Models of the Turbo paper that `transformers` does not have, on its parts; they load their authors' checkpoints.

Each is imported when it is used: turbovlm reads `families` whenever it looks at a model.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbovlm_lab.models.blip_nlvr2 import BlipForNLVR2
    from turbovlm_lab.models.minigpt_v2 import MiniGPTv2
    from turbovlm_lab.models.upop import load_upop

__all__ = ["BlipForNLVR2", "MiniGPTv2", "load_upop"]

_WHERE = {"BlipForNLVR2": "blip_nlvr2", "MiniGPTv2": "minigpt_v2", "load_upop": "upop"}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"turbovlm_lab.models.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'turbovlm_lab.models' has no attribute {name!r}")
