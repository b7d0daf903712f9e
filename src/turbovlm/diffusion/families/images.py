"""Denoisers of images in `diffusers`."""

from __future__ import annotations

from turbovlm.diffusion.attend import Attending
from turbovlm.diffusion.families.entry import Block, Denoiser, Part
from turbovlm.diffusion.grids import OfPositions
from turbovlm.diffusion.positions import Cut

MODELS = "diffusers.models"
TRANSFORMERS = f"{MODELS}.transformers"

ALONE, TEXT_FIRST = Attending(mask_axes=3, keys_apart=True), Attending("front", mask_axes=4)
TEXT_LAST = Attending("behind")
ROTARY = Cut("image_rotary_emb", text="front", heads=2)
FEED_FORWARD = Part("ff", "ffn")

BASIC = Denoiser(
    "UNets, PixArt and DiT",
    holders=(
        f"{TRANSFORMERS}.transformer_2d.Transformer2DModel",
        f"{TRANSFORMERS}.pixart_transformer_2d.PixArtTransformer2DModel",
        f"{TRANSFORMERS}.dit_transformer_2d.DiTTransformer2DModel",
    ),
    blocks=(
        Block(
            f"{MODELS}.attention.BasicTransformerBlock",
            guide="attn1",
            parts=(Part("attn1", "attention", attending=ALONE), Part("attn2", "cross_attention"), FEED_FORWARD),
            whole_if=("pos_embed", "fuser", "attention_mask", "_chunk_size"),
        ),
    ),
)
SD3 = Denoiser(
    "Stable Diffusion 3",
    holders=(f"{TRANSFORMERS}.transformer_sd3.SD3Transformer2DModel",),
    blocks=(
        Block(
            f"{MODELS}.attention.JointTransformerBlock",
            guide="attn",
            parts=(
                Part("attn", "attention", attending=TEXT_LAST),
                Part("attn2", "attention", attending=TEXT_LAST),
                FEED_FORWARD,
            ),
            output=1,
            whole_if=("_chunk_size",),
        ),
    ),
    between=("block_controlnet_hidden_states", "skip_layers"),
)
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
    holders=(f"{TRANSFORMERS}.transformer_flux.FluxTransformer2DModel",),
    blocks=(FLUX_DOUBLE, FLUX_SINGLE),
    grid=OfPositions("img_ids"),
    refused=(
        "diffusers.pipelines.flux.pipeline_flux_kontext.FluxKontextPipeline",
        "diffusers.pipelines.flux.pipeline_flux_kontext_inpaint.FluxKontextInpaintPipeline",
    ),
    between=("controlnet_block_samples", "controlnet_single_block_samples"),
)

IMAGES = (BASIC, SD3, FLUX)
