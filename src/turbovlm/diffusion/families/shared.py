"""What the entries of images share: where the library has things, and attention by where the text stands."""

from __future__ import annotations

from turbovlm.diffusion.attend import Attending
from turbovlm.diffusion.families.entry import Part
from turbovlm.diffusion.positions import Cut

MODELS = "diffusers.models"
TRANSFORMERS, UNETS = f"{MODELS}.transformers", f"{MODELS}.unets"
CONTROLNETS = f"{MODELS}.controlnets"

ALONE, TEXT_FIRST = Attending(mask_axes=3, keys_apart=True), Attending("front", mask_axes=4)
TEXT_LAST = Attending("behind")
ROTARY = Cut("image_rotary_emb", text="front", heads=2)
FEED_FORWARD = Part("ff", "ffn")

TEXT_BEFORE, TEXT_AFTER = (
    Part("attn", "attention", attending=TEXT_FIRST),
    Part("attn", "attention", attending=TEXT_LAST),
)
"""The attention of blocks that merge whole, by where the text's keys stand."""
IMAGE_ROTARY = Cut("image_rotary_emb", heads=2)
