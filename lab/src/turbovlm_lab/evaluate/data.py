"""What a task is judged on: samples with their images and answers, whichever format they were read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm.errors import DataError
from turbovlm.loading.images import in_eight_bits, open_image

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class LazyImage:
    """An image that is read when it is needed.

    Attributes:
        name: where it comes from, for messages: a path, or a data set's row.
        read: gives it; raises anything where it cannot.
    """

    name: str
    read: Callable[[], Image]

    @classmethod
    def file(cls, path: Path) -> LazyImage:
        """One that is a file."""
        return cls(str(path), _File(path))

    def open(self, mode: str = "RGB") -> Image:
        """The decoded image.

        Raises:
            DataError: it is not there or does not decode; the message names it.
        """
        try:
            return in_eight_bits(self.read(), mode)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error
        except Exception as error:  # decoders raise many kinds, that of too many pixels among them
            raise DataError(f"{self.name}: {_reason(error)}") from error


@dataclass(frozen=True)
class Sample:
    """One thing to be judged.

    Attributes:
        id: unique in its data set; the same in every run.
        images: one; two for NLVR2; for text-to-image what an image begins with, or none.
        text: the question, the statement or the prompt.
        answers: what is right: captions, a question's answers, `("True",)` or `("False",)`, or the name of the class.
        mask: the salient region, where that is the answer.
    """

    id: str
    images: tuple[LazyImage, ...] = ()
    text: str = ""
    answers: tuple[str, ...] = ()
    mask: LazyImage | None = None


@dataclass(frozen=True)
class Data:
    """What a reader gives.

    Attributes:
        name: the data set and its split, for tables.
        samples: in the order of the file.
        classes: names of a classification's classes, in the order of the model's outputs.
        left_out: what was not taken and why, one line each: annotations without an image, and the like.
        real: images that those made from prompts are compared with.
        tokenized: captions are words in lower case without punctuation: nothing is to be cut.
    """

    name: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    real: tuple[LazyImage, ...] = ()
    tokenized: bool = False


@dataclass(frozen=True)
class _File:
    path: Path

    def __call__(self) -> Image:
        with open_image(self.path) as image:
            image.load()
            return image


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"does not decode ({error})"
