"""Denoisers of ComfyUI and of Stable Diffusion WebUI Forge.

Their weights are those of the denoisers in `diffusers`, and so is what their blocks compute. UNets have all blocks in
one row. What other extensions put into a block comes in an argument, `transformer_options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from turbovlm.diffusion.attend import Attending
from turbovlm.diffusion.families.entry import Block, Denoiser, Part
from turbovlm.diffusion.grids import Grids, OfLatent, Sides
from turbovlm.diffusion.positions import Cut

IN_BLOCKS = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")
"""Entries of `transformer_options["patches"]` whose functions are called inside of blocks, with tokens."""


def stands_inside(given: Mapping[str, Any]) -> str | None:
    """What other extensions have put into a block, which may look at positions; None where there is nothing.

    Args:
        given: the block's arguments, by name.
    """
    options: Mapping[str, Any] = given.get("transformer_options") or {}
    patches: Mapping[str, Any] = options.get("patches") or {}
    for name in IN_BLOCKS:
        if patches.get(name):
            return f"another extension has put a function into it, {name}"
    if options.get("optimized_attention_override") is not None:
        return "another extension has replaced its attention, optimized_attention_override"
    replaced: Mapping[str, Any] = options.get("patches_replace") or {}
    if replaced.get("dit"):
        return "another extension has replaced blocks, in patches_replace"
    block = options.get("block")
    if block is None:
        return None
    for name in ("attn1", "attn2"):
        there: Mapping[Any, Any] = replaced.get(name) or {}
        if block in there or (*block, options.get("block_index", 0)) in there:
            return f"another extension has replaced its {name}, in patches_replace"
    return None


COMFY = Denoiser(
    "UNets of ComfyUI",
    holders=("comfy.ldm.modules.attention.SpatialTransformer",),
    blocks=(
        Block(
            "comfy.ldm.modules.attention.BasicTransformerBlock",
            guide="attn1",
            parts=(
                Part("attn1", "attention", attending=Attending(added="mask")),
                Part("attn2", "cross_attention"),
                Part("ff", "ffn"),
            ),
            by_parts=False,
            whole_if=("disable_self_attn", "switch_temporal_ca_to_sa", "ff_in"),
            reason=stands_inside,
            in_place=True,
        ),
    ),
    grid=OfLatent(patch=None),
    roots=("comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel",),
)
FORGE = replace(
    COMFY,
    family="UNets of Stable Diffusion WebUI Forge",
    holders=("backend.nn.unet.SpatialTransformer",),
    blocks=(replace(COMFY.blocks[0], path="backend.nn.unet.BasicTransformerBlock"),),
    roots=("backend.nn.unet.IntegratedUNet2DConditionModel",),
)


@dataclass(frozen=True)
class OfLatents:
    """By the shapes of the latent, the first argument, and of references behind it, in patches of which none is cut."""

    references: str

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: Sides | None) -> Grids:
        latents = [next(iter(given.values())), *(given.get(self.references) or ())]
        side = holder.patch_size
        return tuple((1, -(-latent.shape[-2] // side), -(-latent.shape[-1] // side)) for latent in latents)


PLACES = Cut("pe", axis=2, text="front")
BY_MASK = Attending("front", added="attn_mask")
COMFY_FLUX = Denoiser(
    "FLUX of ComfyUI",
    holders=("comfy.ldm.flux.model.Flux",),
    blocks=(
        Block(
            "comfy.ldm.flux.layers.DoubleStreamBlock",
            guide="",
            parts=(),
            output=0,
            cuts=(PLACES,),
            words="txt",
            by_parts=False,
            whole_if=("attn_mask", "modulation_dims_img", "flipped_img_txt"),
            attending=BY_MASK,
            reason=stands_inside,
        ),
        Block(
            "comfy.ldm.flux.layers.SingleStreamBlock",
            guide="",
            parts=(),
            cuts=(PLACES,),
            text="front",
            by_parts=False,
            whole_if=("attn_mask", "modulation_dims"),
            attending=BY_MASK,
            reason=stands_inside,
            in_place=True,
        ),
    ),
    grid=OfLatents("ref_latents"),
    between=("control",),
    roots=("comfy.ldm.flux.model.Flux",),
)

COMFYUI = (COMFY, FORGE, COMFY_FLUX)
