"""FLUX, and those that came of it, in `diffusers`."""

from __future__ import annotations

from dataclasses import replace

from turbovlm.diffusion.families.entry import Block, Denoiser, Part
from turbovlm.diffusion.families.shared import CONTROLNETS, FEED_FORWARD, ROTARY, TEXT_BEFORE, TEXT_FIRST, TRANSFORMERS
from turbovlm.diffusion.grids import OfPositions
from turbovlm.diffusion.positions import Cut

FLUX_DOUBLE = Block(
    f"{TRANSFORMERS}.transformer_flux.FluxTransformerBlock",
    guide="attn",
    parts=(Part("attn", "attention", restored=(0, 2), attending=TEXT_FIRST, cuts=(ROTARY,)), FEED_FORWARD),
    output=1,
    cuts=(ROTARY,),
)
FLUX_SINGLE = Block(
    f"{TRANSFORMERS}.transformer_flux.FluxSingleTransformerBlock",
    guide="attn",
    parts=(
        Part("proj_mlp", "ffn", text="front", one_layer=True),
        Part("attn", "attention", text="front", attending=TEXT_FIRST, cuts=(ROTARY,)),
        Part("proj_out", "ffn", text="front", one_layer=True),
    ),
    output=1,
    cuts=(ROTARY,),
)
FLUX = Denoiser(
    "FLUX",
    holders=(
        f"{TRANSFORMERS}.transformer_flux.FluxTransformer2DModel",
        f"{CONTROLNETS}.controlnet_flux.FluxControlNetModel",
    ),
    blocks=(FLUX_DOUBLE, FLUX_SINGLE),
    grid=OfPositions("img_ids"),
    between=("controlnet_block_samples", "controlnet_single_block_samples"),
)


def _like_flux(family: str, module: str, prefix: str, between: tuple[str, ...] = ()) -> Denoiser:
    """A family whose blocks are spelled as FLUX's, in a file of its own, with a prefix of its own."""
    classes = f"{TRANSFORMERS}.{module}.{prefix}"
    double = replace(FLUX_DOUBLE, path=f"{classes}TransformerBlock")
    single = replace(FLUX_SINGLE, path=f"{classes}SingleTransformerBlock")
    holders = (f"{classes}Transformer2DModel",)
    return replace(FLUX, family=family, holders=holders, blocks=(double, single), between=between)


LONGCAT = _like_flux("LongCat-Image", "transformer_longcat_image", "LongCatImage")
OVIS = _like_flux("Ovis-Image", "transformer_ovis_image", "OvisImage")
BRIA = _like_flux("Bria", "transformer_bria", "Bria", between=FLUX.between)
FLUX2 = Denoiser(
    "FLUX.2",
    holders=(f"{TRANSFORMERS}.transformer_flux2.Flux2Transformer2DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_flux2.Flux2TransformerBlock",
            guide="attn",
            parts=(TEXT_BEFORE,),
            output=1,
            cuts=(ROTARY,),
            by_parts=False,
        ),
        Block(
            f"{TRANSFORMERS}.transformer_flux2.Flux2SingleTransformerBlock",
            guide="",
            parts=(TEXT_BEFORE,),
            cuts=(ROTARY,),
            text="front",
            by_parts=False,
        ),
    ),
    grid=OfPositions("img_ids"),
)
CHROMA_MASK = Cut("attention_mask", axis=1, text="front")
CHROMA = Denoiser(
    "Chroma",
    holders=(f"{TRANSFORMERS}.transformer_chroma.ChromaTransformer2DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_chroma.ChromaTransformerBlock",
            guide="attn",
            parts=(TEXT_BEFORE,),
            output=1,
            cuts=(ROTARY, CHROMA_MASK),
            by_parts=False,
        ),
        Block(
            f"{TRANSFORMERS}.transformer_chroma.ChromaSingleTransformerBlock",
            guide="attn",
            parts=(TEXT_BEFORE,),
            cuts=(ROTARY, CHROMA_MASK),
            text="front",
            by_parts=False,
        ),
    ),
    grid=OfPositions("img_ids"),
    between=("controlnet_block_samples", "controlnet_single_block_samples"),
)

LIKE_FLUX = (FLUX, FLUX2, CHROMA, LONGCAT, OVIS, BRIA)
