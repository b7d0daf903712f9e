"""Annotation files and image folders, with errors that say where."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from turbovlm.errors import DataError
from turbovlm.loading.images import IMAGE_SUFFIXES
from turbovlm_lab.evaluate.data import LazyImage

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One entry of an annotation file.

    Attributes:
        where: file and line, or file and place in it, for messages.
        content: what it holds.
    """

    where: str
    content: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        if name not in self.content:
            has = ", ".join(map(repr, self.content)) or "nothing"
            raise DataError(f"{self.where}: has no {name!r}; it has {has}")
        return self.content[name]

    def __contains__(self, name: str) -> bool:
        return name in self.content

    def text(self, name: str, blank: bool = False) -> str:
        """A field that is a string with more than blanks in it, or any string if `blank`."""
        found = self[name]
        if not isinstance(found, str) or not (blank or found.strip()):
            raise DataError(f"{self.where}: {name!r} is {found!r}; it must be a text")
        return found.strip()

    def texts(self, name: str, inner: str | None = None, blank: bool = False) -> tuple[str, ...]:
        """A field that is one text or a list of them, or of records whose field `inner` is one, or those as columns.

        `blank`: they may be empty, as answers of people are who said nothing.
        """
        found = self[name]
        if isinstance(found, dict) and isinstance(found.get(inner), list):
            found = found[inner]
        entries = found if isinstance(found, list) else [found]
        if not entries:
            raise DataError(f"{self.where}: {name!r} is empty")
        within = [Record(f"{self.where}, {name}[{i}]", _record(e, inner or name)) for i, e in enumerate(entries)]
        return tuple(each.text(inner or name, blank) for each in within)

    def records(self, name: str) -> list[Record]:
        """A field that is a list of objects."""
        return entries(self[name], f"{self.where}, {name}")


def entries(content: Any, where: str) -> list[Record]:
    """The objects of a list.

    Raises:
        DataError: it is no list of objects, or an empty one.
    """
    if not isinstance(content, list) or not content:
        raise DataError(f"{where}: must be a list of objects, and not empty; it is {_shown(content)}")
    found = []
    for number, entry in enumerate(content):
        if not isinstance(entry, dict):
            raise DataError(f"{where}[{number}]: must be an object; it is {_shown(entry)}")
        found.append(Record(f"{where}[{number}]", entry))
    return found


@dataclass(frozen=True)
class Annotations:
    """A file of annotations, read.

    Attributes:
        path: the file.
        content: what its JSON is; None for JSON lines and tables.
        rows: the lines of JSON lines or of a table; empty for JSON.
        bad: lines of a table that are not like its header, and why.
    """

    path: Path
    content: Any = None
    rows: tuple[Record, ...] = ()
    bad: tuple[str, ...] = ()

    @property
    def whole(self) -> Record | None:
        """The file as one record, where its JSON is an object."""
        return Record(str(self.path), self.content) if isinstance(self.content, dict) else None

    @property
    def listed(self) -> list[Record]:
        """Its entries, where it is a list or lines; itself, where it is an object: lines of which there is one."""
        if self.rows:
            return list(self.rows)
        if isinstance(self.content, dict):
            return [Record(f"{self.path}, line 1", self.content)]
        return entries(self.content, str(self.path)) if isinstance(self.content, list) else []

    def has(self, *fields: str) -> bool:
        """Whether it is an object with these fields, or its first entry has them."""
        first = self.whole or next(iter(self.listed), None)
        return first is not None and all(field in first for field in fields)


def load(path: Path) -> Annotations:
    """JSON, JSON lines, a table with a header (`.csv`, `.tsv`), or names and captions (`.token`).

    Raises:
        DataError: there is no such file, or it is none of these; the message has the line.
    """
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path}: is empty")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table(path, text)
    if path.suffix.lower() == ".token":
        return _table(path, f"name\tcaption\n{text}", before=1)
    try:
        return Annotations(path, json.loads(text))
    except json.JSONDecodeError as error:
        first = text.lstrip().splitlines()[0]
        if error.msg != "Extra data" or not first.startswith("{"):
            raise DataError(f"{path}, line {error.lineno}: is not JSON ({error.msg})") from error
    return Annotations(path, rows=tuple(_lines(path, text)))


def read_text(path: Path) -> str:
    """A whole file.

    Raises:
        DataError: there is none, or it is not text.
    """
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'there is no such file'}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not a text in UTF-8 (byte {error.start})") from error


def lines_of(text: str) -> list[str]:
    """Lines of a file. Other characters that Python takes for ends of lines stand within captions."""
    return [line.removesuffix("\r") for line in text.split("\n")]


@dataclass(frozen=True)
class ImageFolder:
    """A folder that annotations name images of."""

    folder: Path

    def find(self, *names: str) -> LazyImage | None:
        """The first that is there, by its path under the folder or by its last part alone."""
        for name in names:
            for path in (self.folder / name, self.folder / Path(name).name):
                if path.is_file():
                    return LazyImage.file(path)
        return None


def listed_images(folder: Path) -> list[Path]:
    """The images directly in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def unique(found: dict[Any, T], key: Any, value: T, where: str, what: str) -> None:
    """Adds to `found`.

    Raises:
        DataError: it is there already.
    """
    if key in found:
        raise DataError(f"{where}: {what} {key!r} is there twice")
    found[key] = value


def _record(entry: Any, name: str) -> dict[str, Any]:
    return entry if isinstance(entry, dict) else {name: entry}


def _lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: is not JSON ({error.msg})") from error
        if not isinstance(content, dict):
            raise DataError(f"{path}, line {number}: must be an object; it is {_shown(content)}")
        yield Record(f"{path}, line {number}", content)


def _table(path: Path, text: str, before: int = 0) -> Annotations:
    """`before`: lines of the text that stand before those of the file."""
    delimiter = max("|\t,", key=text.partition("\n")[0].count)
    # Flickr30k's own table has blanks behind its bars, quotes within its captions, and a row that lacks a bar
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE)
    header = [name.strip() for name in next(reader)]
    rows, bad = [], []
    for row in _rows(path, reader, before):
        where = f"{path}, line {reader.line_num - before}"
        if len(row) == len(header):
            rows.append(Record(where, dict(zip(header, (value.strip() for value in row)))))
        elif row:
            bad.append(f"{where}: has {len(row)} fields, and the header has {len(header)}")
    return Annotations(path, rows=tuple(rows), bad=tuple(bad))


def _rows(path: Path, reader: Any, before: int) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num - before}: is no row of a table ({error})") from error


def _shown(content: Any) -> str:
    shown = repr(content)
    return shown if len(shown) <= 60 else f"{shown[:57]}…"
