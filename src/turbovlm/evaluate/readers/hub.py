"""Data sets of the library `datasets`: `datasets:ID`, `datasets:ID:CONFIG`, or a local folder that it reads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbovlm.errors import DataError
from turbovlm.evaluate.data import Data, Picture, Sample
from turbovlm.evaluate.readers.files import Record
from turbovlm.evaluate.readers.questions import truth

PREFIX = "datasets:"
COLUMNS = {
    "image": ("image", "img", "jpg", "png", "webp"),
    "left": ("left_image", "image_0", "image1", "image_left"),
    "right": ("right_image", "image_1", "image2", "image_right"),
    "caption": ("caption", "captions", "sentences_raw", "raw", "text", "texts"),
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
    """Gives one column of a row, a picture."""

    table: Any
    number: int
    column: str

    def __call__(self) -> Any:
        return self.table[self.number][self.column]


def read_dataset(task: str, spec: str, split: str | None = None) -> Data:
    """A data set by its id or its folder.

    Args:
        task: one of those of `ROWS`.
        spec: with the prefix `datasets:`.
        split: its split; the test split, or the only one, if None.

    Raises:
        DataError: there is none, it has no such split, or it lacks a column.
    """
    table = _load(spec, split)
    columns = _columns(table, spec)
    samples = tuple(ROWS[task](table, columns))
    if not samples:
        raise DataError(f"{spec}: has no rows")
    name = f"{spec.removeprefix(PREFIX)}, {table.split}" if table.split else spec.removeprefix(PREFIX)
    if task == "text-to-image":
        return Data(name, samples, real=tuple(_picture(table, row, columns("image")) for row in range(len(table))))
    return Data(name, samples, _class_names(table, columns, samples) if task == "classification" else ())


def _captions(table: Any, columns: Callable[[str], str]) -> Iterator[Sample]:
    image, caption = columns("image"), columns("caption")
    for row, record in _records(table, caption):
        yield Sample(f"{row}", (_picture(table, row, image),), answers=record.texts(caption))


def _questions(table: Any, columns: Callable[[str], str]) -> Iterator[Sample]:
    image, question, answers = columns("image"), columns("question"), columns("answers")
    for row, record in _records(table, question, answers):
        said = record.texts(answers, "answer")
        yield Sample(f"{row}", (_picture(table, row, image),), record.text(question), said)


def _statements(table: Any, columns: Callable[[str], str]) -> Iterator[Sample]:
    left, right, sentence, label = (columns(name) for name in ("left", "right", "sentence", "label"))
    for row, record in _records(table, sentence, label):
        pair = _picture(table, row, left), _picture(table, row, right)
        yield Sample(f"{row}", pair, record.text(sentence), (truth(record, label),))


def _classes(table: Any, columns: Callable[[str], str]) -> Iterator[Sample]:
    image, label = columns("image"), columns("label")
    names = getattr(table.features[label], "names", None)
    for row, record in _records(table, label):
        name = names[record[label]] if names else str(record[label])
        yield Sample(f"{row}", (_picture(table, row, image),), answers=(name,))


def _masks(table: Any, columns: Callable[[str], str]) -> Iterator[Sample]:
    image, mask = columns("image"), columns("mask")
    for row in range(len(table)):
        yield Sample(f"{row}", (_picture(table, row, image),), mask=_picture(table, row, mask))


def _prompts(table: Any, columns: Callable[[str], str]) -> Iterator[Sample]:
    prompt = columns("prompt")
    for row, record in _records(table, prompt):
        yield Sample(f"{row}", text=record.texts(prompt)[0])


ROWS: dict[str, Callable[[Any, Callable[[str], str]], Iterator[Sample]]] = {
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
    wanted = split or ("test" if "test" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
    if wanted not in loaded:
        raise DataError(f"split={split!r}: {spec} has {', '.join(loaded)}")
    return loaded[wanted]


def _columns(table: Any, spec: str) -> Callable[[str], str]:
    def find(what: str) -> str:
        for name in COLUMNS[what]:
            if name in table.column_names:
                return name
        there = ", ".join(table.column_names)
        raise DataError(f"{spec}: has no column of this task's ({', '.join(COLUMNS[what])}); it has {there}")

    return find


def _records(table: Any, *names: str) -> Iterator[tuple[int, Record]]:
    """Rows without their pictures, which are not decoded for it."""
    for row, content in enumerate(table.select_columns(list(names))):
        yield row, Record(f"row {row}", content)


def _picture(table: Any, row: int, column: str) -> Picture:
    return Picture(f"row {row}, {column}", _Row(table, row, column))


def _class_names(table: Any, columns: Callable[[str], str], samples: Sequence[Sample]) -> tuple[str, ...]:
    names = getattr(table.features[columns("label")], "names", None)
    return tuple(names or sorted({sample.answers[0] for sample in samples}))
