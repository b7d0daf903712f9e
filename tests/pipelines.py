"""Small pipelines of `diffusers` around the small denoisers, each with the call that makes images of a size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from denoisers import DENOISERS, dit, noise, unet

NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXT_2 = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@dataclass(frozen=True)
class Pipe:
    """How to make a pipeline, and what its call takes for an image of `height`×`width`."""

    make: Callable[[], Any]
    inputs: Callable[[int, int], dict[str, Any]]

    def __call__(self) -> Any:
        torch.manual_seed(0)
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        return pipe


def vae(**settings: Any) -> Any:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    size = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    return AutoencoderKL(**size, **kinds, **settings).eval()


def stable_diffusion(kind: str, denoiser: Callable[[], Any], **parts: Any) -> Any:
    import diffusers

    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return getattr(diffusers, kind)(
        vae=vae(), unet=denoiser(), scheduler=scheduler, **{**NO_TEXT, **UNCHECKED, **parts}
    )


def of_words(height: int, width: int) -> dict[str, Any]:
    text = {"prompt_embeds": noise(5, 1, 7, 32), "negative_prompt_embeds": noise(6, 1, 7, 32)}
    return {**text, "height": height, "width": width}


def of_images(height: int, width: int, *names: str, **more: Any) -> dict[str, Any]:
    made = {name: noise(8 + i, 1, 3, height, width).sigmoid() for i, name in enumerate(names)}
    text = {name: value for name, value in of_words(height, width).items() if name.endswith("embeds")}
    return {**text, **made, **more}


def inpainted(height: int, width: int) -> dict[str, Any]:
    mask = (torch.arange(height * width).view(1, 1, height, width) % width > width // 2).float()
    return {**of_images(height, width, "image", mask_image=mask), "height": height, "width": width}


def controlled(count: int) -> Any:
    from diffusers import ControlNetModel

    model = DENOISERS["sd15"]()
    nets = [ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(8, 16)) for _ in range(count)]
    for parameter in (p for net in nets for p in net.parameters()):
        torch.nn.init.normal_(parameter, std=0.05)
    return stable_diffusion(
        "StableDiffusionControlNetPipeline", lambda: model, controlnet=nets if count > 1 else nets[0]
    )


def adapted() -> Any:
    from diffusers import T2IAdapter

    adapter = T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=2)
    return stable_diffusion("StableDiffusionAdapterPipeline", DENOISERS["sd15"], adapter=adapter)


def xl(kind: str = "StableDiffusionXLPipeline") -> Any:
    import diffusers

    scheduler = diffusers.EulerDiscreteScheduler()
    return getattr(diffusers, kind)(
        vae=vae(), unet=DENOISERS["sdxl"](), scheduler=scheduler, **NO_TEXT_2, add_watermarker=False
    )


def pooled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        **inputs,
        "pooled_prompt_embeds": noise(7, 1, 32),
        "negative_pooled_prompt_embeds": noise(8, 1, 32),
    }


def sd3(kind: str = "StableDiffusion3Pipeline") -> Any:
    import diffusers

    texts = {**NO_TEXT_2, "text_encoder_3": None, "tokenizer_3": None}
    return getattr(diffusers, kind)(
        transformer=DENOISERS["sd3"](),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.0),
        **texts,
    )


def flux() -> Any:
    import diffusers

    return diffusers.FluxPipeline(
        transformer=DENOISERS["flux"](),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.0),
        **NO_TEXT_2,
    )


def of_flux(height: int, width: int) -> dict[str, Any]:
    text = {"prompt_embeds": noise(5, 1, 7, 32), "pooled_prompt_embeds": noise(7, 1, 32)}
    return {**text, "height": height, "width": width}


def pixart() -> Any:
    import diffusers

    return diffusers.PixArtAlphaPipeline(
        transformer=DENOISERS["pixart"](), scheduler=diffusers.DPMSolverMultistepScheduler(), vae=vae(), **NO_TEXT
    )


def of_pixart(height: int, width: int) -> dict[str, Any]:
    masks = {"prompt_attention_mask": torch.ones(1, 7), "negative_prompt_attention_mask": torch.ones(1, 7)}
    return {**of_words(height, width), **masks, "negative_prompt": None, "use_resolution_binning": False}


def classes() -> Any:
    import diffusers

    return diffusers.DiTPipeline(
        transformer=dit(num_embeds_ada_norm=1000).eval(), vae=vae(), scheduler=diffusers.DDIMScheduler()
    )


SD = "StableDiffusion"
PIPES = {
    "text to image": Pipe(lambda: stable_diffusion(f"{SD}Pipeline", DENOISERS["sd15"]), of_words),
    "image to image": Pipe(
        lambda: stable_diffusion(f"{SD}Img2ImgPipeline", DENOISERS["sd15"]),
        lambda h, w: of_images(h, w, "image", strength=0.9),
    ),
    "inpainting": Pipe(lambda: stable_diffusion(f"{SD}InpaintPipeline", DENOISERS["sd15"]), inpainted),
    "inpainting, 9 channels": Pipe(
        lambda: stable_diffusion(f"{SD}InpaintPipeline", lambda: unet(in_channels=9)), inpainted
    ),
    "ControlNet": Pipe(lambda: controlled(1), lambda h, w: of_images(h, w, "image")),
    "two ControlNets": Pipe(
        lambda: controlled(2), lambda h, w: {**of_images(h, w), "image": [noise(8, 1, 3, h, w).sigmoid()] * 2}
    ),
    "T2I-Adapter": Pipe(adapted, lambda h, w: {**of_words(h, w), **of_images(h, w, "image")}),
    "SDXL": Pipe(xl, lambda h, w: pooled(of_words(h, w))),
    "SDXL image to image": Pipe(
        lambda: xl("StableDiffusionXLImg2ImgPipeline"),
        lambda h, w: pooled(of_images(h, w, "image", strength=0.9)),
    ),
    "SD3": Pipe(sd3, lambda h, w: pooled(of_words(h, w))),
    "SD3 image to image": Pipe(
        lambda: sd3("StableDiffusion3Img2ImgPipeline"),
        lambda h, w: pooled({**of_images(h, w, "image"), "height": h, "width": w}),
    ),
    "FLUX": Pipe(flux, of_flux),
    "PixArt": Pipe(pixart, of_pixart),
    "DiT": Pipe(classes, lambda h, w: {"class_labels": [3]}),
}
