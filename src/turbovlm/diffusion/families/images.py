"""Denoisers of images in `diffusers`, without FLUX and those that came of it, which are in `flux`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from turbovlm.diffusion.attend import Attending
from turbovlm.diffusion.families.entry import Block, Denoiser, Part
from turbovlm.diffusion.families.shared import (
    ALONE,
    CONTROLNETS,
    FEED_FORWARD,
    IMAGE_ROTARY,
    MODELS,
    ROTARY,
    TEXT_AFTER,
    TEXT_BEFORE,
    TEXT_FIRST,
    TEXT_LAST,
    TRANSFORMERS,
    UNETS,
)
from turbovlm.diffusion.grids import OfLatent, OfList, OfPositions, OfShapes
from turbovlm.diffusion.positions import Cut

SPATIO_TEMPORAL = f"{TRANSFORMERS}.transformer_temporal.TransformerSpatioTemporalModel"

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
    holders=(
        f"{TRANSFORMERS}.transformer_sd3.SD3Transformer2DModel",
        f"{CONTROLNETS}.controlnet_sd3.SD3ControlNetModel",
    ),
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
QWEN = Denoiser(
    "Qwen-Image",
    holders=(
        f"{TRANSFORMERS}.transformer_qwenimage.QwenImageTransformer2DModel",
        f"{CONTROLNETS}.controlnet_qwenimage.QwenImageControlNetModel",
    ),
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


def _masked_by_blocks(given: Mapping[str, Any]) -> str | None:
    """Why blocks read all tokens: a mask of flex attention, which cannot be cut."""
    mask = given.get("attention_mask")
    return None if mask is None or isinstance(mask, Tensor) else f"its attention_mask is a {type(mask).__name__}"


QWEN21 = Denoiser(
    "Qwen-Image 2.1",
    holders=(f"{TRANSFORMERS}.transformer_qwenimage21.QwenImage21Transformer2DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_qwenimage21.QwenImage21TransformerBlock",
            guide="attn",
            parts=(Part("attn", "attention", attending=Attending("front", any_words=True)),),
            cuts=(
                Cut("rotary_emb", text="front", heads=2),
                Cut("target_token_mask", text="front", heads=2),
                Cut("attention_mask", axis=3, text="front"),
                Cut("key_valid", axis=1, text="front"),
            ),
            text="front",
            by_parts=False,
            reason=_masked_by_blocks,
        ),
    ),
    grid=OfShapes("img_shapes", last=True),
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
HIDREAM_DOUBLE = Block(
    f"{TRANSFORMERS}.transformer_hidream_image.HiDreamImageTransformerBlock",
    guide="",
    parts=(Part("attn1", "attention", attending=Attending("behind", any_words=True)),),
    output=0,
    cuts=(Cut("image_rotary_emb", axis=1, text="behind"),),
    by_parts=False,
    whole_if=("hidden_states_masks",),
)
HIDREAM = Denoiser(
    "HiDream",
    holders=(f"{TRANSFORMERS}.transformer_hidream_image.HiDreamImageTransformer2DModel",),
    blocks=(
        HIDREAM_DOUBLE,
        replace(
            HIDREAM_DOUBLE,
            path=f"{TRANSFORMERS}.transformer_hidream_image.HiDreamImageSingleTransformerBlock",
            output=None,
            text="behind",
        ),
    ),
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
    *(BASIC, SD3, QWEN, QWEN21, HUNYUAN, HIDREAM, COGVIEW4, COGVIEW3, GLM),
    *(AURAFLOW, LUMINA2, KANDINSKY5, PRX, KREA2, Z_IMAGE),
)
