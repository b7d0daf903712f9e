"""Small models of every family with what the everyday machinery around them needs: inputs, heads, pipelines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map_with_path

import denoisers
import families
import turbovlm
import vlms
from families import FAMILIES
from families import _livelier as livelier

GROUPS = ("transformers", "timm", "torchvision", "open_clip", "text", "language", "diffusers")
PLACES = ("img_ids", "txt_ids")
"""Inputs of numbers that say where tokens are."""
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model, accelerated by `settings`; None leaves it as it is.

    Attributes:
        make: builds it, always with the same weights.
        first: its inputs, two images (or prompts) in a batch.
        output: reads a tensor off what its forward returns.
        head: builds the same encoder with a head that computes a loss from labels, `labels` its labels.
        pipes: of `pipelines.PIPES`, those that such a denoiser works in.
    """

    name: str
    group: str
    make: Callable[[], Any]
    first: Callable[[], Inputs]
    output: Callable[[Any], torch.Tensor]
    settings: Mapping[str, Any] | None
    head: Callable[[], Any] | None = None
    labels: Mapping[str, torch.Tensor] = field(default_factory=dict)
    pipes: tuple[str, ...] = ()

    def inputs(self, seed: int = 0) -> Inputs:
        """Inputs of the same shapes for every seed: numbers are rolled, and of words every one is another."""

        def other(path: Any, value: Any) -> Any:
            stays = not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.ndim
            return value if stays or str(path[0].key) in PLACES else value.roll(5 * seed, dims=-1)

        found = tree_map_with_path(other, self.first())
        if self.group == "text":
            found["input_ids"] = (found["input_ids"] + seed) % 90 + 5
        return found

    def run(self, model: Any, inputs: Inputs) -> torch.Tensor:
        """The output for inputs by name."""
        return self.output(model(**inputs))

    def apply(self, model: Any) -> Any:
        """The handle, which is a context manager; of a case without settings, something that does nothing."""
        return _Nothing() if self.settings is None else turbovlm.apply(model, **self.settings)

    @property
    def alone(self) -> Case:
        """The model without turbovlm."""
        return replace(self, settings=None)

    @property
    def library(self) -> str:
        """The library that its model is of."""
        return "transformers" if self.group in ("text", "language") else self.group


class _Nothing(contextlib.nullcontext):  # type: ignore[type-arg]
    def remove(self) -> None:
        pass


SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 48, "patch_size": 8}
CLASSES = {"num_labels": 5}


def _head(name: str, config: str, **settings: Any) -> Callable[[], Any]:
    return families._transformers(name, config, **CLASSES, **settings)


def _vision_head(name: str, config: str, **settings: Any) -> Callable[[], Any]:
    """A classifier whose config holds the image encoder's."""

    def make() -> Any:
        import transformers

        vision = {**SMALL, "intermediate_size": 64, **settings}
        torch.manual_seed(0)
        made = getattr(transformers, config)(vision_config=vision, **CLASSES)
        return livelier(getattr(transformers, name)(made))

    return make


POSITIONS = {"use_absolute_position_embeddings": True, "drop_path_rate": 0.0}
HEADS: dict[str, Callable[[], Any]] = {
    "vit": _head("ViTForImageClassification", "ViTConfig"),
    "deit": _head("DeiTForImageClassification", "DeiTConfig"),
    "vit_msn": _head("ViTMSNForImageClassification", "ViTMSNConfig"),
    "ijepa": _head("IJepaForImageClassification", "IJepaConfig"),
    "vit_mae": families._transformers(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        mask_ratio=0.25,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=48,
    ),
    "video_mae": _head("VideoMAEForVideoClassification", "VideoMAEConfig", num_frames=4, tubelet_size=2),
    "dinov2": _head("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2),
    "dinov2_swiglu": _head("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True),
    "dinov2_registers": _head(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", mlp_ratio=2, num_register_tokens=3
    ),
    "beit": _head("BeitForImageClassification", "BeitConfig", **POSITIONS),
    "data2vec": _head("Data2VecVisionForImageClassification", "Data2VecVisionConfig", **POSITIONS),
    "clip": _vision_head("CLIPForImageClassification", "CLIPConfig"),
    "siglip": _vision_head("SiglipForImageClassification", "SiglipConfig"),
    "siglip2": _vision_head("Siglip2ForImageClassification", "Siglip2Config", num_patches=36),
}
"""Encoders of `families.FAMILIES` with the head that `transformers` has for them."""


def _group(name: str) -> str:
    return next((group for group in ("timm", "torchvision", "open_clip") if name.startswith(group)), "transformers")


def _encoder(name: str) -> Case:
    family = FAMILIES[name]
    labels = {} if name == "vit_mae" else {"labels": torch.tensor([1, 3])}
    return Case(
        name,
        _group(name),
        family.make,
        lambda: family.inputs(2),
        (lambda out: out.pooler_output) if name == "siglip2" else family.output,  # its padding has no value
        {"r": 4},
        HEADS.get(name),
        labels if name in HEADS else {},
    )


TEXT = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "pad_token_id": 0}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 70}
CERTAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _words() -> Inputs:
    ids = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 17:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _text(name: str, kind: str) -> Case:
    def make(what: str) -> Callable[[], Any]:
        def made() -> Any:
            import transformers

            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**TEXT, **CERTAIN, **CLASSES)
            return livelier(getattr(transformers, f"{kind}{what}")(config))

        return made

    return Case(
        name,
        "text",
        make("Model"),
        _words,
        lambda out: out.last_hidden_state,
        {"r": 2},
        make("ForSequenceClassification"),
        {"labels": torch.tensor([1, 3])},
    )


def _vilt() -> Any:
    import transformers

    torch.manual_seed(0)
    size = {**SMALL, "intermediate_size": 64, "vocab_size": 60, "max_image_length": -1, "max_position_embeddings": 12}
    return livelier(transformers.ViltModel(transformers.ViltConfig(**size, **CERTAIN)))


def _words_and_patches() -> Inputs:
    """Patches that are embedded already: the library shuffles those of images."""
    ids = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "image_embeds": vlms.noise(1, 2, 37, 32), "pixel_mask": torch.ones(2, 37)}


def _logits(out: Any) -> torch.Tensor:
    found: torch.Tensor = out.logits
    return found


INSIDE = ("llava", "llava_next", "llava_onevision", "paligemma")
"""Vision-language models whose towers merge as well."""
WORDS = torch.tensor([[2, 5, 6, 7], [2, 8, 9, 10]])


def _vlm(name: str) -> Case:
    family = vlms.VLMS[name]

    def first() -> Inputs:
        return family.inputs(["image", 5, 6, 7], [8, "image", 9, 10])

    def make() -> Any:
        return livelier(vlms.seeded(family.make))

    settings = {"visual_keep": 0.5} | ({"r": 4} if name in INSIDE else {})
    ids = first()["input_ids"]
    labels = ids.masked_fill((ids == family.token) | (ids == vlms.PAD), -100)
    return Case(name, "language", make, first, _logits, settings, make, {"labels": labels})


def _reads_across(name: str, make: Callable[[], Any], settings: Mapping[str, Any], **more: Any) -> Case:
    """A model whose words cross-attend to the image."""

    def first() -> Inputs:
        return {"pixel_values": vlms.noise(0, 2, 3, 48, 48), **more}

    def output(out: Any) -> torch.Tensor:
        return out.logits if hasattr(out, "logits") else out.itm_score

    return Case(name, "language", lambda: livelier(vlms.seeded(make)), first, output, settings)


def _whisper() -> Any:
    return families._sound("WhisperForConditionalGeneration", "WhisperConfig", **families.WHISPER)()


def _speech() -> Inputs:
    return {**FAMILIES["whisper"].inputs(2), "decoder_input_ids": WORDS}


PIPES = {
    "sd15": ("text to image", "image to image", "inpainting", "ControlNet", "T2I-Adapter"),
    "sdxl": ("SDXL", "SDXL image to image"),
    "pixart": ("PixArt",),
    "dit": ("DiT",),
    "sd3": ("SD3", "SD3 image to image"),
    "flux": ("FLUX",),
}


def _denoiser(name: str) -> Case:
    made = denoisers.DENOISERS[name]
    return Case(
        name,
        "diffusers",
        made,
        lambda: made.inputs(2, 16, 16),
        lambda out: out.sample,
        {"keep": 0.5},
        pipes=PIPES.get(name, ()),
    )


_ALL = [
    *map(_encoder, FAMILIES),
    _text("bert", "Bert"),
    _text("roberta", "Roberta"),
    _text("xlm_roberta", "XLMRoberta"),
    _text("electra", "Electra"),
    Case("vilt", "text", _vilt, _words_and_patches, lambda out: out.last_hidden_state[:, :8], {"r": 4}),
    *map(_vlm, vlms.VLMS),
    _reads_across("blip_language", lambda: vlms.blip("ConditionalGeneration"), {"r": 4}, input_ids=WORDS),
    _reads_across("blip_cross_keep", lambda: vlms.blip("ImageTextRetrieval"), {"cross_keep": 0.3}, input_ids=WORDS),
    _reads_across(
        "blip_2_language",
        vlms.blip2,
        {"r": 4},
        input_ids=torch.cat([torch.full((2, 4), vlms.IMAGE), WORDS], dim=1),
    ),
    _reads_across("vision_encoder_decoder", vlms.vision_encoder_decoder, {"r": 4}, decoder_input_ids=WORDS),
    Case("whisper_speech", "language", _whisper, _speech, _logits, {"r": 4}, _whisper, {"labels": WORDS}),
    *map(_denoiser, denoisers.DENOISERS),
]
CASES = {case.name: case for case in _ALL}
