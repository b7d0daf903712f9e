"""What the studio runs: models by name, each loaded when it is first used, and what comes of a run.

A `Subject` says what a model is and takes; loaded, it is a `Loaded`, which runs a `Sample` unmerged and merged and
gives an `Outcome`. `Models` holds all of them for the page's tabs.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.config import Config
from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.studio.measuring import Times
from turbovlm_lab.zoo.packages import PackageFile

if TYPE_CHECKING:
    from PIL.Image import Image

    from turbovlm.encoder.state import BlockTrace

IMAGE, RECORDING, WORDS = "image", "recording", "words"
"""What a subject takes, beside words."""
ENCODER_SETTINGS = ("alpha", "degree", "similarity", "partition", "schedule")


@dataclass(frozen=True, eq=False)
class Sample:
    """What a model is run on.

    Attributes:
        key: says which it is; what was found of a sample unmerged is kept under it.
        image: RGB; None where the subject takes none.
        wave: a recording of 16 kHz, mono, `[samples]`.
        words: labels, a question or a prompt.
        steps: of denoising.
    """

    key: str
    image: Image | None = None
    wave: Tensor | None = None
    words: str = ""
    steps: int | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model makes of a sample: one of labels with their probabilities, a picture, or a text.

    Attributes:
        gmacs: 10⁹ multiply-accumulates, counted as the model ran; None where they are yet to be counted.
        tokens: of the sequence before the first block and after each.
    """

    gmacs: float | None
    tokens: tuple[int, ...] = ()
    labels: Mapping[str, float] = field(default_factory=dict)
    picture: Image | None = None
    text: str | None = None


@dataclass(frozen=True, eq=False)
class View:
    """What is needed to draw which patches have become one token.

    Attributes:
        image: as the model saw it: cropped and resized.
        grid: rows and columns of patches.
        traces: of every block that was traced, in order.
        unit: what a patch is called, `"patch"` or such as `"frame"` of sound.
    """

    image: Image
    grid: tuple[int, int]
    traces: Sequence[BlockTrace]
    unit: str = "patch"


@dataclass(frozen=True, eq=False)
class Outcome:
    """A sample, unmerged and merged.

    Attributes:
        measured: the part whose tokens, multiply-accumulates and time the answers have, such as `"the image tower"`.
        drift: 1 − cosine of what the merged model gives to what the unmerged one gives; None where there is no such.
        centred: the same with the mean over other samples taken off both.
        time: times both, unmerged and merged, in turn.
        count: counts the merged model's 10⁹ multiply-accumulates, where its answer has none yet.
        said: what turbovlm says of the settings on this model: the lines of `print(handle)`.
        counted: where the last of the tokens are that the answers have.
        notes: what must be known to read the result, in sentences.
    """

    unmerged: Answer
    merged: Answer
    measured: str
    time: Callable[[], Sequence[Times]]
    said: str
    drift: float | None = None
    centred: float | None = None
    view: View | None = None
    counted: str = "behind the last block"
    count: Callable[[], float] | None = None
    notes: tuple[str, ...] = ()

    def complete(self) -> Outcome:
        """The same with its multiply-accumulates."""
        if self.merged.gmacs is not None or self.count is None:
            return self
        return replace(self, merged=replace(self.merged, gmacs=self.count()))


class Loaded(Protocol):
    """A subject with its weights.

    Attributes:
        model: what `turbovlm.apply` takes; nobody leaves anything applied to it.
        depth: blocks that can merge.
        fixed: settings that it is always applied with.
    """

    model: Any
    depth: int
    fixed: Mapping[str, Any]

    def run(self, sample: Sample, configs: Sequence[Config]) -> Outcome:
        """Run a sample unmerged and merged by these settings.

        Raises:
            TurboError: the settings do not fit the model, or the sample's words are not what it takes.
        """


class Encodes(Loaded, Protocol):
    """A loaded subject that is an encoder of images, which methods can be compared on and settings calibrated.

    Attributes:
        side, patch: pixels per side of its images and patches.
    """

    side: int
    patch: int

    def prepare(self, images: Sequence[Image], side: int | None = None) -> Any:
        """RGB images to pixels; `side`: of another size than its own."""

    def seen(self, image: Image) -> Image:
        """The image as the model sees it: cropped and resized."""

    def encode(self, model: nn.Module, pixels: Any) -> Tensor:
        """What drift is measured on, `[images, …]`, by this model or a copy of it."""


@dataclass(frozen=True)
class Photo:
    """An image that is built in or was uploaded, and whom to credit; `wave`: see `Sample`."""

    key: str
    title: str
    image: Image
    credit: str = ""
    wave: Tensor | None = None


@dataclass(frozen=True)
class Subject:
    """A model as the page offers it.

    Attributes:
        key: its name in links; `title`: on the page; `about`: one or two sentences.
        takes: `IMAGE`, `RECORDING` or `WORDS`.
        load: gives it with its weights.
        words: what the words beside it are, None where it takes none; `default_words`: what stands there at first.
        amounts: keywords of `apply` that say how much, the first the default, and the values of each at first.
        settings: those of the other controls that the page has for it.
        steps: of denoising, at first; None where there are none.
        denoises: whether its settings are those of denoisers.
        encodes: whether it is an encoder of images: an `Encodes`.
        needs: why it cannot be loaded here, such as a package that is missing and the command that brings it; None
            where it can.
        photos: built-in images; those of the demo if None.
    """

    key: str
    title: str
    about: str
    takes: str
    load: Callable[[], Loaded]
    words: str | None = None
    default_words: str = ""
    amounts: Mapping[str, float] = field(default_factory=lambda: {"flops": 0.6, "keep": 0.4, "r": 12.0})
    settings: tuple[str, ...] = ENCODER_SETTINGS
    steps: int | None = None
    denoises: bool = False
    encodes: bool = False
    needs: Callable[[], str | None] = lambda: None
    photos: Callable[[], Sequence[Photo]] | None = None


def packages(*files: PackageFile) -> Callable[[], str | None]:
    """A subject's `needs`: the packages that its weights come in."""

    def missing() -> str | None:
        absent = [file for file in files if importlib.util.find_spec(file.module) is None]
        return f"{absent[0].what} is not installed: {absent[0].remedy}" if absent else None

    return missing


class Models:
    """Subjects by their keys, each loaded on first use, once; and one lock for all that computes.

    Args:
        subjects: one at least; the page begins with the first.
        folders: of images, that the page may read beside what is uploaded.
    """

    def __init__(self, subjects: Sequence[Subject], folders: Sequence[Path] = ()) -> None:
        if not subjects:
            raise ConfigError("subjects=[]: the studio needs one at least")
        self.subjects = {subject.key: subject for subject in subjects}
        self.folders = tuple(folders)
        self.computing = threading.RLock()
        """Held while a model runs: times of two at once would mean nothing."""
        self._loaded: dict[str, Loaded] = {}

    def __getitem__(self, key: str) -> Loaded:
        """The subject with its weights.

        Raises:
            ConfigError: there is no such subject.
            TurboError: it cannot be loaded here.
        """
        if key not in self.subjects:
            raise ConfigError(f"model={key!r}: must be one of {', '.join(self.subjects)}")
        with self.computing:
            if key not in self._loaded:
                subject = self.subjects[key]
                missing = subject.needs()
                if missing is not None:
                    raise TurboError(missing)
                with torch.inference_mode(False):
                    self._loaded[key] = subject.load()
            return self._loaded[key]

    @property
    def first(self) -> Subject:
        """What the page shows at first: the first that can be loaded here.

        Raises:
            TurboError: none can; the message says what is missing.
        """
        missing = {key: subject.needs() for key, subject in self.subjects.items()}
        for key, reason in missing.items():
            if reason is None:
                return self.subjects[key]
        raise TurboError("; ".join(f"{key}: {reason}" for key, reason in missing.items()))

    @property
    def busy(self) -> bool:
        """Whether something computes just now that the calling thread would have to wait for."""
        free = self.computing.acquire(blocking=False)
        if free:
            self.computing.release()
        return not free

    def is_loaded(self, key: str) -> bool:
        """Whether its weights are in memory."""
        return key in self._loaded

    @property
    def encoders(self) -> dict[str, Subject]:
        """Those that are encoders of images, by key: `Models[key]` gives an `Encodes`."""
        return {key: subject for key, subject in self.subjects.items() if subject.encodes}
