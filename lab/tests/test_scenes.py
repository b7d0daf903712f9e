"""Scenes are what their seed says, and captions, questions and statements say what is in them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from turbovlm.errors import ConfigError, DataError
from turbovlm_lab.zoo.grammar import captions, plural, questions, statement, words
from turbovlm_lab.zoo.scenes import COLOURS, MOST_ALIKE, PLACES, Kind, Scene, draw_scene, make_pair, make_scene, tint
from turbovlm_lab.zoo.sprites import SCENE_NAMES, load_sprites

Image = pytest.importorskip("PIL.Image")
ImageStat = pytest.importorskip("PIL.ImageStat")

NAMES = tuple(SCENE_NAMES)
SCENE = Scene((Kind("dog", "blue", (0, 5)), Kind("apple", None, (1,)), Kind("egg", None, (7,))), seed=3)


@pytest.fixture(scope="module")
def sprites():
    return {sprite.name: sprite.image for sprite in load_sprites() if sprite.name}


@pytest.fixture(scope="module")
def grey():
    return [Image.new("RGB", (300, 260), (128, 128, 128))]


def test_the_pack_has_every_name(sprites):
    assert sprites.keys() == set(NAMES)
    assert {image.size for image in sprites.values()} == {(96, 96)}
    assert {image.mode for image in sprites.values()} == {"RGBA"}


def test_labels_and_codes_are_unique():
    sprites = load_sprites()
    assert len(sprites) > 1000
    assert len({sprite.code for sprite in sprites}) == len({sprite.label for sprite in sprites}) == len(sprites)


def test_a_missing_pack_and_a_file_that_is_none_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.zip: there is no such pack"):
        load_sprites(tmp_path / "nothing.zip")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(DataError, match=r"text\.zip: is no pack"):
        load_sprites(tmp_path / "text.zip")


def test_one_seed_one_scene_one_image(sprites, grey):
    first, again = (make_scene(random.Random(7), NAMES) for _ in range(2))
    assert first == again != make_scene(random.Random(8), NAMES)
    assert draw_scene(first, sprites, grey).tobytes() == draw_scene(again, sprites, grey).tobytes()


def test_things_stand_where_the_scene_says(sprites, grey):
    """A cell differs from the background where there is something, and only there, but for a rim of neighbours."""
    drawn = draw_scene(SCENE, sprites, grey)
    changed = Image.eval(drawn.convert("L"), lambda level: 255 * (abs(level - 128) > 12))
    for cell in range(9):
        row, column = divmod(cell, 3)
        box = (column * 74 + 15, row * 74 + 15, column * 74 + 60, row * 74 + 60)
        share = ImageStat.Stat(changed.crop(box)).mean[0] / 255
        assert (share > 0.15) == (SCENE.at(cell) is not None), (cell, share)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_tint_has_its_hue_and_keeps_the_outline(sprites, colour):
    tinted = tint(sprites["dog"], colour)
    assert tinted.getchannel("A").tobytes() == sprites["dog"].getchannel("A").tobytes()
    hues = Counter(
        hue
        for (hue, saturation, _), alpha in zip(_pixels(tinted.convert("HSV")), _pixels(tinted.getchannel("A")))
        if alpha == 255 and saturation > 60
    )
    hue = hues.most_common(1)[0][0] * 360 / 255
    assert min(abs(hue - COLOURS[colour][0]), 360 - abs(hue - COLOURS[colour][0])) < 6


def test_captions():
    assert captions(SCENE) == (
        "two blue dogs at the top left and right , an apple at the top and an egg at the bottom",
        "a photo with two blue dogs at the top left and right , an apple at the top and an egg at the bottom",
        "there are two blue dogs at the top left and right , an apple at the top and an egg at the bottom",
        "at the top left and right two blue dogs , at the top an apple and at the bottom an egg",
    )


def test_answers_are_true():
    chance = random.Random(0)
    for _ in range(300):
        scene = make_scene(chance, NAMES)
        for question in questions(scene, chance, NAMES):
            assert _answer(scene, question.text) == question.answer, (scene, question)


def test_statements_are_true_as_often_as_false_and_say_so_rightly():
    chance = random.Random(0)
    found = Counter()
    for _ in range(2000):
        first, second = make_pair(chance, NAMES)
        made = statement(first, second, chance)
        assert _holds(first, second, made.text) == made.true, (first, second, made)
        found[made.true] += 1
    assert abs(found[True] - found[False]) < 200


def test_presence_is_answered_yes_as_often_as_no():
    chance = random.Random(0)
    asked = [
        q for _ in range(1000) for q in questions(make_scene(chance, NAMES), chance, NAMES) if q.asks == "presence"
    ]
    assert 430 < sum(q.answer == "yes" for q in asked) < 570


def test_scenes_keep_their_bounds():
    chance = random.Random(0)
    for _ in range(500):
        first, second = make_pair(chance, NAMES)
        for scene in (first, second):
            cells = [cell for kind in scene.kinds for cell in kind.cells]
            assert len(set(cells)) == len(cells) <= 7
            assert 2 <= len({kind.name for kind in scene.kinds}) == len(scene.kinds) <= 4
            assert all(len(kind.cells) <= MOST_ALIKE for kind in scene.kinds)
            assert list(scene.kinds) == sorted(scene.kinds, key=lambda kind: kind.cells)


def test_every_word_is_known():
    known = set(words(NAMES))
    chance = random.Random(1)
    for _ in range(300):
        first, second = make_pair(chance, NAMES)
        texts = [*captions(first), statement(first, second, chance).text]
        texts += [text for q in questions(first, chance, NAMES) for text in (q.text, q.answer)]
        assert {word for text in texts for word in text.split()} <= known


def test_plurals():
    given = ("dog", "fish", "bus", "box", "peach", "candy", "monkey", "hot dog")
    assert [plural(name) for name in given] == [
        "dogs", "fish", "buses", "boxes", "peaches", "candies", "monkeys", "hot dogs",
    ]  # fmt: skip


def test_what_is_wrong_is_named(sprites, grey):
    with pytest.raises(ConfigError, match="at least 8 different"):
        make_scene(random.Random(0), ("dog",))
    with pytest.raises(ConfigError, match="none is called 'unicorn'"):
        draw_scene(Scene((Kind("unicorn", None, (0,)),), 0), sprites, grey)
    with pytest.raises(ConfigError, match="backgrounds: there is none"):
        draw_scene(SCENE, sprites, [])
    with pytest.raises(ConfigError, match="colour='mauve'"):
        tint(sprites["dog"], "mauve")


def _pixels(image):
    return list(image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata())


def _answer(scene: Scene, text: str) -> str:
    """Worked out from the words alone."""
    said = text.removesuffix(" ?")
    numbers = ("zero", "one", "two", "three", "four")
    if said.startswith("what is at the "):
        return scene.at(PLACES.index(said.removeprefix("what is at the "))).name
    if said.startswith("how many "):
        return numbers[_count(scene, said.removeprefix("how many ").removesuffix(" are there"))]
    if said.startswith("what color "):
        name = said.split(" the ")[1]
        return next(kind.colour for kind in scene.kinds if name in (kind.name, plural(kind.name)))
    if said.startswith("where is the "):
        (cell,) = next(kind.cells for kind in scene.kinds if kind.name == said.removeprefix("where is the "))
        return PLACES[cell]
    assert said.startswith("is there a")
    return "yes" if _count(scene, said.split(" ", 3)[3]) else "no"


def _holds(first: Scene, second: Scene, text: str) -> bool:
    sides = {"left": first, "right": second}
    if text.startswith(("both images contain ", "exactly one image contains ")):
        name = text.split("contains " if "contains" in text else "contain ")[1].split(" ", 1)[1]
        found = [bool(_count(scene, name)) for scene in (first, second)]
        return all(found) if text.startswith("both") else found[0] != found[1]
    if text.startswith("there are more "):
        name, side = text.removeprefix("there are more ").split(" image than ")[0].split(" in the ")
        other = "right" if side == "left" else "left"
        return _count(sides[side], name) > _count(sides[other], name)
    if text.endswith(" in total"):
        number, name = text.removesuffix(" in total").split(" ", 2)[2].split(" ", 1)
        numbers = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        return _count(first, name) + _count(second, name) == numbers.index(number)
    _, side, rest = text.split(" ", 2)
    name, _, place = rest.removeprefix("image contains ").split(" ", 1)[1].partition(" at the ")
    if place:
        kind = sides[side].at(PLACES.index(place))
        return kind is not None and kind.name == name
    return bool(_count(sides[side], name))


def _count(scene: Scene, said: str) -> int:
    """How many there are of "blue dogs"."""
    colour, _, name = said.partition(" ")
    if colour not in COLOURS:
        colour, name = None, said
    (number,) = {scene.count(one, colour) for one in NAMES if name in (one, plural(one))}
    return number
