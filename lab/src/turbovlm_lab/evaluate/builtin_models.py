"""The small models of `turbovlm_lab.zoo`, as tasks ask them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.encoder import rows
from turbovlm.errors import ConfigError
from turbovlm_lab.evaluate.data import Sample
from turbovlm_lab.evaluate.predictors.encoders import Pair, likeliest, vectors_of
from turbovlm_lab.evaluate.predictors.images import DEFAULT, Features, Making, made_by
from turbovlm_lab.evaluate.run import Predictor
from turbovlm_lab.evaluate.scoring import encode_map

if TYPE_CHECKING:
    from turbovlm_lab.zoo.reader import SceneReader

PIXELS = 224
SIZES = range(14, PIXELS + 1, 14)
MODELS = {
    "classification": "zoo:classifier",
    "retrieval": "zoo:pairs",
    "captioning": "zoo:scenes",
    "vqa": "zoo:scenes",
    "nlvr2": "zoo:scenes",
    "saliency": "zoo:saliency",
    "text-to-image": "zoo:emoji",
}
"""Of each task."""
MORE = {
    "classification": ("zoo:clip",),
    "retrieval": ("zoo:clip",),
    "captioning": ("zoo:clip-scenes",),
    "vqa": ("zoo:clip-scenes",),
    "nlvr2": ("zoo:clip-scenes",),
}
"""Those that a task takes beside them, where they are asked for."""
EYES_OF = {"scenes": "vit", "clip-scenes": "clip"}
"""What a scene reader looks with."""

EMOJI = {"steps": 10, "guidance": 3.0}
"""How the emoji model makes images, unless told otherwise."""


def zoo_predictor(
    task: str, name: str, samples: Sequence[Sample] = (), making: Making = DEFAULT, features: Features | None = None
) -> Predictor:
    """A small model that comes with turbovlm; `samples`, `making` and `features` are of text-to-image alone.

    Raises:
        ConfigError: there is none of that name for the task.
        TurboError: its weights are not there.
    """
    known = ([MODELS[task]] if task in MODELS else []) + list(MORE.get(task, ()))
    if f"zoo:{name}" not in known:
        raise ConfigError(f"model='zoo:{name}': of the zoo, {task} takes {' or '.join(known) or 'none'}")
    if task == "text-to-image":
        from turbovlm_lab.zoo.emoji import load_emoji_pipeline

        if features is None:
            raise ValueError("text-to-image needs features")
        given = {name: value for name, value in vars(making).items() if value is not None}
        return made_by(load_emoji_pipeline(), samples, Making(**(EMOJI | given)), features)
    if task == "saliency":
        return _saliency()
    if task == "classification":
        return _classification()
    if name == "clip":
        from turbovlm_lab.evaluate.predictors.clip import clip_by_texts

        return clip_by_texts()
    if task == "retrieval":
        return _retrieval()
    from turbovlm_lab.zoo.reader import load_scene_reader

    return reading(task, load_scene_reader(EYES_OF[name]))


def _saliency() -> Predictor:
    """The pretrained ViT and its head, which reads every position."""
    from turbovlm_lab.zoo import load_saliency_vit

    model = load_saliency_vit()
    return Predictor(model.backbone, _whole, functools.partial(_find, model), SIZES, dense=True)


@torch.inference_mode()
def _find(model: Any, prepared: list[Tensor]) -> list[str]:
    pixels = torch.stack(prepared)
    side = pixels.shape[-1] // 14
    tokens = model.backbone(pixel_values=pixels).last_hidden_state
    heat = model.head(tokens[:, 1:].unflatten(1, (side, side)))
    full = F.interpolate(heat, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)
    return [encode_map(each[0]) for each in full]


def _whole(sample: Sample, image_size: int | None) -> Tensor:
    """The whole image, made square."""
    from PIL.Image import Resampling

    from turbovlm_lab.zoo import preprocess

    size = image_size or PIXELS
    return preprocess([sample.images[0].open().resize((size, size), Resampling.BICUBIC)], size)[0]


def _classification() -> Predictor:
    from turbovlm_lab.zoo.dual_encoder import load_emoji_classifier

    model: Any = load_emoji_classifier()

    @torch.inference_mode()
    def predict(prepared: list[Tensor]) -> list[Any]:
        return likeliest(model(pixel_values=torch.stack(prepared)).logits)

    return Predictor(model, _whole, predict, SIZES)


def _retrieval() -> Predictor:
    from turbovlm_lab.zoo import preprocess
    from turbovlm_lab.zoo.dual_encoder import load_dual_encoder

    model = load_dual_encoder()

    def pixels(image: Any, image_size: int | None) -> Tensor:
        return preprocess([image], image_size or PIXELS)[0]

    pair = Pair(model.vision, pixels, lambda batch, _: model.encode_image(batch), model.encode_text, SIZES)
    return vectors_of(pair)


def reading(task: str, reader: SceneReader, dense: bool = True) -> Predictor:
    """The scene reader, asked for captions, answers, or whether statements are true.

    Args:
        dense: whether it reads every position, restored; else it reads merged tokens, by their sizes.
    """
    from turbovlm_lab.zoo.reader import ANSWER, CAPTION, QUESTION, STATEMENT

    forms = {
        "captioning": CAPTION,
        "vqa": f"{QUESTION} {{}} {ANSWER}",
        "nlvr2": f"{STATEMENT} {{}} {ANSWER}",
    }
    read = functools.partial(_read, reader, forms[task], task == "nlvr2")
    images = functools.partial(_images, reader.eyes.preprocess)
    sizes = range(reader.eyes.patch, PIXELS + 1, reader.eyes.patch)
    return Predictor(reader.encoder if dense else reader, images, read, sizes, dense=dense)


@torch.inference_mode()
def _read(reader: Any, form: str, is_truth: bool, prepared: list[tuple[tuple[str, ...], Tensor, str]]) -> list[str]:
    """Images that several samples of the batch share are looked at once; texts of one length are read together."""
    images = {names: pixels for names, pixels, _ in prepared}
    tokens, row = reader.look(torch.stack(list(images.values()))), {names: i for i, names in enumerate(images)}
    beginnings = [form.format(text) for _, _, text in prepared]
    answers = [""] * len(prepared)
    for length in sorted({len(text.split()) for text in beginnings}):
        some = [i for i, text in enumerate(beginnings) if len(text.split()) == length]
        seen = rows(tokens, torch.tensor([row[prepared[i][0]] for i in some]))
        for i, answer in zip(some, reader.write(seen, [beginnings[i] for i in some])):
            answers[i] = answer.capitalize() if is_truth else answer
    return answers


def _images(
    preprocess: Callable[..., Tensor], sample: Sample, image_size: int | None
) -> tuple[tuple[str, ...], Tensor, str]:
    pixels = preprocess([image.open() for image in sample.images], image_size or PIXELS)
    return tuple(p.name for p in sample.images), pixels if len(pixels) > 1 else pixels[0], sample.text
