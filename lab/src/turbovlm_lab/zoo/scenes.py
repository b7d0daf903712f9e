"""Scenes of small things on photographs: what is where, how many and which colour, with the image that shows it.

A scene is 224×224 pixels in 3×3 cells. Two to four kinds of things, each once or up to four times, stand in different
cells, shifted, turned and mirrored a little; half of the kinds are tinted. A thing covers three to five patches of 14
pixels a side, so that merging the wrong patches loses it. Everything follows from the random generator that is given.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turbovlm.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 224
PLACES = (
    "top left", "top", "top right",
    "left", "middle", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
"""The cells, in reading order."""
COLOURS = {
    "red": (0, 0.8),
    "orange": (28, 0.95),
    "yellow": (54, 0.95),
    "green": (120, 0.65),
    "blue": (220, 0.8),
    "purple": (280, 0.6),
    "pink": (330, 0.85),
}
"""Hue in degrees and saturation of each tint."""
MOST_KINDS, MOST_THINGS, MOST_ALIKE = 4, 7, 4
SIZES = (0.6, 0.95)
"""The smallest and the largest side of a thing, as shares of a cell's."""
SHARED = 0.6
"""How likely a kind of the first scene of a pair is in the second one too."""


@dataclass(frozen=True)
class Kind:
    """Things that are alike: their name, their tint (None: as drawn), and the cells they stand in, 0 to 8."""

    name: str
    colour: str | None
    cells: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """What there is, and the seed of how it is drawn. Kinds come in reading order of their first things."""

    kinds: tuple[Kind, ...]
    seed: int

    def at(self, cell: int) -> Kind | None:
        """What stands in a cell."""
        return next((kind for kind in self.kinds if cell in kind.cells), None)

    def count(self, name: str, colour: str | None = None) -> int:
        """How many things of that name there are, of that tint if one is given."""
        return sum(len(kind.cells) for kind in self.kinds if kind.name == name and colour in (None, kind.colour))


def make_scene(chance: random.Random, names: Sequence[str], wanted: Sequence[tuple[str, str | None]] = ()) -> Scene:
    """A scene of things that have these names.

    Args:
        chance: what decides.
        names: to choose from, different ones.
        wanted: names and tints that are to be in it.

    Raises:
        ConfigError: `names` are fewer than a scene can need.
    """
    if len(set(names)) < 2 * MOST_KINDS:
        raise ConfigError(f"names: a scene needs at least {2 * MOST_KINDS} different ones to choose from; {names!r}")
    kinds = list(wanted)
    while len(kinds) < max(chance.randint(2, MOST_KINDS), len(wanted)):
        name = chance.choice(names)
        if name not in [other for other, _ in kinds]:
            kinds.append((name, chance.choice(tuple(COLOURS)) if chance.random() < 0.5 else None))
    free = list(range(len(PLACES)))
    chance.shuffle(free)
    left = MOST_THINGS - len(kinds)
    placed = []
    for name, colour in kinds:
        more = min(left, chance.choice((0, 0, 0, 1, 2, MOST_ALIKE - 1)))
        left -= more
        cells, free = free[: more + 1], free[more + 1 :]
        placed.append(Kind(name, colour, tuple(sorted(cells))))
    return Scene(tuple(sorted(placed, key=lambda kind: kind.cells)), chance.getrandbits(32))


def make_pair(chance: random.Random, names: Sequence[str]) -> tuple[Scene, Scene]:
    """Two scenes, the second of which has some of the kinds of the first, in other places and numbers."""
    first = make_scene(chance, names)
    again = [(kind.name, kind.colour) for kind in first.kinds if chance.random() < SHARED]
    return first, make_scene(chance, names, again)


def draw_scene(scene: Scene, sprites: Mapping[str, Image], backgrounds: Sequence[Image]) -> Image:
    """The image, 224×224, RGB.

    Args:
        sprites: by name, RGBA, square.
        backgrounds: photographs, one of which is cropped, RGB, 224 pixels a side or more.

    Raises:
        ConfigError: a thing has no sprite, or there is no background.
    """
    if not backgrounds:
        raise ConfigError("backgrounds: there is none")
    chance = random.Random(scene.seed)
    image = background(chance, chance.choice(backgrounds))
    stand(image, scene, sprites, chance)
    return image


def stand(
    image: Image,
    scene: Scene,
    sprites: Mapping[str, Image],
    chance: random.Random,
    sizes: tuple[float, float] = SIZES,
) -> dict[int, tuple[int, int, int]]:
    """Draw the things of a scene on an image.

    Args:
        image: 224×224, RGB; it is changed.
        sprites: by name, RGBA, square.
        chance: decides sizes, turns and places within the cells.
        sizes: the smallest and the largest side of a thing, as shares of a cell's.

    Returns:
        Left, top and side of each thing's square in pixels, by its cell.

    Raises:
        ConfigError: a thing has no sprite.
    """
    from PIL import Image

    cell, squares = SIDE / 3, {}
    for kind in scene.kinds:
        if kind.name not in sprites:
            raise ConfigError(f"sprites: none is called {kind.name!r}")
        sprite = sprites[kind.name] if kind.colour is None else tint(sprites[kind.name], kind.colour)
        for number in kind.cells:
            side = round(cell * chance.uniform(*sizes))
            thing = sprite.resize((side, side), Image.Resampling.LANCZOS)
            if chance.random() < 0.5:
                thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            thing = thing.rotate(chance.uniform(-15, 15), Image.Resampling.BICUBIC)
            slack = cell - side
            row, column = divmod(number, 3)
            left, top = (round(place * cell + slack * chance.random()) for place in (column, row))
            image.paste(thing, (left, top), thing)
            squares[number] = (left, top, side)
    return squares


def on_photo(drawing: Image, backgrounds: Sequence[Image], chance: random.Random) -> Image:
    """One drawing somewhere on a photograph, 224×224, RGB; its side is 45 to 95 % of the image's.

    Args:
        drawing: RGBA, square.
        backgrounds: photographs, RGB.
        chance: chooses the photograph, its crop, the size, the place and whether the drawing is mirrored.
    """
    from PIL import Image

    image = background(chance, chance.choice(backgrounds))
    side = round(SIDE * chance.uniform(0.45, 0.95))
    thing = drawing.resize((side, side), Image.Resampling.LANCZOS)
    if chance.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = (chance.randint(0, SIDE - side) for _ in range(2))
    image.paste(thing, (left, top), thing)
    return image


def tint(sprite: Image, colour: str) -> Image:
    """The same drawing in shades of one colour, RGBA: brightness above and below its mean.

    Raises:
        ConfigError: there is no such colour.
    """
    from PIL import Image, ImageOps, ImageStat

    if colour not in COLOURS:
        raise ConfigError(f"colour={colour!r}: must be one of {', '.join(COLOURS)}")
    hue, saturation = COLOURS[colour]
    ends = [Image.new("HSV", (1, 1), (round(hue / 360 * 255), *rest)) for rest in _shades(saturation)]
    dark, plain, light = (end.convert("RGB").getpixel((0, 0)) for end in ends)
    grey = sprite.convert("L")
    (mean,) = ImageStat.Stat(grey, sprite.getchannel("A").point(lambda a: 255 * (a > 127))).mean
    grey = grey.point(lambda level: round(127 + level - mean))
    shaded = ImageOps.colorize(grey, dark, light, mid=plain)
    shaded.putalpha(sprite.getchannel("A"))
    return shaded


def _shades(saturation: float) -> tuple[tuple[int, int], ...]:
    """Saturation and value of the darkest, the middle and the brightest shade."""
    return (round(255 * saturation), 90), (round(255 * saturation), 230), (round(110 * saturation), 255)


def background(chance: random.Random, photo: Image) -> Image:
    """A square crop of a photograph, 224×224, mirrored as often as not."""
    from PIL import Image

    side = chance.uniform(0.4, 1.0) * min(photo.size)
    left, top = (chance.uniform(0, length - side) for length in photo.size)
    crop = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else crop
