"""What a user gives to be read, and what the formats make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbovlm.errors import DataError
from turbovlm.evaluate.data import Data, Picture, Sample
from turbovlm.evaluate.readers.files import Annotations, Pictures


@dataclass(frozen=True)
class Given:
    """Files, read, and the rest of what a user says.

    Attributes:
        files: annotations, in the order given.
        images: the folder of pictures; None if none was given.
        split: which part of the data; None if none was given.
    """

    files: tuple[Annotations, ...]
    images: Path | None
    split: str | None

    @property
    def name(self) -> str:
        """For tables."""
        return ", ".join(each.path.name for each in self.files)

    @property
    def pictures(self) -> Pictures:
        """Where pictures are.

        Raises:
            DataError: nobody said, or it is no folder.
        """
        if self.images is None:
            raise DataError(f"{self.name}: names pictures; say which folder they are in (images=…, or --images FOLDER)")
        if not self.images.is_dir():
            raise DataError(f"{self.images}: there is no such folder")
        return Pictures(self.images)

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


def one_file(*fields: str) -> Callable[[Sequence[Annotations]], bool]:
    """Whether there is one file, whose content or whose first entry has these fields."""
    return lambda files: len(files) == 1 and files[0].has(*fields)


def collected(given: Given, samples: Iterable[Sample | str]) -> Data:
    """Samples, and the reasons why others are none.

    Raises:
        DataError: there is no sample, or two of one id.
    """
    kept: dict[str, Sample] = {}
    left_out = [reason for each in given.files for reason in each.bad]
    for sample in samples:
        if isinstance(sample, str):
            left_out.append(sample)
        elif sample.id in kept:
            raise DataError(f"{given.name}: the id {sample.id!r} is there twice")
        else:
            kept[sample.id] = sample
    if not kept:
        why = f"; the first was left out: {left_out[0]}" if left_out else ""
        raise DataError(f"{given.name}: has nothing to evaluate on{why}")
    return Data(given.name, tuple(kept.values()), left_out=tuple(left_out))


def picture_of(given: Given, where: str, *names: str) -> Picture | str:
    """The picture that an annotation names, or why it is left out."""
    found = given.pictures.find(*names)
    return found or f"{where}: its picture {names[0]} is not in {given.images}"
