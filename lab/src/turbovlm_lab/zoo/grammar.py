"""Captions, questions and statements about scenes, made by a grammar, with what is right about them.

Words are lower-case and separated by spaces, punctuation too, so that splitting at spaces is the tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from turbovlm_lab.zoo.scenes import COLOURS, MOST_ALIKE, PLACES, Kind, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANSWERED_NUMBERS = NUMBERS[: MOST_ALIKE + 1]
_IRREGULAR = {"fish": "fish", "mouse": "mice"}


@dataclass(frozen=True)
class Question:
    """A question, its answer, and what it asks for: `what`, `number`, `color`, `place` or `presence`."""

    text: str
    answer: str
    asks: str


@dataclass(frozen=True)
class Statement:
    """A sentence about two scenes, and whether it is true."""

    text: str
    true: bool


def captions(scene: Scene) -> tuple[str, ...]:
    """Four ways to say what there is and where, in reading order."""
    parts = [(_things(kind), _places(kind)) for kind in scene.kinds]
    listed = [f"{things} at the {places}" for things, places in parts]
    placed = [f"at the {places} {things}" for things, places in parts]
    return (
        _joined(listed),
        f"a photo with {_joined(listed)}",
        f"there {'are' if scene.kinds[0].cells[1:] else 'is'} {_joined(listed)}",
        _joined(placed),
    )


def questions(scene: Scene, chance: random.Random, names: Sequence[str]) -> tuple[Question, ...]:
    """One question of every sort that can be asked about the scene: four or five.

    Args:
        chance: chooses what is asked for.
        names: of all things there are, for those that are not in the scene.
    """
    absent = chance.choice([name for name in names if not scene.count(name)])
    some = chance.choice(scene.kinds)
    cell = chance.choice(some.cells)
    asked = [Question(f"what is at the {PLACES[cell]} ?", some.name, "what")]
    counted = chance.choice(scene.kinds)
    name = counted.name if chance.random() < 0.9 else absent
    asked.append(Question(f"how many {plural(name)} are there ?", NUMBERS[scene.count(name)], "number"))
    tinted = [kind for kind in scene.kinds if kind.colour is not None]
    if tinted:
        kind = chance.choice(tinted)
        are = "are" if kind.cells[1:] else "is"
        asked.append(Question(f"what color {are} the {_named(kind)} ?", str(kind.colour), "color"))
    single = [kind for kind in scene.kinds if len(kind.cells) == 1]
    if single:
        kind = chance.choice(single)
        asked.append(Question(f"where is the {kind.name} ?", PLACES[kind.cells[0]], "place"))
    asked.append(_presence(scene, chance, absent))
    return tuple(asked)


def statement(first: Scene, second: Scene, chance: random.Random) -> Statement:
    """A sentence about two images, true as often as false."""
    wanted = chance.random() < 0.5
    while True:
        made = chance.choice(_FORMS)(first, second, chance)
        if made is not None and made.true == wanted:
            return made


def words(names: Iterable[str]) -> tuple[str, ...]:
    """Every word that captions, questions, answers and statements about these things can have, sorted."""
    grammar = """a an and are as at both color contain contains exactly false how image images in is left many more
        no on one or photo right same than the there total true what where with yes , ?"""
    found = {*grammar.split(), *NUMBERS, *COLOURS}
    for text in (*names, *map(plural, names), *PLACES):
        found.update(text.split())
    return tuple(sorted(found))


def plural(name: str) -> str:
    """Of a thing's name."""
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def _presence(scene: Scene, chance: random.Random, absent: str) -> Question:
    """Answered yes as often as no; a third of the absent things are there, in another colour."""
    kind = chance.choice(scene.kinds)
    if chance.random() < 0.5:
        colour = kind.colour if chance.random() < 0.5 else None
        return Question(f"is there {_one(kind.name, colour)} ?", "yes", "presence")
    if kind.colour is not None and chance.random() < 0.4:
        other = chance.choice([colour for colour in COLOURS if colour != kind.colour])
        return Question(f"is there {_one(kind.name, other)} ?", "no", "presence")
    return Question(f"is there {_one(absent, None)} ?", "no", "presence")


def _both(first: Scene, second: Scene, chance: random.Random) -> Statement:
    name = _some(first, second, chance)
    return Statement(f"both images contain {_one(name, None)}", bool(first.count(name) and second.count(name)))


def _exactly_one(first: Scene, second: Scene, chance: random.Random) -> Statement:
    name = _some(first, second, chance)
    return Statement(
        f"exactly one image contains {_one(name, None)}", bool(first.count(name)) != bool(second.count(name))
    )


def _more(first: Scene, second: Scene, chance: random.Random) -> Statement:
    name = _some(first, second, chance)
    left, right = chance.choice((("left", "right"), ("right", "left")))
    counts = {"left": first.count(name), "right": second.count(name)}
    text = f"there are more {plural(name)} in the {left} image than in the {right} image"
    return Statement(text, counts[left] > counts[right])


def _total(first: Scene, second: Scene, chance: random.Random) -> Statement:
    name = _some(first, second, chance)
    total = first.count(name) + second.count(name)
    said = max(1, total + chance.choice((-1, 0, 0, 1)))
    if said == 1:
        return Statement(f"there is one {name} in total", total == 1)
    return Statement(f"there are {NUMBERS[said]} {plural(name)} in total", total == said)


def _in_place(first: Scene, second: Scene, chance: random.Random) -> Statement:
    side, scene = chance.choice((("left", first), ("right", second)))
    kind = chance.choice(scene.kinds)
    cell = chance.choice(kind.cells) if chance.random() < 0.5 else chance.randrange(len(PLACES))
    text = f"the {side} image contains {_one(kind.name, None)} at the {PLACES[cell]}"
    return Statement(text, cell in kind.cells)


def _coloured(first: Scene, second: Scene, chance: random.Random) -> Statement | None:
    side, scene = chance.choice((("left", first), ("right", second)))
    tinted = [kind for kind in scene.kinds if kind.colour is not None]
    if not tinted:
        return None
    kind = chance.choice(tinted)
    colour = kind.colour if chance.random() < 0.5 else chance.choice(tuple(COLOURS))
    return Statement(f"the {side} image contains {_one(kind.name, colour)}", colour == kind.colour)


_FORMS: tuple[Callable[[Scene, Scene, random.Random], Statement | None], ...] = (
    _both,
    _exactly_one,
    _more,
    _total,
    _in_place,
    _coloured,
)


def _some(first: Scene, second: Scene, chance: random.Random) -> str:
    return chance.choice([*first.kinds, *second.kinds]).name


def _one(name: str, colour: str | None) -> str:
    said = name if colour is None else f"{colour} {name}"
    return f"{'an' if said[0] in 'aeiou' else 'a'} {said}"


def _named(kind: Kind) -> str:
    return plural(kind.name) if kind.cells[1:] else kind.name


def _things(kind: Kind) -> str:
    if not kind.cells[1:]:
        return _one(kind.name, kind.colour)
    said = plural(kind.name) if kind.colour is None else f"{kind.colour} {plural(kind.name)}"
    return f"{NUMBERS[len(kind.cells)]} {said}"


def _places(kind: Kind) -> str:
    return _joined([PLACES[cell] for cell in kind.cells])


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{' , '.join(parts[:-1])} and {parts[-1]}"
