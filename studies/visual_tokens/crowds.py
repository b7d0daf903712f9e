"""Crowded scenes with something to read in them, what is asked about them, and what each patch shows.

A crowd is 224×224 pixels in 3×3 cells, as the scenes of `turbovlm_lab.zoo.scenes`: three to five kinds of things, five
to seven of them in all, and in the cells that are left a word, a number of two digits, or both. Things are smaller than
there, two to three patches of 16 pixels a side, and a letter is less than one, so that few tokens have what a question
asks for. Held out from training are Twemoji's drawings, the photographs of scikit-image and scikit-learn, the typeface
that comes with Pillow, a sixth of the words (asked for apart), and of course the scenes.
"""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from turbovlm_lab.demo.photos import load_surfaces
from turbovlm_lab.zoo.grammar import NUMBERS, Question, plural, questions
from turbovlm_lab.zoo.scenes import COLOURS, PLACES, SIDE, Kind, Scene, background, stand
from turbovlm_lab.zoo.small_vlm import SIDE as PATCHES
from turbovlm_lab.zoo.sprites import SCENE_NAMES, load_sprites

PACKS = Path(__file__).parents[1] / "scenes" / "data"
"""Where studies/scenes/prepare.py writes the drawings and photographs to train on."""
FULL = ("noto", "fluent", "fluent-3d", "openmoji", "emojione")
PARTIAL = ("noto-v1", "fxemoji", "emojione-v1", "streamline-emojis")
"""Vendors; what one of the second row does not draw, one of the first lends."""
SEEDS = {"train": 10_000_000, "validation": 20_000_000, "test": 30_000_000}
NAMES = tuple(SCENE_NAMES)
SIZES = (0.48, 0.66)
"""Of things, as shares of a cell: 36 to 49 pixels."""
KINDS, THINGS = (3, 5), (5, 7)
HEIGHTS = (17, 23)
"""Of the letters' typeface, in pixels."""
WORDS = tuple(Path(__file__).with_name("words.txt").read_text().split())
SEEN_WORDS = tuple(word for number, word in enumerate(WORDS) if number % 6)
NEW_WORDS = tuple(word for number, word in enumerate(WORDS) if number % 6 == 0)
NOTHING = "nothing"
CONCEPTS = (*NAMES, *SEEN_WORDS, *"0123456789", NOTHING)
"""What a patch can show."""
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
UNKNOWN = -100
CORE = 0.8
"""Of a thing's square, the share of its side within which a patch's middle shows the thing."""
_NUMBER = {concept: number for number, concept in enumerate(CONCEPTS)}


@dataclass(frozen=True)
class Sign:
    """A word or a number to be read, and its cell."""

    text: str
    cell: int


@dataclass(frozen=True)
class Crowd:
    """Things and signs."""

    scene: Scene
    signs: tuple[Sign, ...]


@dataclass(frozen=True)
class Style:
    """What is drawn with: drawings by name for each vendor, photographs, and typefaces (None: Pillow's own)."""

    vendors: tuple[Mapping[str, Image.Image], ...]
    photos: tuple[Image.Image, ...]
    typefaces: tuple[Path | None, ...]


def crowd(part: str, number: int) -> tuple[Crowd, random.Random]:
    """A crowd of a part, and the chance it was made with, to go on with."""
    chance = random.Random(SEEDS[part] + number)
    words = SEEN_WORDS if part == "train" or chance.random() < 0.5 else NEW_WORDS
    return make_crowd(chance, words), chance


def make_crowd(chance: random.Random, words: Sequence[str]) -> Crowd:
    """Things in different cells, and a word of these, a number, or both in others."""
    free = list(range(len(PLACES)))
    chance.shuffle(free)
    names = chance.sample(NAMES, chance.randint(*KINDS))
    cells: list[list[int]] = [[free.pop()] for _ in names]
    for _ in range(chance.randint(*THINGS) - len(names)):
        chance.choice([taken for taken in cells if len(taken) < 4]).append(free.pop())
    kinds = [
        Kind(name, chance.choice(tuple(COLOURS)) if chance.random() < 0.5 else None, tuple(sorted(taken)))
        for name, taken in zip(names, cells)
    ]
    texts = [chance.choice(words), str(chance.randint(10, 99))]
    shown = chance.choice((texts, texts, texts[:1], texts[1:]))
    signs = tuple(Sign(text, free.pop()) for text in shown)
    return Crowd(Scene(tuple(sorted(kinds, key=lambda kind: kind.cells)), chance.getrandbits(32)), signs)


def asked(shown: Crowd, chance: random.Random) -> list[Question]:
    """Questions of every sort that can be asked about a crowd, six to eight, and one for a list of all there is.

    Beside those of `turbovlm_lab.zoo.grammar`: `word`, `new word` (one that was never drawn in training), `digits`,
    `list`.
    """
    made = [Question(spoken(q.text), q.answer, q.asks) for q in questions(shown.scene, chance, NAMES)]
    for sign in shown.signs:
        kind = "number" if sign.text.isdigit() else "word"
        text = chance.choice((f"what {kind} is written ?", f"what is written at the {PLACES[sign.cell]} ?"))
        sort = "digits" if sign.text.isdigit() else "new word" if sign.text in NEW_WORDS else "word"
        made.append(Question(spoken(text), sign.text, sort))
    made.append(Question("What is there?", ", ".join(things(shown)), "list"))
    return made


def things(shown: Crowd) -> list[str]:
    """All there is, in reading order of the first of its cells: `two red dogs`, `cat`, `lamp`, `47`."""
    found = []
    for kind in shown.scene.kinds:
        count = len(kind.cells)
        said = [*([NUMBERS[count]] if count > 1 else []), *([kind.colour] if kind.colour else [])]
        found.append((kind.cells[0], " ".join([*said, plural(kind.name) if count > 1 else kind.name])))
    found += [(sign.cell, sign.text) for sign in shown.signs]
    return [text for _, text in sorted(found)]


def spoken(text: str) -> str:
    """A sentence of the grammar as people write it."""
    joined = text.replace(" ?", "?").replace(" ,", ",")
    return joined[0].upper() + joined[1:]


def draw(shown: Crowd, style: Style) -> tuple[Image.Image, np.ndarray]:
    """The image, and what its patches show, `[196, 2]`, int16: a concept and a colour, by number.

    A patch shows what its middle lies in. Of a number it shows the digit that is nearer. Colours of things that have
    none of `COLOURS` are `UNKNOWN`.
    """
    chance = random.Random(shown.scene.seed)
    image = background(chance, chance.choice(style.photos))
    squares = stand(image, shown.scene, chance.choice(style.vendors), chance, SIZES)
    labels = np.full((PATCHES, PATCHES, 2), UNKNOWN, np.int16)
    labels[..., 0] = _NUMBER[NOTHING]
    for cell, (left, top, side) in squares.items():
        kind = shown.scene.at(cell)
        assert kind is not None
        rim = (1 - CORE) / 2 * side
        where = _patches(left + rim, top + rim, left + side - rim, top + side - rim)
        labels[where] = _NUMBER[kind.name], UNKNOWN if kind.colour is None else list(COLOURS).index(kind.colour)
    for sign in shown.signs:
        left, top, right, bottom = write(image, sign, chance, style.typefaces)
        if sign.text.isdigit():
            middle = (left + right) / 2
            for digit, ends in zip(sign.text, ((left, middle), (middle, right))):
                labels[_patches(ends[0], top, ends[1], bottom)] = _NUMBER[digit], UNKNOWN
        else:
            labels[_patches(left, top, right, bottom)] = _NUMBER.get(sign.text, UNKNOWN), UNKNOWN
    return image, labels.reshape(-1, 2)


def write(
    image: Image.Image, sign: Sign, chance: random.Random, typefaces: Sequence[Path | None]
) -> tuple[int, int, int, int]:
    """Write a sign into its cell, in capitals, dark on a light plate or light on a dark one; returns its box."""
    cell, typeface, size = SIDE / 3, chance.choice(typefaces), chance.randint(*HEIGHTS)
    text, canvas = sign.text.upper(), ImageDraw.Draw(image)
    while True:
        font = _font(typeface, size)
        left, top, right, bottom = (round(edge) for edge in canvas.textbbox((0, 0), text, font))
        width, height = right - left + 6, bottom - top + 6
        if width <= cell:
            break
        size -= 1
    row, column = divmod(sign.cell, 3)
    x = round(column * cell + (cell - width) * chance.random())
    y = round(row * cell + (cell - height) * chance.random())
    ink, paper = (tuple(chance.randint(*ends) for _ in range(3)) for ends in ((0, 70), (185, 255)))
    if chance.random() < 0.5:
        ink, paper = paper, ink
    canvas.rectangle((x, y, x + width, y + height), paper)
    canvas.text((x + 3 - left, y + 3 - top), text, ink, font)
    return x, y, x + width, y + height


@cache
def _font(typeface: Path | None, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size) if typeface is None else ImageFont.truetype(str(typeface), size)  # type: ignore[return-value]


def _patches(left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
    """The rows and the columns of patches whose middles lie in a box; at least one of each."""
    patch = SIDE / PATCHES

    def between(low: float, high: float) -> slice:
        first, last = int(np.ceil(low / patch - 0.5)), int(np.floor(high / patch - 0.5))
        nearest = min(max(int((low + high) / 2 / patch), 0), PATCHES - 1)
        return slice(max(first, 0), last + 1) if first <= last else slice(nearest, nearest + 1)

    return between(top, bottom), between(left, right)


@cache
def style_of(part: str) -> Style:
    """What the images of a part are drawn with: those to validate on as those to train on, those to test on as neither.

    Raises:
        DataError: studies/scenes/prepare.py has not run.
    """
    if part == "test":
        return Style((_named(load_sprites()),), tuple(photo.image for photo in load_surfaces()), (None,))
    full = [_named(load_sprites(PACKS / f"{vendor}.zip")) for vendor in FULL]
    lent = [{**lender, **_named(load_sprites(PACKS / f"{vendor}.zip"))} for lender, vendor in zip(full, PARTIAL)]
    with zipfile.ZipFile(PACKS / "photos.zip") as archive:
        photos = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in archive.namelist()]
    return Style((*full, *lent), tuple(photos), tuple(_typefaces()))


def _named(sprites: Sequence[object]) -> dict[str, Image.Image]:
    return {sprite.name: sprite.image for sprite in sprites if sprite.name}  # type: ignore[attr-defined]


def _typefaces() -> list[Path]:
    """Those that come with matplotlib and have plain letters."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    wanted = (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSansMono-Bold",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "cmb10",
        "cmss10",
    )
    return [folder / f"{name}.ttf" for name in (*wanted, "STIXGeneralBol")]
