"""Tasks that need no download: scenes of emoji on photographs, and the small models of `turbovlm.zoo` that read them.

Data are drawn from a seed when they are needed. What evaluation draws with, Twemoji on the photographs of scikit-image
and scikit-learn, no model was trained on.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from turbovlm.errors import ConfigError
from turbovlm.evaluate.data import Data, Picture, Sample
from turbovlm.evaluate.run import Predictor

if TYPE_CHECKING:
    from PIL.Image import Image

    from turbovlm.zoo.scenes import Scene

SEED = 2_000_000
"""Of the first scene; those to train and to validate on are counted from 0 and from 1,000,000."""
PIXELS = 224
SIZES = range(14, PIXELS + 1, 14)


@dataclass(frozen=True)
class _Drawn:
    """Draws a scene."""

    scene: Scene

    def __call__(self) -> Image:
        from turbovlm.zoo.scenes import draw_scene

        return draw_scene(self.scene, *_drawings())


@functools.cache
def _drawings() -> tuple[dict[str, Image], list[Image]]:
    from turbovlm.demo.photos import load_photos

    sprites = {sprite.name: sprite.picture for sprite in _all_drawings() if sprite.name}
    return sprites, [photo.image for photo in load_photos()]


def captioning_data(scenes: int) -> Data:
    """A scene each, with its four captions."""
    from turbovlm.zoo.grammar import captions

    samples = (Sample(f"scene-{i}", (_picture(i),), answers=captions(_scene(i)[1])) for i in range(scenes))
    return Data("scenes", tuple(samples), tokenized=True)


def vqa_data(scenes: int) -> Data:
    """Four or five questions about each scene; ids are the scene's and what is asked."""
    from turbovlm.zoo.grammar import questions

    samples = []
    for i in range(scenes):
        chance, scene = _scene(i)
        for q in questions(scene, chance, _names()):
            samples.append(Sample(f"scene-{i}/{q.asks}", (_picture(i),), q.text, (q.answer,)))
    return Data("scenes", tuple(samples))


def nlvr2_data(pairs: int) -> Data:
    """Two statements about each pair of scenes."""
    from turbovlm.zoo.grammar import statement
    from turbovlm.zoo.scenes import make_pair

    samples = []
    for i in range(pairs):
        chance = random.Random(SEED + i)
        pair = make_pair(chance, _names())
        pictures = tuple(Picture(f"pair {i}, {side}", _Drawn(scene)) for side, scene in zip(("left", "right"), pair))
        for number in range(2):
            made = statement(*pair, chance)
            samples.append(Sample(f"pair-{i}/{number}", pictures, made.text, (str(made.true),)))
    return Data("pairs of scenes", tuple(samples))


@dataclass(frozen=True)
class _OnPhoto:
    """Draws one emoji on a photograph, or the region that it covers, white on black."""

    number: int
    is_mask: bool

    def __call__(self) -> Image:
        from PIL import Image

        from turbovlm.zoo.scenes import on_photo

        drawings, photos = _all_drawings(), _drawings()[1]
        drawing = drawings[self.number % len(drawings)].picture
        if self.is_mask:
            white = Image.new("RGBA", drawing.size, "white")
            white.putalpha(drawing.getchannel("A"))
            drawing, photos = white, [Image.new("RGB", photo.size) for photo in photos]
        return on_photo(drawing, photos, random.Random(SEED + self.number))


def saliency_data(pictures: int) -> Data:
    """Emoji on photographs, one in each, and where it is."""
    found = (
        Sample(
            f"emoji-{i}",
            (Picture(f"emoji {i}", _OnPhoto(i, False)),),
            mask=Picture(f"mask of emoji {i}", _OnPhoto(i, True)),
        )
        for i in range(pictures)
    )
    return Data("emoji on photographs", tuple(found))


def saliency_predictor() -> Predictor:
    """The pretrained ViT and its head, which is given every position's token."""
    from turbovlm.zoo import load_saliency_vit

    model = load_saliency_vit()
    return Predictor(model.backbone, _prepare_whole, functools.partial(_find, model), SIZES)


@torch.inference_mode()
def _find(model: Any, prepared: list[torch.Tensor]) -> list[str]:
    import turbovlm
    from turbovlm.evaluate.scoring import encode_map

    pixels = torch.stack(prepared)
    side = pixels.shape[-1] // 14
    tokens = model.backbone(pixel_values=pixels).last_hidden_state
    if tokens.shape[1] < 1 + side * side:
        tokens = turbovlm.get_handle(model.backbone).restore(tokens)
    heat = model.head(tokens[:, 1:].unflatten(1, (side, side)))
    full = torch.nn.functional.interpolate(heat, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)
    return [encode_map(each[0]) for each in full]


def _prepare_whole(sample: Sample, image_size: int | None) -> torch.Tensor:
    """The whole picture, made square."""
    from turbovlm.zoo import preprocess

    size = image_size or PIXELS
    return preprocess([sample.pictures[0].open().resize((size, size), 3)], size)[0]


@functools.cache
def _all_drawings() -> tuple[Any, ...]:
    from turbovlm.zoo.sprites import load_sprites

    return load_sprites()


def zoo_predictor(task: str, name: str, data: Data) -> Predictor:
    """A small model that comes with turbovlm.

    Raises:
        ConfigError: there is none of that name for the task.
    """
    if name == "saliency" and task == "saliency":
        return saliency_predictor()
    if name == "scenes" and task in ("captioning", "vqa", "nlvr2"):
        return scene_predictor(task)
    raise ConfigError(f"model='zoo:{name}': there is zoo:saliency for saliency, zoo:scenes for captioning, vqa, nlvr2")


def scene_predictor(task: str) -> Predictor:
    """The scene reader, asked for captions, answers, or whether statements are true."""
    from turbovlm.zoo.reader import ANSWER, CAPTION, QUESTION, STATEMENT, load_scene_reader

    forms = {
        "captioning": CAPTION,
        "vqa": f"{QUESTION} {{}} {ANSWER}",
        "nlvr2": f"{STATEMENT} {{}} {ANSWER}",
    }
    if task not in forms:
        raise ConfigError(f"task={task!r}: must be one of {', '.join(forms)}")
    reader = load_scene_reader()
    return Predictor(reader.encoder, _prepare_pictures, functools.partial(_read, reader, forms[task]), SIZES)


@torch.inference_mode()
def _read(reader: Any, form: str, prepared: list[tuple[tuple[str, ...], torch.Tensor, str]]) -> list[str]:
    """Pictures that several samples of the batch share are looked at once; texts of one length are read together."""
    rows = {names: pixels for names, pixels, _ in prepared}
    tokens = dict(zip(rows, reader.look(torch.stack(list(rows.values())))))
    beginnings = [form.format(text) for _, _, text in prepared]
    answers = [""] * len(prepared)
    for length in sorted({len(text.split()) for text in beginnings}):
        some = [i for i, text in enumerate(beginnings) if len(text.split()) == length]
        seen = torch.stack([tokens[prepared[i][0]] for i in some])
        for i, answer in zip(some, reader.write(seen, [beginnings[i] for i in some])):
            answers[i] = answer
    return answers


def _prepare_pictures(sample: Sample, image_size: int | None) -> tuple[tuple[str, ...], torch.Tensor, str]:
    from turbovlm.zoo import preprocess

    pixels = preprocess([picture.open() for picture in sample.pictures], image_size or PIXELS)
    return tuple(p.name for p in sample.pictures), pixels if len(pixels) > 1 else pixels[0], sample.text


def _scene(number: int) -> tuple[random.Random, Scene]:
    """A scene, and the chance it was made with, to go on with."""
    from turbovlm.zoo.scenes import make_scene

    chance = random.Random(SEED + number)
    return chance, make_scene(chance, _names())


def _picture(number: int) -> Picture:
    return Picture(f"scene {number}", _Drawn(_scene(number)[1]))


def _names() -> tuple[str, ...]:
    from turbovlm.zoo.sprites import SCENE_NAMES

    return tuple(SCENE_NAMES)


DATA: dict[str, Callable[[int], Data]] = {
    "captioning": captioning_data,
    "vqa": vqa_data,
    "nlvr2": nlvr2_data,
    "saliency": saliency_data,
}
MODELS = {"captioning": "zoo:scenes", "vqa": "zoo:scenes", "nlvr2": "zoo:scenes", "saliency": "zoo:saliency"}
PICTURES = 200
"""Scenes, pairs or pictures of a task, unless another number is asked for."""
