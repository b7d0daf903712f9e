"""Models of the Turbo paper that `transformers` does not have, on its parts; they load their authors' checkpoints."""

from turbovlm.models.blip_nlvr2 import BlipForNLVR2

__all__ = ["BlipForNLVR2"]
