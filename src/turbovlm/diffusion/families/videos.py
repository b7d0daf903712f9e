"""Denoisers of videos in `diffusers`: tokens lie frame by frame, each row by row, and merge across frames."""

from __future__ import annotations

from dataclasses import replace

from turbovlm.diffusion.attend import Attending
from turbovlm.diffusion.families.entry import Block, Denoiser, Part
from turbovlm.diffusion.grids import OfLatent, OfNumbers
from turbovlm.diffusion.positions import Cut

TRANSFORMERS = "diffusers.models.transformers"

ALONE, TEXT_FIRST, TEXT_LAST = Attending(), Attending("front"), Attending("behind")
SELF = Part("attn1", "attention", attending=ALONE)
CROSS = Part("attn2", "cross_attention")
FRAMES = OfLatent("bcfhw")
PATCHES = OfLatent("bcfhw", frames="patch_size_t")

WAN_BLOCK = Block(
    f"{TRANSFORMERS}.transformer_wan.WanTransformerBlock",
    guide="",  # queries and keys are normed before they are split into heads
    parts=(SELF, CROSS),
    cuts=(Cut("rotary_emb", axis=1), Cut("temb", axis=1, axes=4)),
    by_parts=False,
)
WAN = Denoiser(
    "Wan",
    holders=(
        f"{TRANSFORMERS}.transformer_wan.WanTransformer3DModel",
        f"{TRANSFORMERS}.transformer_wan_vace.WanVACETransformer3DModel",
    ),
    blocks=(WAN_BLOCK,),
    grid=FRAMES,
    between=("control_hidden_states",),
)
ANIMATE = Denoiser(
    "Wan Animate",
    holders=(f"{TRANSFORMERS}.transformer_wan_animate.WanAnimateTransformer3DModel",),
    blocks=(replace(WAN_BLOCK, path=f"{TRANSFORMERS}.transformer_wan_animate.WanTransformerBlock"),),
    grid=FRAMES,
    between=("face_pixel_values",),
)
CHRONOEDIT = Denoiser(
    "ChronoEdit",
    holders=(f"{TRANSFORMERS}.transformer_chronoedit.ChronoEditTransformer3DModel",),
    blocks=(replace(WAN_BLOCK, path=f"{TRANSFORMERS}.transformer_chronoedit.WanTransformerBlock"),),
    grid=FRAMES,
)
SKYREELS = Denoiser(
    "SkyReels V2",
    holders=(f"{TRANSFORMERS}.transformer_skyreels_v2.SkyReelsV2Transformer3DModel",),
    blocks=(
        replace(
            WAN_BLOCK,
            path=f"{TRANSFORMERS}.transformer_skyreels_v2.SkyReelsV2TransformerBlock",
            cuts=(Cut("rotary_emb", axis=1), Cut("temb", axis=2, axes=4)),
            whole_if=("attention_mask",),
        ),
    ),
    grid=FRAMES,
)
HUNYUAN_MASK = Cut("attention_mask", axis=3, text="behind")
HUNYUAN_DOUBLE = Block(
    f"{TRANSFORMERS}.transformer_hunyuan_video.HunyuanVideoTransformerBlock",
    guide="attn",
    parts=(Part("attn", "attention", attending=TEXT_LAST),),
    output=0,
    cuts=(HUNYUAN_MASK, Cut("freqs_cis", heads=2)),
    by_parts=False,
)
HUNYUAN = Denoiser(
    "HunyuanVideo",
    holders=(f"{TRANSFORMERS}.transformer_hunyuan_video.HunyuanVideoTransformer3DModel",),
    blocks=(
        HUNYUAN_DOUBLE,
        replace(
            HUNYUAN_DOUBLE,
            path=f"{TRANSFORMERS}.transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock",
            cuts=(HUNYUAN_MASK, Cut("image_rotary_emb", heads=2)),
        ),
    ),
    grid=PATCHES,
)
HUNYUAN15 = Denoiser(
    "HunyuanVideo 1.5",
    holders=(f"{TRANSFORMERS}.transformer_hunyuan_video15.HunyuanVideo15Transformer3DModel",),
    blocks=(
        replace(
            HUNYUAN_DOUBLE,
            path=f"{TRANSFORMERS}.transformer_hunyuan_video15.HunyuanVideo15TransformerBlock",
            cuts=(Cut("freqs_cis", heads=2),),
        ),
    ),
    grid=PATCHES,
)
LTX = Denoiser(
    "LTX-Video",
    holders=(f"{TRANSFORMERS}.transformer_ltx.LTXVideoTransformer3DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_ltx.LTXVideoTransformerBlock",
            guide="",
            parts=(SELF, CROSS),
            cuts=(Cut("image_rotary_emb", axis=1), Cut("temb", axis=1)),
            by_parts=False,
        ),
    ),
    grid=OfNumbers("num_frames", "height", "width", "video_coords"),
)
LTX2 = Denoiser(
    "LTX-2",
    holders=(f"{TRANSFORMERS}.transformer_ltx2.LTX2VideoTransformer3DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_ltx2.LTX2VideoTransformerBlock",
            guide="",
            parts=(
                SELF,
                CROSS,
                Part("audio_to_video_attn", "cross_attention"),
                Part("video_to_audio_attn", "cross_attention", attending=Attending(asked=True)),
            ),
            output=0,
            cuts=(
                Cut("video_rotary_emb", axis=-2),
                Cut("ca_video_rotary_emb", axis=-2),
                Cut("temb", axis=1),
                Cut("temb_ca_scale_shift", axis=1),
                Cut("temb_ca_gate", axis=1),
            ),
            by_parts=False,
            whole_if=("self_attention_mask", "perturbation_mask"),
        ),
    ),
    grid=OfNumbers("num_frames", "height", "width", "video_coords"),
    between=("spatio_temporal_guidance_blocks", "perturbation_mask"),
)
COGVIDEOX = Denoiser(
    "CogVideoX",
    holders=(f"{TRANSFORMERS}.cogvideox_transformer_3d.CogVideoXTransformer3DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.cogvideox_transformer_3d.CogVideoXBlock",
            guide="attn1",
            parts=(Part("attn1", "attention", attending=TEXT_FIRST),),
            output=0,
            cuts=(Cut("image_rotary_emb", heads=1),),
            by_parts=False,
        ),
    ),
    grid=OfLatent("bfchw", frames="patch_size_t"),
)
EASYANIMATE = Denoiser(
    "EasyAnimate",
    holders=(f"{TRANSFORMERS}.transformer_easyanimate.EasyAnimateTransformer3DModel",),
    blocks=(replace(COGVIDEOX.blocks[0], path=f"{TRANSFORMERS}.transformer_easyanimate.EasyAnimateTransformerBlock"),),
    grid=PATCHES,
)
ALLEGRO = Denoiser(
    "Allegro",
    holders=(f"{TRANSFORMERS}.transformer_allegro.AllegroTransformer3DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_allegro.AllegroTransformerBlock",
            guide="attn1",
            parts=(SELF, CROSS),
            cuts=(Cut("image_rotary_emb", axis=1, item=1),),
            by_parts=False,
            whole_if=("attention_mask",),
        ),
    ),
    grid=PATCHES,
)
MOCHI = Denoiser(
    "Mochi",
    holders=(f"{TRANSFORMERS}.transformer_mochi.MochiTransformer3DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_mochi.MochiTransformerBlock",
            guide="attn1",
            parts=(Part("attn1", "attention", attending=Attending("behind", each=True)),),
            output=0,
            cuts=(Cut("image_rotary_emb"),),
            by_parts=False,
        ),
    ),
    grid=FRAMES,
)
COSMOS = Denoiser(
    "Cosmos",
    holders=(f"{TRANSFORMERS}.transformer_cosmos.CosmosTransformer3DModel",),
    blocks=(
        Block(
            f"{TRANSFORMERS}.transformer_cosmos.CosmosTransformerBlock",
            guide="attn1",
            parts=(SELF, CROSS),
            cuts=(
                Cut("image_rotary_emb", heads=1),
                Cut("extra_pos_emb", axis=1),
                Cut("embedded_timestep", axis=1, axes=3),
                Cut("temb", axis=1, axes=3),
            ),
            by_parts=False,
            whole_if=("controlnet_residual",),
        ),
    ),
    grid=FRAMES,
    between=("block_controlnet_hidden_states",),
)

VIDEOS = (
    WAN,
    HUNYUAN,
    LTX,
    COGVIDEOX,
    HUNYUAN15,
    MOCHI,
    SKYREELS,
    CHRONOEDIT,
    ALLEGRO,
    COSMOS,
    ANIMATE,
    LTX2,
    EASYANIMATE,
)
