"""Small pipelines of `diffusers` that edit: each puts its references into the sequence of what it denoises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from denoisers import noise
from families import _livelier as livelier
from image_denoisers import made
from image_denoisers import qwen as qwen_transformer
from prompted_pipelines import FLOW, Projection, flux, vae
from several_denoisers import SEVERAL
from video_denoisers import ltx

SIDES = (160, 128)
"""Width and height of the images that are given, in pixels."""


@dataclass(frozen=True)
class Edit:
    """How to make a pipeline, what it is called with, and the images that its denoiser is given.

    Args:
        make: gives a new one.
        given: what it is called with, for prompts `which`.
        images: rows and columns of tokens of each image in the sequence, in its order.
        smaller: the module that has a `calculate_dimensions`, by which references have a megapixel.
        batched: whether it makes several images at once.
        two: whether that gives two numbers, and not three.
        whole: why all of its blocks are left whole; None where they merge.
    """

    make: Callable[[], Any]
    given: Callable[[list[int]], dict[str, Any]]
    images: tuple[tuple[int, ...], ...]
    smaller: str | None = None
    batched: bool = True
    whole: str | None = None
    two: bool = True

    def __call__(self) -> Any:
        torch.manual_seed(0)
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any, which: tuple[int, ...] = (0,), **more: Any) -> torch.Tensor:
        given = {"num_inference_steps": 3, "output_type": "latent", **self.given(list(which)), **more}
        generators = [torch.Generator().manual_seed(seed) for seed in which]
        given["generator"] = generators if len(which) > 1 else generators[0]
        if self.smaller is None:
            return made_by(pipe, given)
        path = f"diffusers.pipelines.{self.smaller}.calculate_dimensions"
        with patch(path, lambda area, ratio: SIDES if self.two else (*SIDES, None)):
            return made_by(pipe, given)


def made_by(pipe: Any, given: dict[str, Any]) -> torch.Tensor:
    found = pipe(**given)[0]
    return torch.stack(found) if isinstance(found, list) else found


def image(seed: int, width: int = SIDES[0], height: int = SIDES[1]) -> Any:
    from PIL import Image

    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((255 * pixels).byte().numpy())


def words(which: list[int], seed: int) -> torch.Tensor:
    return torch.cat([noise(100 * seed + i, 1, 7, 32) for i in which])


def pooled(which: list[int], seed: int) -> torch.Tensor:
    return torch.cat([noise(100 * seed + i, 1, 32) for i in which])


def kontext(which: list[int]) -> dict[str, Any]:
    return {
        "image": image(1),
        "prompt_embeds": words(which, 5),
        "pooled_prompt_embeds": pooled(which, 7),
        "height": 128,
        "width": 192,
        "max_area": 128 * 192,
        "_auto_resize": False,
    }


def kontext_guided(which: list[int]) -> dict[str, Any]:
    negative = {"negative_prompt_embeds": words(which, 6), "negative_pooled_prompt_embeds": pooled(which, 8)}
    return {**kontext(which), **negative, "true_cfg_scale": 3.0}


def inpainted(which: list[int]) -> dict[str, Any]:
    return {**kontext(which), "image": image(1, 192), "mask_image": image(2, 192).convert("L")}


def by_reference(which: list[int]) -> dict[str, Any]:
    return {**inpainted(which), "image_reference": image(3)}


def cloze() -> Any:
    made_of = flux("FluxPipeline", 16 + 16 + 4 * 8**2)().components
    parts = {name: part for name, part in made_of.items() if name not in ("image_encoder", "feature_extractor")}
    pipe = diffusers_class("VisualClozeGenerationPipeline")(**parts, resolution=128)
    pipe.encode_prompt = lambda **given: (words([0], 5), pooled([0], 7), torch.zeros(7, 3))  # it takes no embeddings
    return pipe


def cloze_given(which: list[int]) -> dict[str, Any]:
    example, query = [image(1), image(2)], [image(3), None]
    return {
        "task_prompt": "from one to the other",
        "content_prompt": "a cat",
        "image": [example, query],
    }


def diffusers_class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def scheduler() -> Any:
    return diffusers_class(FLOW)()


def qwen(name: str, colours: int = 3, **model: Any) -> Callable[[], Any]:
    def make() -> Any:
        size = {"base_dim": 4, "z_dim": 16, "num_res_blocks": 1, "input_channels": colours}
        decoder = made("AutoencoderKLQwenImage", **size)
        texts = {"text_encoder": Projection(), "tokenizer": None, "processor": None}
        denoiser = livelier(qwen_transformer(in_channels=64, out_channels=16, **model))
        parts = {"transformer": denoiser, "vae": decoder.eval(), "scheduler": scheduler(), **texts}
        return diffusers_class(name)(**parts)

    return make


def of_qwen(which: list[int]) -> dict[str, Any]:
    mask = torch.ones(len(which), 7, dtype=torch.long)
    return {
        "image": image(1),
        "prompt_embeds": words(which, 5),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": words(which, 6),
        "negative_prompt_embeds_mask": mask,
        "height": 128,
        "width": 192,
    }


def layered(which: list[int]) -> dict[str, Any]:
    given = of_qwen(which)
    del given["height"], given["width"]
    return {**given, "prompt": ["a"] * len(which), "layers": 2, "output_type": "pt", "image": image(1).convert("RGBA")}


def flux2(name: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        size = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 4}
        decoder = made("AutoencoderKLFlux2", **size, **kinds)
        parts = {"transformer": SEVERAL["flux2, two references"](), "vae": decoder.eval(), "scheduler": scheduler()}
        return diffusers_class(name)(**parts, text_encoder=None, tokenizer=None, **more)

    return make


def of_flux2(which: list[int]) -> dict[str, Any]:
    references = [image(1), image(2, 128, 160)]
    return {"image": references, "prompt_embeds": words(which, 5), "height": 128, "width": 192}


def guided(which: list[int]) -> dict[str, Any]:
    return {**of_flux2(which), "negative_prompt_embeds": words(which, 6), "guidance_scale": 4.0}


def flux2_inpainted(which: list[int]) -> dict[str, Any]:
    given = {**guided(which), "image": image(1, 192), "mask_image": image(2, 192).convert("L")}
    return {**given, "image_reference": image(3, 128, 160)}


class Processor:
    """Stands for the one that gives the text encoder its images."""

    image_processor = None


def longcat() -> Any:
    model = livelier(longcat_transformer())
    texts = {"text_encoder": None, "tokenizer": None, "text_processor": Processor()}
    parts = {"transformer": model, "vae": vae(16), "scheduler": scheduler(), **texts}
    pipe = diffusers_class("LongCatImageEditPipeline")(**parts)
    pipe.encode_prompt = lambda prompt, **given: (words([0], 6 if prompt == "" else 5), torch.zeros(7, 3))
    return pipe


def longcat_transformer() -> Any:
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 32, "num_layers": 2}
    axes = {"axes_dims_rope": (4, 4, 8), "in_channels": 64, "pooled_projection_dim": 32, "num_single_layers": 3}
    return made("LongCatImageTransformer2DModel", **size, **axes)


def of_longcat(which: list[int]) -> dict[str, Any]:
    return {"image": image(1), "prompt": "a cat"}


def ltx_condition() -> Any:
    size = {"block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4, "latent_channels": 4}
    size |= {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
    decoder = made("AutoencoderKLLTXVideo", **size)
    parts = {"transformer": livelier(ltx()), "vae": decoder.eval(), "scheduler": scheduler()}
    return diffusers_class("LTXConditionPipeline")(**parts, text_encoder=None, tokenizer=None)


def of_ltx(which: list[int]) -> dict[str, Any]:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    mask = torch.ones(len(which), 7, dtype=torch.long)
    return {
        "conditions": [LTXVideoCondition(image=image(1, 320, 288), frame_index=8)],
        "prompt_embeds": words(which, 5),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": words(which, 6),
        "negative_prompt_attention_mask": mask,
        "height": 288,
        "width": 320,
        "num_frames": 17,
    }


BESIDE = (8, 12), (8, 10)
EDITS = {
    "kontext": Edit(flux("FluxKontextPipeline"), kontext, BESIDE),
    "kontext, guided": Edit(flux("FluxKontextPipeline"), kontext_guided, BESIDE),
    "kontext inpaint": Edit(flux("FluxKontextInpaintPipeline"), inpainted, ((8, 12), (8, 12)), batched=False),
    "kontext inpaint, by reference": Edit(flux("FluxKontextInpaintPipeline"), by_reference, BESIDE, batched=False),
    "visual cloze": Edit(cloze, cloze_given, ((7, 16), (7, 16)), batched=False),
    "qwen edit": Edit(qwen("QwenImageEditPipeline"), of_qwen, BESIDE, "qwenimage.pipeline_qwenimage_edit", two=False),
    "qwen edit plus": Edit(
        qwen("QwenImageEditPlusPipeline", zero_cond_t=True),
        lambda which: {**of_qwen(which), "image": [image(1), image(2)]},
        (*BESIDE, (8, 10)),
        "qwenimage.pipeline_qwenimage_edit_plus",
        batched=False,
    ),
    "qwen edit inpaint": Edit(
        qwen("QwenImageEditInpaintPipeline"),
        lambda which: {**of_qwen(which), "mask_image": image(2).convert("L")},
        ((8, 10), (8, 10)),
        "qwenimage.pipeline_qwenimage_edit_inpaint",
        two=False,
        batched=False,
    ),
    "qwen layered": Edit(
        qwen("QwenImageLayeredPipeline", 4, use_layer3d_rope=True),
        layered,
        ((8, 10),) * 4,
        "qwenimage.pipeline_qwenimage_layered",
        batched=False,
    ),
    "flux2": Edit(flux2("Flux2Pipeline"), of_flux2, (*BESIDE, (10, 8))),
    "flux2 klein": Edit(flux2("Flux2KleinPipeline"), guided, (*BESIDE, (10, 8))),
    "flux2 klein inpaint": Edit(
        flux2("Flux2KleinInpaintPipeline"), flux2_inpainted, ((8, 12), (8, 12), (10, 8)), batched=False
    ),
    "flux2 klein kv": Edit(
        flux2("Flux2KleinKVPipeline"), of_flux2, ((8, 10), (10, 8), (8, 12)), whole="it is given kv_cache_mode"
    ),
    "longcat edit": Edit(
        longcat, of_longcat, ((8, 10), (8, 10)), "longcat_image.pipeline_longcat_image_edit", batched=False
    ),
    "ltx condition": Edit(ltx_condition, of_ltx, ((1, 9, 10), (3, 9, 10)), batched=False),
}
