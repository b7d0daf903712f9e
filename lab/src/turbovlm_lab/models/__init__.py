"""Models of the Turbo paper that `transformers` does not have, on its parts; they load their authors' checkpoints."""

from turbovlm_lab.models.blip_nlvr2 import BlipForNLVR2
from turbovlm_lab.models.minigpt_v2 import MiniGPTv2
from turbovlm_lab.models.upop import load_upop

__all__ = ["BlipForNLVR2", "MiniGPTv2", "load_upop"]
