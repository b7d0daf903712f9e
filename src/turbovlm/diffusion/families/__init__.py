"""The families of denoisers that turbovlm knows, as data. A new one is an entry, often a copy of another with other
paths (`dataclasses.replace`)."""

from turbovlm.diffusion.families.comfyui import COMFYUI
from turbovlm.diffusion.families.entry import Block, Denoiser, Part
from turbovlm.diffusion.families.flux import FLUX, FLUX_DOUBLE, FLUX_SINGLE, LIKE_FLUX
from turbovlm.diffusion.families.images import BASIC, IMAGES, SD3
from turbovlm.diffusion.families.videos import COGVIDEOX, VIDEOS

FAMILIES = IMAGES + LIKE_FLUX + VIDEOS + COMFYUI

__all__ = ["BASIC", "COGVIDEOX", "FAMILIES", "FLUX", "FLUX_DOUBLE", "FLUX_SINGLE", "SD3", "Block", "Denoiser", "Part"]
