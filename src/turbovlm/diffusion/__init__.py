"""Image generation: tokens are merged before a part of a block and restored behind it (Turbo, §6.2)."""

from turbovlm.diffusion.families import Block, Denoiser, Part

__all__ = ["Block", "Denoiser", "Part"]
