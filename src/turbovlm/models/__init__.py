"""Models of the Turbo paper that `transformers` does not have, on its parts; they load their authors' checkpoints."""

from turbovlm.models.blip_nlvr2 import BlipForNLVR2
from turbovlm.models.minigpt_v2 import MiniGPTv2
from turbovlm.models.upop import load_upop

__all__ = ["BlipForNLVR2", "MiniGPTv2", "load_upop"]
