"""Data that need no download: emoji on photographs, alone and as scenes, drawn from a seed when they are needed.

What evaluation draws with, Twemoji on the photographs of scikit-image and scikit-learn, no model of `turbovlm_lab.zoo`
was trained on, but for the text-to-image model, whose styles Twemoji is one of.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turbovlm_lab.evaluate.data import Data, LazyImage, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from turbovlm_lab.zoo.scenes import Scene

SEED = 2_000_000
"""Of the first scene; those to train and to validate on are counted from 0 and from 1,000,000."""
IMAGES = 200
"""Scenes, pairs or images of a task, unless another number is asked for."""


@dataclass(frozen=True)
class _Scene:
    """Draws a scene."""

    scene: Scene

    def __call__(self) -> Image:
        return _drawn(self.scene)


@dataclass(frozen=True)
class _OnPhoto:
    """Draws one emoji on a photograph, or the region that it covers, white on black."""

    emoji: int
    seed: int
    backgrounds: Callable[[], list[Image]]
    is_mask: bool = False

    def __call__(self) -> Image:
        return _placed(self)


@dataclass(frozen=True)
class _Small:
    """Draws what a prompt of the text-to-image model names: 64 pixels a side, the emoji 70 to 100 % of it."""

    emoji: int
    seed: int
    is_on_white: bool

    def __call__(self) -> Image:
        from PIL import Image, ImageFilter

        chance = random.Random(self.seed)
        photo = chance.choice(_photos())
        side = round(min(photo.size) * chance.uniform(0.4, 1))
        left, top = (chance.randint(0, length - side) for length in photo.size)
        image = photo.resize((64, 64), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        image = image.filter(ImageFilter.GaussianBlur(2.5))
        if self.is_on_white:
            image = Image.new("RGB", (64, 64), "white")
        size = round(64 * chance.uniform(0.7, 1))
        drawing = _drawings()[self.emoji].image.resize((size, size), Image.Resampling.LANCZOS)
        image.paste(drawing, (chance.randint(0, 64 - size), chance.randint(0, 64 - size)), drawing)
        return image


def captioning_data(scenes: int) -> Data:
    """A scene each, with its four captions."""
    from turbovlm_lab.zoo.grammar import captions

    samples = (Sample(f"scene-{i}", (_scene_image(i),), answers=captions(_scene(i)[1])) for i in range(scenes))
    return Data("scenes", tuple(samples), tokenized=True)


def vqa_data(scenes: int) -> Data:
    """Four or five questions about each scene; ids are the scene's and what is asked."""
    from turbovlm_lab.zoo.grammar import questions

    samples = []
    for i in range(scenes):
        chance, scene = _scene(i)
        for q in questions(scene, chance, _names()):
            samples.append(Sample(f"scene-{i}/{q.asks}", (_scene_image(i),), q.text, (q.answer,)))
    return Data("scenes", tuple(samples))


def nlvr2_data(pairs: int) -> Data:
    """Two statements about each pair of scenes."""
    from turbovlm_lab.zoo.grammar import statement
    from turbovlm_lab.zoo.scenes import make_pair

    samples = []
    for i in range(pairs):
        chance = random.Random(SEED + i)
        pair = make_pair(chance, _names())
        images = tuple(LazyImage(f"pair {i}, {side}", _Scene(scene)) for side, scene in zip(("left", "right"), pair))
        for number in range(2):
            made = statement(*pair, chance)
            samples.append(Sample(f"pair-{i}/{number}", images, made.text, (str(made.true),)))
    return Data("pairs of scenes", tuple(samples))


def saliency_data(images: int) -> Data:
    """Emoji on photographs in which nothing else stands out, one in each, and where it is."""
    count, samples = len(_drawings()), []
    for i in range(images):
        emoji = i * count // images % count
        shown, mask = (_OnPhoto(emoji, SEED + i, _surfaces, is_mask) for is_mask in (False, True))
        samples.append(
            Sample(f"emoji-{i}", (LazyImage(f"emoji {i}", shown),), mask=LazyImage(f"mask of emoji {i}", mask))
        )
    return Data("emoji on surfaces", tuple(samples))


def retrieval_data(images: int) -> Data:
    """Emoji, each with its name and with more words. A fifth of them no model was trained on, whoever drew them."""
    every = len(_drawings())
    samples = []
    for i in [i * every // images for i in range(images)] if images < every else range(every):
        sprite = _drawings()[i]
        captions = sprite.label, ", ".join((sprite.label, *sprite.tags))
        samples.append(
            Sample(f"emoji-{i}", (LazyImage(f"emoji {i}", _OnPhoto(i, SEED + i, _surfaces)),), answers=captions)
        )
    return Data("emoji on surfaces", tuple(samples))


def classification_data(images: int) -> Data:
    """Emoji and their classes, which are Unicode's groups, such as `animals-nature`."""
    count, samples = len(_drawings()), []
    for i in range(images):
        emoji = i * count // images % count
        shown = LazyImage(f"emoji {i}", _OnPhoto(emoji, SEED + i, _surfaces))
        samples.append(Sample(f"emoji-{i}", (shown,), answers=(_drawings()[emoji].group,)))
    return Data("emoji on surfaces", tuple(samples), classes=groups())


def text_to_image_data(images: int) -> Data:
    """Twemoji on white and on photographs out of focus: prompts that the emoji model has learnt, and such images."""
    from turbovlm_lab.zoo.emoji import PLACES, emoji_prompts

    learnt, samples, real = set(emoji_prompts()), [], []
    every = [i for i, sprite in enumerate(_drawings()) if f"{sprite.label}, twemoji, {PLACES[0]}" in learnt]
    for i in range(images):
        emoji, place = every[i * len(every) // images % len(every)], PLACES[i % len(PLACES)]
        samples.append(Sample(f"emoji-{i}", text=f"{_drawings()[emoji].label}, twemoji, {place}"))
        real.append(LazyImage(f"emoji {i}", _Small(emoji, SEED + i, place == PLACES[0])))
    return Data("emoji prompts", tuple(samples), real=tuple(real))


def groups() -> tuple[str, ...]:
    """Unicode's eight, of the emoji that are drawn, in alphabetical order."""
    return tuple(sorted({sprite.group for sprite in _drawings()}))


@functools.cache
def _drawings() -> tuple[Any, ...]:
    from turbovlm_lab.zoo.sprites import load_sprites

    return load_sprites()


@functools.cache
def _surfaces() -> list[Image]:
    from turbovlm_lab.demo.photos import load_surfaces

    return [photo.image for photo in load_surfaces()]


@functools.cache
def _photos() -> list[Image]:
    from turbovlm_lab.demo.photos import load_photos

    return [photo.image for photo in load_photos()]


@functools.lru_cache(maxsize=1024)
def _drawn(scene: Scene) -> Image:
    """Kept, because several settings and questions ask for the same."""
    from turbovlm_lab.zoo.scenes import draw_scene

    sprites = {sprite.name: sprite.image for sprite in _drawings() if sprite.name}
    return draw_scene(scene, sprites, _surfaces())


@functools.lru_cache(maxsize=1024)
def _placed(wanted: _OnPhoto) -> Image:
    """Kept, as scenes are."""
    from PIL import Image

    from turbovlm_lab.zoo.scenes import on_photo

    drawing, photos = _drawings()[wanted.emoji].image, wanted.backgrounds()
    if wanted.is_mask:
        white = Image.new("RGBA", drawing.size, "white")
        white.putalpha(drawing.getchannel("A"))
        drawing, photos = white, [Image.new("RGB", photo.size) for photo in photos]
    return on_photo(drawing, photos, random.Random(wanted.seed))


def _scene(number: int) -> tuple[random.Random, Scene]:
    """A scene, and the chance it was made with, to go on with."""
    from turbovlm_lab.zoo.scenes import make_scene

    chance = random.Random(SEED + number)
    return chance, make_scene(chance, _names())


def _scene_image(number: int) -> LazyImage:
    return LazyImage(f"scene {number}", _Scene(_scene(number)[1]))


def _names() -> tuple[str, ...]:
    from turbovlm_lab.zoo.sprites import SCENE_NAMES

    return tuple(SCENE_NAMES)


DATA: dict[str, Callable[[int], Data]] = {
    "classification": classification_data,
    "retrieval": retrieval_data,
    "captioning": captioning_data,
    "vqa": vqa_data,
    "nlvr2": nlvr2_data,
    "saliency": saliency_data,
    "text-to-image": text_to_image_data,
}
"""Of each task, by the number of images."""
