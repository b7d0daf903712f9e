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
LONGCAT = replace(
    FLUX,
    family="LongCat-Image",
    holders=(f"{TRANSFORMERS}.transformer_longcat_image.LongCatImageTransformer2DModel",),
    blocks=(
        replace(FLUX_DOUBLE, path=f"{TRANSFORMERS}.transformer_longcat_image.LongCatImageTransformerBlock"),
        replace(FLUX_SINGLE, path=f"{TRANSFORMERS}.transformer_longcat_image.LongCatImageSingleTransformerBlock"),
    ),
    between=(),
)
OVIS = replace(
    LONGCAT,
    family="Ovis-Image",
    holders=(f"{TRANSFORMERS}.transformer_ovis_image.OvisImageTransformer2DModel",),
    blocks=(
        replace(FLUX_DOUBLE, path=f"{TRANSFORMERS}.transformer_ovis_image.OvisImageTransformerBlock"),
        replace(FLUX_SINGLE, path=f"{TRANSFORMERS}.transformer_ovis_image.OvisImageSingleTransformerBlock"),
    ),
)
BRIA = replace(
    FLUX,
    family="Bria",
    holders=(f"{TRANSFORMERS}.transformer_bria.BriaTransformer2DModel",),
    blocks=(
        replace(FLUX_DOUBLE, path=f"{TRANSFORMERS}.transformer_bria.BriaTransformerBlock"),
        replace(FLUX_SINGLE, path=f"{TRANSFORMERS}.transformer_bria.BriaSingleTransformerBlock"),
    ),
)
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
