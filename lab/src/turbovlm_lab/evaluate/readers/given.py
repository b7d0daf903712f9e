"""What a user gives to be read, and what the formats make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from turbovlm.errors import DataError
from turbovlm_lab.evaluate.data import Data, LazyImage, Sample
from turbovlm_lab.evaluate.readers.files import Annotations, ImageFolder, Record

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """Files, read, and the rest of what a user says.

    Attributes:
        files: annotations, in the order given.
        images: the folder of images.
        split: which part of the data; None if none was given.
    """

    files: tuple[Annotations, ...]
    images: Path
    split: str | None

    @property
    def name(self) -> str:
        """For tables."""
        return ", ".join(each.path.name for each in self.files)

    def without_split(self) -> None:
        """To be called where a format has no splits in a file.

        Raises:
            DataError: one was given.
        """
        if self.split is not None:
            raise DataError(f"split={self.split!r}: {self.name} has no splits within it; give the file of that split")


@dataclass(frozen=True)
class Format:
    """A way in which data lie in files.

    Attributes:
        name: as the field calls it.
        looks: how to tell it.
        matches: whether these files have it.
        read: the data.
    """

    name: str
    looks: str
    matches: Callable[[Sequence[Annotations]], bool]
    read: Callable[[Given], Data]


def given_by(files: Sequence[Annotations], images: Path | None, split: str | None) -> Given:
    """The same, checked.

    Raises:
        DataError: nobody said where images are, or it is no folder.
    """
    names = ", ".join(file.path.name for file in files)
    if images is None:
        raise DataError(f"{names}: names images; say which folder they are in (images=…, or --images FOLDER)")
    if not images.is_dir():
        raise DataError(f"{images}: {'is a file, not a folder' if images.exists() else 'there is no such folder'}")
    return Given(tuple(files), images, split)


def one_file(*fields: str) -> Callable[[Sequence[Annotations]], bool]:
    """Whether there is one file, whose content or whose first entry has these fields."""
    return lambda files: len(files) == 1 and files[0].has(*fields)


def each(records: Iterable[Record], make: Callable[[int, Record], T]) -> Iterator[T | str]:
    """What is made of records by their numbers, and why nothing is made of those that are wrong."""
    for number, record in enumerate(records):
        try:
            yield make(number, record)
        except DataError as error:
            yield str(error)


def refused(records: Iterable[Record], take: Callable[[Record], object]) -> list[str]:
    """Gives records to `take`, one by one; why it did not take some."""
    return [reason for reason in each(records, lambda _, record: (take(record),)) if isinstance(reason, str)]


def collected(given: Given, samples: Iterable[Sample | str]) -> Data:
    """Samples, and the reasons why others are none; see `collect`."""
    return collect(given.name, [*(reason for file in given.files for reason in file.bad), *samples])


def collect(name: str, samples: Iterable[Sample | str]) -> Data:
    """Samples, and the reasons why others are none.

    Raises:
        DataError: there is no sample, or two of one id.
    """
    kept: dict[str, Sample] = {}
    left_out = []
    for sample in samples:
        if isinstance(sample, str):
            left_out.append(sample)
        elif sample.id in kept:
            raise DataError(f"{name}: the id {sample.id!r} is there twice")
        else:
            kept[sample.id] = sample
    if not kept:
        why = f"; the first was left out: {left_out[0]}" if left_out else ""
        raise DataError(f"{name}: has nothing to evaluate on{why}")
    return Data(name, tuple(kept.values()), left_out=tuple(left_out))


def image_of(given: Given, where: str, *names: str) -> LazyImage | str:
    """The image that an annotation names, or why it is left out."""
    found = ImageFolder(given.images).find(*names)
    return found or f"{where}: its image {names[0]} is not in {given.images}"
