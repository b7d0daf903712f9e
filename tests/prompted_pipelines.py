"""Small pipelines of `diffusers` that are given embeddings of prompts, one for each image, and their seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import denoisers
from denoisers import DENOISERS, noise
from families import _livelier as livelier

FACTOR = 8
"""Pixels a side of a latent pixel."""


def vae(channels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    made = AutoencoderKL(
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=channels,
        shift_factor=0.1,
        **kinds,
    )
    return made.eval()


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _named(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


@dataclass(frozen=True)
class Pipe:
    """How to make one and how to call it.

    Args:
        make: gives a new one.
        prompt: for the rows of the prompts in one call: what the pipeline is given for them.
        settings: of every call.
        images: what else it is given for latents of rows × columns: images and masks.
        multiple: what the sides of the latent are a multiple of.
        sized: whether it is told the size of the image.
    """

    make: Callable[[], Any]
    prompt: Callable[[list[int]], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    images: Callable[[int, int], dict[str, Any]] = lambda rows, columns: {}
    multiple: int = 1
    sized: bool = True

    def __call__(self) -> Any:
        return _quiet(self.make())

    def run(
        self,
        pipe: Any,
        rows: int = 32,
        columns: int = 32,
        which: tuple[int, ...] = (0,),
        seeds: tuple[int, ...] | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """The latents that it makes for some of the prompts, each image from a seed of its own."""
        seeds = which if seeds is None else seeds
        size = {"height": rows * FACTOR, "width": columns * FACTOR} if self.sized else {}
        given: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", **size}
        given |= self.prompt(list(which)) | self.images(rows, columns) | self.settings
        given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(**{**given, **more}).images


def words(which: list[int], seed: int, width: int = 32) -> torch.Tensor:
    return torch.cat([noise(100 * seed + i, 1, 7, width) for i in which])


def pooled(which: list[int], seed: int) -> torch.Tensor:
    return torch.cat([noise(100 * seed + i, 1, 32) for i in which])


def guided(which: list[int]) -> dict[str, Any]:
    return {"prompt_embeds": words(which, 5), "negative_prompt_embeds": words(which, 6)}


def pooled_too(which: list[int]) -> dict[str, Any]:
    given = {"pooled_prompt_embeds": pooled(which, 7), "negative_pooled_prompt_embeds": pooled(which, 8)}
    return guided(which) | given


def unguided(which: list[int]) -> dict[str, Any]:
    return {"prompt_embeds": words(which, 5), "pooled_prompt_embeds": pooled(which, 7)}


def masked(which: list[int]) -> dict[str, Any]:
    mask = torch.ones(len(which), 7)
    mask[:, 5:] = 0
    return guided(which) | {
        "prompt": None,
        "negative_prompt": None,
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "use_resolution_binning": False,
    }


def image(seed: int, rows: int, columns: int) -> torch.Tensor:
    return noise(seed, 1, 3, rows * FACTOR, columns * FACTOR).sigmoid()


def with_image(rows: int, columns: int) -> dict[str, Any]:
    return {"image": image(11, rows, columns)}


def with_mask(rows: int, columns: int) -> dict[str, Any]:
    mask = torch.zeros(1, 1, rows * FACTOR, columns * FACTOR)
    mask[..., : columns * 4] = 1
    return {"image": image(11, rows, columns), "mask_image": mask}


def stable(name: str, scheduler: str = "DDIMScheduler", **unet: Any) -> Callable[[], Any]:
    """A pipeline around Stable Diffusion's UNet."""

    def make() -> Any:
        torch.manual_seed(0)
        parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
        model = livelier(denoisers.unet(sample_size=32, **unet))
        return _named(name)(
            vae=vae(), unet=model, scheduler=_named(scheduler)(), requires_safety_checker=False, **parts
        )

    return make


def controlled(count: int) -> Callable[[], Any]:
    def control(seed: int) -> Any:
        from diffusers import ControlNetModel

        torch.manual_seed(seed)
        size = {"block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 32}
        size |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 8}
        return livelier(ControlNetModel(norm_num_groups=8, conditioning_embedding_out_channels=(8, 8, 8, 8), **size))

    def make() -> Any:
        from diffusers import StableDiffusionControlNetPipeline

        found = stable("StableDiffusionPipeline")().components
        found |= {"controlnet": [control(i) for i in range(count)] if count > 1 else control(0)}
        return StableDiffusionControlNetPipeline(**found, requires_safety_checker=False)

    return make


def adapted() -> Any:
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

    torch.manual_seed(0)
    adapter = T2IAdapter(channels=[32, 64], num_res_blocks=2, downscale_factor=8, adapter_type="full_adapter")
    found = stable("StableDiffusionPipeline")().components
    return StableDiffusionAdapterPipeline(
        **{k: v for k, v in found.items() if k != "image_encoder"},
        adapter=livelier(adapter),
        requires_safety_checker=False,
    )


def sdxl(name: str, channels: int = 4, ids: int = 6, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
        added |= {"projection_class_embeddings_input_dim": ids * 8 + 32, "transformer_layers_per_block": (1, 5)}
        kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        kinds |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
        unet = livelier(denoisers.unet(sample_size=32, in_channels=channels, **added, **kinds))
        parts = {"text_encoder": None, "text_encoder_2": Projection(), "tokenizer": None, "tokenizer_2": None}
        return _named(name)(vae=vae(), unet=unet, scheduler=_named("EulerDiscreteScheduler")(), **parts, **more)

    return make


class Projection(torch.nn.Module):
    """Stands for the second text encoder, of which only the width is asked."""

    config = type("Config", (), {"projection_dim": 32})()
    dtype = torch.float32
    device = torch.device("cpu")


def transformer(name: str, family: str, scheduler: str, channels: int = 4, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        parts = {"transformer": DENOISERS[family](), "vae": vae(channels), "scheduler": _named(scheduler)()}
        return _named(name)(**parts, **more)

    return make


NO_T5 = {"text_encoder": None, "tokenizer": None}
NO_CLIP = NO_T5 | {"text_encoder_2": None, "tokenizer_2": None}
NO_CLIPS = NO_CLIP | {"text_encoder_3": None, "tokenizer_3": None}


def flux(name: str, channels: int = 16) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        size = {"patch_size": 1, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16}
        size |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
        model = _named("FluxTransformer2DModel")(
            in_channels=channels, out_channels=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True, **size
        )
        parts = {"transformer": livelier(model), "vae": vae(), "scheduler": _named("FlowMatchEulerDiscreteScheduler")()}
        return _named(name)(**parts, **NO_CLIP)

    return make


FLOW = "FlowMatchEulerDiscreteScheduler"
PIPES = {
    "sd": Pipe(stable("StableDiffusionPipeline"), guided),
    "sd-lcm": Pipe(stable("StableDiffusionPipeline", "LCMScheduler", time_cond_proj_dim=16), guided),
    "sd-heun": Pipe(stable("StableDiffusionPipeline", "HeunDiscreteScheduler"), guided),
    "sd-img2img": Pipe(stable("StableDiffusionImg2ImgPipeline"), guided, {}, with_image, sized=False),
    "sd-inpaint": Pipe(stable("StableDiffusionInpaintPipeline"), guided, {}, with_mask),
    "sd-inpaint9": Pipe(stable("StableDiffusionInpaintPipeline", in_channels=9), guided, {}, with_mask),
    "sd-pix2pix": Pipe(
        stable("StableDiffusionInstructPix2PixPipeline", in_channels=8), guided, {}, with_image, sized=False
    ),
    "sd-control": Pipe(controlled(1), guided, {}, with_image),
    "sd-controls": Pipe(controlled(2), guided, {}, lambda r, c: {"image": [image(i, r, c) for i in (1, 2)]}),
    "sd-adapter": Pipe(adapted, guided, {}, with_image),
    "sdxl": Pipe(sdxl("StableDiffusionXLPipeline"), pooled_too),
    "sdxl-refiner": Pipe(
        sdxl("StableDiffusionXLImg2ImgPipeline", ids=5, requires_aesthetics_score=True),
        pooled_too,
        {"strength": 0.8},
        with_image,
        sized=False,
    ),
    "sdxl-inpaint": Pipe(sdxl("StableDiffusionXLInpaintPipeline", channels=9), pooled_too, {}, with_mask),
    "pixart": Pipe(
        transformer("PixArtAlphaPipeline", "pixart", "DPMSolverMultistepScheduler", **NO_T5), masked, multiple=2
    ),
    "sd3": Pipe(transformer("StableDiffusion3Pipeline", "sd3", FLOW, **NO_CLIPS), pooled_too, multiple=2),
    "sd3.5": Pipe(transformer("StableDiffusion3Pipeline", "sd35", FLOW, **NO_CLIPS), pooled_too, multiple=2),
    "sd3-img2img": Pipe(
        transformer("StableDiffusion3Img2ImgPipeline", "sd3", FLOW, **NO_CLIPS), pooled_too, {}, with_image, 2
    ),
    "flux": Pipe(flux("FluxPipeline"), unguided, multiple=2),
    "flux-cfg": Pipe(flux("FluxPipeline"), pooled_too, {"true_cfg_scale": 3.0}, multiple=2),
    "flux-img2img": Pipe(flux("FluxImg2ImgPipeline"), unguided, {}, with_image, 2),
    "flux-fill": Pipe(flux("FluxFillPipeline", 16 + 16 + 4 * FACTOR**2), unguided, {}, with_mask, 2),
    "flux-control": Pipe(
        flux("FluxControlPipeline", 32), unguided, {}, lambda r, c: {"control_image": image(1, r, c)}, 2
    ),
}
