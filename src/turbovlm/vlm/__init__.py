"""Between the vision tower and the language model: which visual tokens it reads, and the prompt that fits them."""

from turbovlm.vlm.families import Packed, VlmFamily
from turbovlm.vlm.resolution import downsample

__all__ = ["Packed", "VlmFamily", "downsample"]
