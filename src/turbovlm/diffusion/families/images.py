"""Denoisers of images in `diffusers`."""

from __future__ import annotations

from dataclasses import replace

from turbovlm.diffusion.attend import Attending
from turbovlm.diffusion.families.entry import Block, Denoiser, Part
from turbovlm.diffusion.grids import OfLatent, OfList, OfPositions, OfShapes
from turbovlm.diffusion.positions import Cut

MODELS = "diffusers.models"
TRANSFORMERS, UNETS = f"{MODELS}.transformers", f"{MODELS}.unets"
SPATIO_TEMPORAL = f"{TRANSFORMERS}.transformer_temporal.TransformerSpatioTemporalModel"

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
        SPATIO_TEMPORAL,
    ),
    blocks=(
        Block(
            f"{MODELS}.attention.BasicTransformerBlock",
            guide="attn1",
            parts=(Part("attn1", "attention", attending=ALONE), Part("attn2", "cross_attention"), FEED_FORWARD),
            whole_if=("pos_embed", "fuser", "attention_mask", "_chunk_size"),
        ),
    ),
    mixing=(SPATIO_TEMPORAL,),
    beside=(
        f"{UNETS}.unet_motion_model.AnimateDiffTransformer3D",
        f"{TRANSFORMERS}.transformer_temporal.TransformerTemporalModel",
    ),
    frames=(
        (f"{UNETS}.unet_motion_model.UNetMotionModel", 2),
        (f"{MODELS}.controlnets.controlnet_sparsectrl.SparseControlNetModel", 2),
        (f"{UNETS}.unet_spatio_temporal_condition.UNetSpatioTemporalConditionModel", 1),
        (f"{UNETS}.unet_3d_condition.UNet3DConditionModel", 2),
        (f"{UNETS}.unet_i2vgen_xl.I2VGenXLUNet", 2),
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

TEXT_BEFORE, TEXT_AFTER = (
    Part("attn", "attention", attending=TEXT_FIRST),
    Part("attn", "attention", attending=TEXT_LAST),
)
"""The attention of blocks that merge whole, by where the text's keys stand."""
IMAGE_ROTARY = Cut("image_rotary_emb", heads=2)

QWEN = Denoiser(
    "Qwen-Image",
    holders=(f"{TRANSFORMERS}.transformer_qwenimage.QwenImageTransformer2DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_qwenimage.QwenImageTransformerBlock",
            guide="attn",
            parts=(TEXT_BEFORE,),
            output=1,
            cuts=(Cut("image_rotary_emb", heads=2, item=0), Cut("modulate_index", axis=1)),
            by_parts=False,
        ),
    ),
    grid=OfShapes("img_shapes"),
    between=("controlnet_block_samples",),
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
HUNYUAN_DOUBLE = Block(
    f"{TRANSFORMERS}.transformer_hunyuanimage.HunyuanImageTransformerBlock",
    guide="attn",
    parts=(TEXT_AFTER,),
    output=0,
    cuts=(IMAGE_ROTARY, Cut("attention_mask", axis=3, text="behind")),
    by_parts=False,
)
HUNYUAN = Denoiser(
    "HunyuanImage 2.1",
    holders=(f"{TRANSFORMERS}.transformer_hunyuanimage.HunyuanImageTransformer2DModel",),
    blocks=(
        HUNYUAN_DOUBLE,
        replace(HUNYUAN_DOUBLE, path=f"{TRANSFORMERS}.transformer_hunyuanimage.HunyuanImageSingleTransformerBlock"),
    ),
    grid=OfLatent(),
)
COGVIEW4_BLOCK = Block(
    f"{TRANSFORMERS}.transformer_cogview4.CogView4TransformerBlock",
    guide="attn1",
    parts=(Part("attn1", "attention", attending=TEXT_FIRST),),
    output=0,
    cuts=(Cut("image_rotary_emb", heads=1),),
    by_parts=False,
)
COGVIEW4 = Denoiser(
    "CogView4",
    holders=(f"{TRANSFORMERS}.transformer_cogview4.CogView4Transformer2DModel",),
    blocks=(COGVIEW4_BLOCK,),
)
COGVIEW3 = Denoiser(
    "CogView3-Plus",
    holders=(f"{TRANSFORMERS}.transformer_cogview3plus.CogView3PlusTransformer2DModel",),
    blocks=(
        replace(COGVIEW4_BLOCK, path=f"{TRANSFORMERS}.transformer_cogview3plus.CogView3PlusTransformerBlock", cuts=()),
    ),
)
GLM = Denoiser(
    "GLM-Image",
    holders=(f"{TRANSFORMERS}.transformer_glm_image.GlmImageTransformer2DModel",),
    blocks=(
        replace(
            COGVIEW4_BLOCK,
            path=f"{TRANSFORMERS}.transformer_glm_image.GlmImageTransformerBlock",
            cuts=(IMAGE_ROTARY,),
            whole_if=("kv_cache",),
        ),
    ),
)
AURAFLOW = Denoiser(
    "AuraFlow",
    holders=(f"{TRANSFORMERS}.auraflow_transformer_2d.AuraFlowTransformer2DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.auraflow_transformer_2d.AuraFlowJointTransformerBlock",
            guide="attn",
            parts=(TEXT_BEFORE,),
            output=1,
            by_parts=False,
        ),
        Block(
            f"{TRANSFORMERS}.auraflow_transformer_2d.AuraFlowSingleTransformerBlock",
            guide="attn",
            parts=(TEXT_BEFORE,),
            text="front",
            by_parts=False,
        ),
    ),
)
LUMINA2 = Denoiser(
    "Lumina 2",
    holders=(f"{TRANSFORMERS}.transformer_lumina2.Lumina2Transformer2DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_lumina2.Lumina2TransformerBlock",
            guide="",
            parts=(TEXT_BEFORE,),
            cuts=(Cut("image_rotary_emb", axis=1, text="front"),),
            text="front",
            by_parts=False,
            whole_if=("attention_mask",),
        ),
    ),
    lists=("noise_refiner", "layers"),
)
KANDINSKY5 = Denoiser(
    "Kandinsky 5",
    holders=(f"{TRANSFORMERS}.transformer_kandinsky.Kandinsky5Transformer3DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_kandinsky.Kandinsky5TransformerDecoderBlock",
            guide="",
            parts=(Part("self_attention", "attention", attending=Attending()),),
            cuts=(Cut("rope", axis=1),),
            words="text_embed",
            by_parts=False,
            whole_if=("sparse_params",),
        ),
    ),
    grid=OfLatent("bfhwc"),
)
PRX = Denoiser(
    "PRX",
    holders=(f"{TRANSFORMERS}.transformer_prx.PRXTransformer2DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_prx.PRXBlock",
            guide="",
            parts=(Part("attention", "attention", attending=TEXT_FIRST),),
            cuts=(Cut("image_rotary_emb", axis=2),),
            by_parts=False,
        ),
    ),
)
KREA2 = Denoiser(
    "Krea 2",
    holders=(f"{TRANSFORMERS}.transformer_krea2.Krea2Transformer2DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_krea2.Krea2TransformerBlock",
            guide="",
            parts=(TEXT_BEFORE,),
            cuts=(ROTARY, Cut("attention_mask", axis=3, text="front")),
            text="front",
            by_parts=False,
        ),
    ),
    grid=OfPositions("position_ids"),
)
Z_IMAGE = Denoiser(
    "Z-Image",
    holders=(f"{TRANSFORMERS}.transformer_z_image.ZImageTransformer2DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_z_image.ZImageTransformerBlock",
            guide="attention",
            parts=(Part("attention", "attention", attending=TEXT_LAST),),
            cuts=(Cut("freqs_cis", axis=1, text="behind"), Cut("attn_mask", axis=1, text="behind")),
            text="behind",
            by_parts=False,
            whole_if=("noise_mask",),
        ),
    ),
    grid=OfList("patch_size", "f_patch_size", (2, 1)),
    refused=("diffusers.pipelines.z_image.pipeline_z_image_omni.ZImageOmniPipeline",),
    between=("controlnet_block_samples",),
    lists=("noise_refiner", "layers"),
)

IMAGES = (
    *(BASIC, SD3, FLUX, QWEN, FLUX2, CHROMA, LONGCAT, OVIS, HUNYUAN),
    *(COGVIEW4, COGVIEW3, GLM, AURAFLOW, LUMINA2, KANDINSKY5, PRX, KREA2, Z_IMAGE),
)
