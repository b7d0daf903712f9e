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
CLOTHES, TEXTILES = 100, 300
"""Of each kind at most, the kinds by turns."""
FOLDS, DRAWS = 5, 2
"""Parts of a set, each of which is asked of a classifier taught with the others; draws of them for textiles."""
NEIGHBOURS, STRENGTHS = 20, (1, 10, 100)
"""As many as a tenth of those who teach at most; weights of the data against the regularisation, to choose from."""
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


def clothes() -> Pictures:
    from fetch import load_fashion

    return labelled(load_fashion("t10k", CLOTHES))


def textiles() -> Pictures:
    from fetch import load_textile

    return labelled(load_textile(TEXTILES))


def labelled(pairs: Sequence[tuple[str, LazyImage]]) -> Pictures:
    return Pictures([image for _, image in pairs], [label for label, _ in pairs])


SETS: dict[str, Callable[[], Pictures]] = {
    "photographs": photographs,
    "crops": crops,
    "stamps": stamps,
    "clothes": clothes,
    "textiles": textiles,
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
    found = {}
    for way, classifier in (("linear probe", probe), ("k-NN", nearest)):
        for teacher, vectors in (("drop-in", asked.whole), ("refitted", asked.own)):
            answers, _ = cross_predicted(classifier, vectors["clothes"], asked.own["clothes"], asked.labels["clothes"])
            found[f"{way}, {teacher}"] = outcome(answers, asked.labels["clothes"])
    return found


def learned_textiles(asked: Asked) -> dict[str, Outcome]:
    """A linear probe, several draws of who teaches; those with a small fault on their own."""
    truth = np.array(asked.labels["textiles"])
    local, nominal = truth == "local", truth == "nominal"
    found = {}
    for teacher, vectors in (("drop-in", asked.whole), ("refitted", asked.own)):
        draws = [cross_predicted(probe, vectors["textiles"], asked.own["textiles"], truth, d) for d in range(DRAWS)]
        said = np.stack([answers for answers, _ in draws])
        found[f"accuracy, {teacher}"] = outcome(said, truth)
        is_found = (said != "nominal")[:, local]
        found[f"small faults found, {teacher}"] = Outcome(is_found, is_found.mean(axis=0))
        is_passed = (said == "nominal")[:, nominal]
        found[f"faultless ones passed, {teacher}"] = Outcome(is_passed, is_passed.mean(axis=0))
        sound = [chances[:, sorted(set(truth)).index("nominal")] for _, chances in draws]
        wins = [(s[local][:, None] < s[nominal]) + (s[local][:, None] == s[nominal]) / 2 for s in sound]
        found[f"AUC of small faults, {teacher}"] = Outcome(None, np.mean(wins, axis=0))
    return found


def cross_predicted(
    classifier: Callable[[int], Any], taught: np.ndarray, asked: np.ndarray, labels: Any, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and chances of each label in their order, of every image by a classifier taught with the other folds'.

    Args:
        classifier: makes one for so many images.
        taught: embeddings of all images to teach with, `[images, width]`; `asked`: to ask with.
    """
    from sklearn.model_selection import StratifiedKFold
    from threadpoolctl import threadpool_limits

    truth = np.array(labels)
    answers, chances = np.empty_like(truth), np.empty((len(truth), len(set(labels))))
    with threadpool_limits(1):  # problems too small to share among threads
        for others, fold in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(taught, truth):
            fitted = classifier(len(others)).fit(taught[others], truth[others])
            answers[fold], chances[fold] = fitted.predict(asked[fold]), fitted.predict_proba(asked[fold])
    return answers, chances


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

    return KNeighborsClassifier(max(1, min(NEIGHBOURS, samples // 10)), metric="cosine")


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
    "textiles": Task(("textiles",), learned_textiles, ("accuracy, refitted", "AUC of small faults, refitted")),
    "clothes": Task(("clothes",), learned_clothes, ("linear probe, drop-in", "linear probe, refitted")),
}
