"""What CLIP's embeddings are asked in clip_tasks.py: sets of images, and tasks with their truth."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.evaluate.data import LazyImage
from turbovlm_lab.zoo.clip_names import ClipNames
from turbovlm_lab.zoo.saliency import centre_square

STUDY = Path(__file__).parents[1] / "studies" / "clip"
sys.path.insert(0, str(STUDY.parent / "photos"))
sys.path.append(str(STUDY))
NAMES = 80
"""The first so many of the names that are given are asked for; COCO-Stuff's 80 are things."""
CLOTHES, TEXTILES = 100, 200
"""Of each kind, to learn and as many to be asked; the kinds by turns."""
TEACHING, DRAWS = (60, 0.75), 5
"""Textiles of each kind that a classifier learns from, at most so many and that share; and how often they are drawn."""
NEIGHBOURS, STRENGTHS = 20, (1, 10, 100)
CROP = (0.5, 0.8)
"""Shares of a photograph's side."""
NEAREST = "zero-shot"


@dataclass(frozen=True)
class Pictures:
    """Images, and what each shows where that is known."""

    images: Sequence[LazyImage]
    labels: Sequence[str] | None = None

    def first(self, limit: int) -> Pictures:
        return Pictures(self.images[:limit], None if self.labels is None else self.labels[:limit])


@dataclass(frozen=True)
class Asked:
    """Embeddings by set of images, of length 1: by a setting, and by the unmerged model; and what is known of them."""

    own: Mapping[str, np.ndarray]
    whole: Mapping[str, np.ndarray]
    labels: Mapping[str, Sequence[str] | None]
    names: ClipNames | None = None


@dataclass(frozen=True)
class Outcome:
    """What was answered, and how right it was.

    Attributes:
        answers: `[times, samples]`, or None where there are none.
        scores: `[samples]`, or `[samples, samples of the other kind]` for pairs; None where the truth is not known.
    """

    answers: np.ndarray | None
    scores: np.ndarray | None


def photographs() -> Pictures:
    from prepare import load_photos

    try:
        photos = load_photos()
    except FileNotFoundError as error:
        raise TurboError(f"{error.filename}: is not there: python studies/photos/prepare.py") from None
    return Pictures([LazyImage(f"photograph {n}", functools.partial(centre_square, p)) for n, p in enumerate(photos)])


def crops() -> Pictures:
    images = images_of("photographs").images
    return Pictures([LazyImage(f"{e.name}, a crop", functools.partial(a_crop, e, n)) for n, e in enumerate(images)])


def a_crop(photo: LazyImage, seed: int) -> Image:
    """A random square of a square photograph."""
    square, chance = photo.open(), random.Random(seed)
    side = round(square.width * chance.uniform(*CROP))
    left, top = (chance.randint(0, square.width - side) for _ in range(2))
    return square.crop((left, top, left + side, top + side))


def stamps() -> Pictures:
    from turbovlm_lab.evaluate.readers.folders import read_classes

    folder = STUDY / "data" / "stamps"
    if not folder.is_dir():
        raise TurboError(f"{folder}: is not there: python studies/clip/prepare.py --names NAMES --first {NAMES}")
    samples = list(read_classes(folder).samples)
    random.Random(0).shuffle(samples)
    return labelled([(sample.answers[0], sample.images[0]) for sample in samples])


def clothes(part: str) -> Pictures:
    from fetch import load_fashion

    return labelled(load_fashion(part, CLOTHES))


def textiles(skip: int) -> Pictures:
    from fetch import load_textile

    return labelled(load_textile(skip, TEXTILES))


def labelled(pairs: Sequence[tuple[str, LazyImage]]) -> Pictures:
    return Pictures([image for _, image in pairs], [label for label, _ in pairs])


SETS: dict[str, Callable[[], Pictures]] = {
    "photographs": photographs,
    "crops": crops,
    "stamps": stamps,
    "clothes to learn": functools.partial(clothes, "train"),
    "clothes": functools.partial(clothes, "t10k"),
    "textiles to learn": functools.partial(textiles, TEXTILES),
    "textiles": functools.partial(textiles, 0),
}


@functools.cache
def images_of(name: str) -> Pictures:
    return SETS[name]()


def zero_shot(name: str, asked: Asked) -> dict[str, Outcome]:
    """The name nearest to each image."""
    if asked.names is None:
        raise ConfigError(f"{name}: needs --names, embeddings of names by CLIP ViT-B/16's text tower")
    names, truth = np.array(asked.names.names), asked.labels[name]
    answers = names[(asked.own[name] @ asked.names.vectors.numpy().T).argmax(axis=1)]
    return {NEAREST: outcome(answers, truth)}


def learned_clothes(asked: Asked) -> dict[str, Outcome]:
    """A linear probe and the nearest neighbours, taught with embeddings of the unmerged model or of the setting."""
    taught, truth = (asked.labels[name] for name in ("clothes to learn", "clothes"))
    found = {}
    for way, classifier in (("linear probe", probe), ("k-NN", nearest)):
        for teacher, vectors in (("drop-in", asked.whole), ("refitted", asked.own)):
            fitted = classifier(len(taught or ())).fit(vectors["clothes to learn"], taught)
            found[f"{way}, {teacher}"] = outcome(fitted.predict(asked.own["clothes"]), truth)
    return found


def learned_textiles(asked: Asked) -> dict[str, Outcome]:
    """Linear probes taught with few images, several draws; those with a small fault on their own."""
    taught, truth = (np.array(asked.labels[name]) for name in ("textiles to learn", "textiles"))
    local, nominal = truth == "local", truth == "nominal"
    found = {}
    for teacher, vectors in (("drop-in", asked.whole), ("refitted", asked.own)):
        answers, wins = [], []
        for draw in range(DRAWS):
            some = drawn(taught, draw)
            fitted = probe(len(some)).fit(vectors["textiles to learn"][some], taught[some])
            answers.append(fitted.predict(asked.own["textiles"]))
            sound = fitted.predict_proba(asked.own["textiles"])[:, list(fitted.classes_).index("nominal")]
            wins.append((sound[local][:, None] < sound[nominal]) + (sound[local][:, None] == sound[nominal]) / 2)
        said = np.stack(answers)
        found[f"accuracy, {teacher}"] = outcome(said, truth)
        is_found = (said != "nominal")[:, local]
        found[f"small faults found, {teacher}"] = Outcome(is_found, is_found.mean(axis=0))
        is_passed = (said == "nominal")[:, nominal]
        found[f"faultless ones passed, {teacher}"] = Outcome(is_passed, is_passed.mean(axis=0))
        found[f"AUC of small faults, {teacher}"] = Outcome(None, np.mean(wins, axis=0))
    return found


def drawn(labels: np.ndarray, seed: int) -> np.ndarray:
    """Places of equally many images of each label."""
    chance = np.random.default_rng(seed)
    places = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    most, share = TEACHING
    each = min(most, round(share * min(map(len, places))))
    return np.concatenate([chance.permutation(some)[:each] for some in places])


def retrieved(asked: Asked) -> dict[str, Outcome]:
    """The photograph nearest to a crop, among the unmerged model's embeddings of them or the setting's own."""
    found = {}
    for name, gallery in (("unmerged index", asked.whole), ("index of its own", asked.own)):
        first = (asked.own["crops"] @ gallery["photographs"].T).argmax(axis=1)
        found[f"R@1, {name}"] = outcome(first, np.arange(len(first)))
    return found


def outcome(answers: np.ndarray, truth: Any) -> Outcome:
    """Of `[samples]` or `[times, samples]`."""
    times = np.atleast_2d(answers)
    return Outcome(times, None if truth is None else (times == np.asarray(truth)).mean(axis=0))


def probe(samples: int) -> Any:
    """Logistic regression, its regularisation chosen by cross-validation among what it is taught with."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    return GridSearchCV(LogisticRegression(max_iter=2000), {"C": STRENGTHS}, cv=3)


def nearest(samples: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(NEIGHBOURS, samples), metric="cosine")


@dataclass(frozen=True)
class Task:
    """What is asked, of which sets of images, and what says it at a glance."""

    sets: tuple[str, ...]
    ask: Callable[[Asked], dict[str, Outcome]]
    headlines: tuple[str, ...]
    needs_names: bool = False


TASKS = {
    "photographs": Task(("photographs",), functools.partial(zero_shot, "photographs"), (NEAREST,), needs_names=True),
    "retrieval": Task(("photographs", "crops"), retrieved, ("R@1, unmerged index", "R@1, index of its own")),
    "stamps": Task(("stamps",), functools.partial(zero_shot, "stamps"), (NEAREST,), needs_names=True),
    "textiles": Task(
        ("textiles to learn", "textiles"), learned_textiles, ("accuracy, refitted", "AUC of small faults, refitted")
    ),
    "clothes": Task(
        ("clothes to learn", "clothes"), learned_clothes, ("linear probe, drop-in", "linear probe, refitted")
    ),
}
