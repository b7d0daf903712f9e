"""Data sets of the library `datasets`: `datasets:ID`, `datasets:ID:CONFIG`, or a local folder that it reads."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbovlm.errors import DataError
from turbovlm.loading.images import open_image
from turbovlm_lab.evaluate.data import Data, LazyImage, Sample
from turbovlm_lab.evaluate.readers.files import Record
from turbovlm_lab.evaluate.readers.given import collect, each
from turbovlm_lab.evaluate.readers.questions import truth

PREFIX = "datasets:"
TEST, SPLIT = "test", "split"
"""The split that is taken if none is named; the column that some have instead of splits."""
COLUMNS = {
    "image": ("image", "img", "jpg", "png", "webp"),
    "left": ("left_image", "image_0", "image1", "image_left"),
    "right": ("right_image", "image_1", "image2", "image_right"),
    "caption": (
        "caption",
        "captions",
        "sentences",
        "sentences_raw",
        "raw",
        "answer",
        "annotations_captions",
        "text",
        "texts",
    ),
    "question": ("question",),
    "answers": ("answers", "answer", "multiple_choice_answer"),
    "sentence": ("sentence", "hypothesis", "statement"),
    "label": ("label", "labels", "cls", "fine_label"),
    "mask": ("mask", "label", "segmentation", "annotation"),
    "prompt": ("prompt", "Prompt", "caption", "text"),
}
"""What columns are called, by what is in them."""


@dataclass(frozen=True)
class _Row:
    """Gives one column of a row: an image, or the bytes of one, as tables have it whose columns have no type."""

    table: Any
    number: int
    column: str

    def __call__(self) -> Any:
        from PIL import Image

        found = self.table[self.number][self.column]
        if isinstance(found, dict) and isinstance(found.get("bytes"), bytes):
            found = found["bytes"]
        if isinstance(found, bytes):
            return open_image(io.BytesIO(found))
        if not isinstance(found, Image.Image):
            raise ValueError("it is empty" if found is None else f"it is {found!r:.60}, no image")
        return found


def read_dataset(task: str, spec: str, split: str | None = None) -> Data:
    """A data set by its id or its folder.

    Args:
        task: one of those of `ROWS`.
        spec: with the prefix `datasets:`.
        split: its split; the test split, or the only one, if None.

    Raises:
        DataError: there is none, it has no such split, or it lacks a column.
    """
    table, of_split = _of_split(_load(spec, split), spec, split)
    columns = _columns(table, spec)
    name = f"{spec.removeprefix(PREFIX)}, {of_split}"
    fields, sample = ROWS[task](table, columns)
    data = collect(name, each(_records(table, *fields), sample))
    if task == "text-to-image":
        return dataclasses.replace(data, real=tuple(_image(table, row, columns("image")) for row in range(len(table))))
    if task == "classification":
        return dataclasses.replace(data, classes=_class_names(table, columns, data.samples))
    return data


Reading = tuple[tuple[str, ...], Callable[[int, Record], Sample]]
"""Columns without images, and what is made of their content in a row."""


def _captions(table: Any, columns: Callable[[str], str]) -> Reading:
    image, caption = columns("image"), columns("caption")

    def sample(row: int, record: Record) -> Sample:
        return Sample(f"{row}", (_image(table, row, image),), answers=record.texts(caption, "raw"))

    return (caption,), sample


def _questions(table: Any, columns: Callable[[str], str]) -> Reading:
    image, question, answers = columns("image"), columns("question"), columns("answers")

    def sample(row: int, record: Record) -> Sample:
        said = record.texts(answers, "answer", blank=True)
        return Sample(f"{row}", (_image(table, row, image),), record.text(question), said)

    return (question, answers), sample


def _statements(table: Any, columns: Callable[[str], str]) -> Reading:
    left, right, sentence, label = (columns(name) for name in ("left", "right", "sentence", "label"))

    def sample(row: int, record: Record) -> Sample:
        pair = _image(table, row, left), _image(table, row, right)
        return Sample(f"{row}", pair, record.text(sentence), (truth(record, label),))

    return (sentence, label), sample


def _classes(table: Any, columns: Callable[[str], str]) -> Reading:
    image, label = columns("image"), columns("label")
    names = getattr(table.features[label], "names", None)

    def sample(row: int, record: Record) -> Sample:
        number = record[label]
        if number is None or number == -1 or (names and not 0 <= number < len(names)):
            raise DataError(f"{record.where}: {label!r} is {number}, no class; does this split have labels at all?")
        return Sample(f"{row}", (_image(table, row, image),), answers=(names[number] if names else str(number),))

    return (label,), sample


def _masks(table: Any, columns: Callable[[str], str]) -> Reading:
    image, mask = columns("image"), columns("mask")
    return (), lambda row, _: Sample(f"{row}", (_image(table, row, image),), mask=_image(table, row, mask))


def _prompts(table: Any, columns: Callable[[str], str]) -> Reading:
    prompt = columns("prompt")
    return (prompt,), lambda row, record: Sample(f"{row}", text=record.texts(prompt)[0])


ROWS: dict[str, Callable[[Any, Callable[[str], str]], Reading]] = {
    "captioning": _captions,
    "retrieval": _captions,
    "vqa": _questions,
    "nlvr2": _statements,
    "classification": _classes,
    "saliency": _masks,
    "text-to-image": _prompts,
}


def _load(spec: str, split: str | None) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{spec}: needs the library datasets: pip install datasets")
    import datasets

    name, _, config = spec.removeprefix(PREFIX).partition(":")
    if not name:
        raise DataError(f"{spec!r}: must be {PREFIX}ID, {PREFIX}ID:CONFIG or {PREFIX}FOLDER")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = "folder" if Path(name).exists() else "id"
        raise DataError(f"{spec}: could not be read from this {where} ({error})") from error
    only = next(iter(loaded)) if len(loaded) == 1 else None
    if split in loaded:
        return loaded[split]
    if split is None and TEST in loaded:
        return loaded[TEST]
    if only is None or (split is not None and SPLIT not in loaded[only].column_names):
        raise DataError(f"split={split!r}: {spec} has {', '.join(loaded)}")
    return loaded[only]


def _of_split(table: Any, spec: str, split: str | None) -> tuple[Any, str]:
    """A split and its name: the rows of it, where a column says which they are of, as in Flickr30k's and Karpathy's."""
    of_all = str(table.split)
    said = table[SPLIT] if SPLIT in table.column_names else []
    there = sorted({str(each) for each in said})
    wanted = split or TEST
    if wanted in there:
        return table.select([row for row, each in enumerate(said) if each == wanted]), wanted
    if split not in (None, of_all):
        raise DataError(f"split={split!r}: {spec} has {', '.join(there)}")
    return table, of_all


def _columns(table: Any, spec: str) -> Callable[[str], str]:
    def find(what: str) -> str:
        for name in COLUMNS[what]:
            if name in table.column_names:
                return name
        there = ", ".join(table.column_names)
        raise DataError(f"{spec}: has no column of this task's ({', '.join(COLUMNS[what])}); it has {there}")

    return find


def _records(table: Any, *names: str) -> Iterator[Record]:
    """Rows without their images, which are not decoded for it."""
    if not names:
        return (Record(f"row {row}", {}) for row in range(len(table)))
    return (Record(f"row {row}", content) for row, content in enumerate(table.select_columns(list(names))))


def _image(table: Any, row: int, column: str) -> LazyImage:
    return LazyImage(f"row {row}, {column}", _Row(table, row, column))


def _class_names(table: Any, columns: Callable[[str], str], samples: Sequence[Sample]) -> tuple[str, ...]:
    names = getattr(table.features[columns("label")], "names", None)
    return tuple(names or sorted({sample.answers[0] for sample in samples}))
