"""Reading a shard: its images decoded and prepared, in batches, with a reason where one does not decode."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from turbovlm.corpus.shards import Shard
from turbovlm.corpus.tables import Columns, columns_of, load_dataset
from turbovlm.errors import DataError
from turbovlm.loading.images import IMAGE_SUFFIXES, decode
from turbovlm.loading.processors import PrepareOne

if TYPE_CHECKING:
    from PIL.Image import Image

UNREADABLE = (OSError, EOFError, tarfile.TarError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class Record:
    """An image as it lies in its source.

    Attributes:
        name: of its file, relative to the source, or of its row.
        content: the file, or pixels `[height, width, 3]`; None where it could not be read.
        error: why; None where it could.
    """

    name: str
    content: bytes | np.ndarray[Any, Any] | None
    error: str | None = None


@dataclass(frozen=True)
class Images:
    """Consecutive images of a shard.

    Attributes:
        shard, number: of the shard, and which of its batches this is.
        last: whether it is the shard's last.
        names, sizes, errors: of each image; (width, height) in pixels, and why it does not decode; None otherwise.
    """

    shard: int
    number: int
    last: bool
    names: list[str]
    sizes: list[tuple[int, int] | None]
    errors: list[str | None]


@dataclass(frozen=True)
class Batch(Images):
    """Images prepared for a model.

    Attributes:
        groups: the images of each size: their places in the batch, and the model's input of them by argument name.
    """

    groups: list[tuple[list[int], dict[str, np.ndarray[Any, Any]]]]


def read_batches(shard: Shard, size: int, prepare: PrepareOne, columns: Columns = Columns()) -> Iterator[Batch]:  # noqa: B008
    """The batches of a shard: at least one, of which the last says so.

    Args:
        shard: what to read.
        size: images of a batch.
        prepare: an image to the model's input of it.
        columns: where tables have their images.

    Raises:
        DataError: a table has no such column any more.
    """
    records = read_records(shard, columns)
    some, number = list(islice(records, size)), 0
    while True:
        following = list(islice(records, size))
        yield batch_of(some, prepare, shard.index, number, not following)
        if not following:
            return
        some, number = following, number + 1


def batch_of(
    records: Sequence[Record], prepare: PrepareOne, shard: int = 0, number: int = 0, last: bool = True
) -> Batch:
    """Decode and prepare these images."""
    sizes: list[tuple[int, int] | None] = []
    errors: list[str | None] = []
    groups: dict[tuple[Any, ...], tuple[list[int], list[dict[str, np.ndarray[Any, Any]]]]] = {}
    for place, record in enumerate(records):
        size = None
        error = record.error
        if record.content is not None:
            try:
                image = _image(record.content)
            except DataError as reason:
                error = str(reason)
            else:
                size = image.size
                made = {name: np.asarray(value) for name, value in prepare(image).items()}
                kind = tuple((name, value.shape, str(value.dtype)) for name, value in made.items())
                places, inputs = groups.setdefault(kind, ([], []))
                places.append(place)
                inputs.append(made)
        sizes.append(size)
        errors.append(error)
    joined = [
        (places, {name: np.concatenate([each[name] for each in inputs]) for name in inputs[0]})
        for places, inputs in groups.values()
    ]
    return Batch(shard, number, last, [record.name for record in records], sizes, errors, joined)


def _image(content: bytes | np.ndarray[Any, Any]) -> Image:
    if isinstance(content, bytes):
        return decode(io.BytesIO(content))
    from PIL import Image

    try:
        return Image.fromarray(content).convert("RGB")
    except (TypeError, ValueError) as error:
        raise DataError(f"holds no pixels of an image ({error})") from error


def read_records(shard: Shard, columns: Columns = Columns()) -> Iterator[Record]:  # noqa: B008
    """The images of a shard, in order. What cannot be read is a record with an error.

    Raises:
        DataError: a table has no such column any more.
    """
    return READERS[shard.kind](shard, columns)


def _read_files(shard: Shard, columns: Columns) -> Iterator[Record]:
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(shard.source)
    for name in shard.files:
        try:
            content = filesystem.cat_file(f"{root.rstrip('/')}/{name}")
        except OSError as error:
            yield Record(name, None, f"cannot be read: {_said(error)}")
        else:
            yield Record(name, content)


def _read_tar(shard: Shard, columns: Columns) -> Iterator[Record]:
    """Members that are images; a tar that breaks off is one record more, named as the tar."""
    import fsspec

    name, seen = shard.source.rpartition("/")[2], 0
    try:
        with fsspec.open(shard.source) as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                suffix = "." + member.name.lower().rpartition(".")[2]
                if not member.isfile() or suffix not in IMAGE_SUFFIXES:
                    continue
                held: Any = tar.extractfile(member)
                content = held.read()
                seen += 1
                yield Record(f"{name}/{member.name}", content)
            # tarfile ends without a word where a header is damaged or missing: only blocks of zeros end a tar
            stream: Any = tar.fileobj
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                yield Record(name, None, f"cannot be read behind its first {seen} images: no end-of-archive mark")
    except UNREADABLE as error:
        yield Record(name, None, f"cannot be read behind its first {seen} images: {_said(error)}")


def _read_parquet(shard: Shard, columns: Columns) -> Iterator[Record]:
    import fsspec
    import pyarrow
    from pyarrow import parquet

    name = shard.source.rpartition("/")[2]
    group = shard.start
    try:
        with fsspec.open(shard.source) as file:
            table = parquet.ParquetFile(file)
            first = sum(table.metadata.row_group(before).num_rows for before in range(shard.start))
            image, named = columns_of(shard.source, table.schema_arrow, columns)
            wanted = [image, *([named] if named is not None else [])]
            for group in range(shard.start, shard.stop):
                rows = table.metadata.row_group(group).num_rows
                try:
                    values = table.read_row_group(group, columns=wanted).to_pydict()
                except (pyarrow.ArrowException, OSError) as error:
                    reason = f"{rows} rows from {first} on cannot be read: {_said(error)}"
                    yield Record(f"{name}#{first}", None, reason)
                else:
                    for row, value in enumerate(values[image], first):
                        given = None if named is None else values[named][row - first]
                        yield _row(value, given, f"{name}#{row}")
                first += rows
            if shard.stop == 0:
                raise OSError("changed since the run began")
    except (pyarrow.ArrowException, OSError) as error:
        yield Record(name, None, f"cannot be read: {_said(error)}")


def _row(value: Any, given: Any, place: str) -> Record:
    """A row of a table: bytes, or bytes and a path."""
    path = value.get("path") if isinstance(value, Mapping) else None
    content = value.get("bytes") if isinstance(value, Mapping) else value
    name = str(given) if given is not None else str(path) if path else place
    return Record(name, None, "cannot be read: the row is empty") if content is None else Record(name, content)


def _read_dataset(shard: Shard, columns: Columns) -> Iterator[Record]:
    import datasets

    table = load_dataset(shard.source, shard.files[0])
    image, named = columns_of(shard.source, table.features.arrow_schema, columns)
    table = table.cast_column(image, datasets.Image(decode=False))
    for row in range(shard.start, shard.stop):
        found_row = table[row]
        value = dict(found_row[image] or {})
        place = f"{shard.source}#{row}"
        if value.get("bytes") is None and value.get("path"):
            try:
                with open(value["path"], "rb") as file:
                    value["bytes"] = file.read()
            except OSError as error:
                yield Record(place, None, f"cannot be read: {_said(error)}")
                continue
        given = None if named is None else found_row[named]
        yield _row(value, given if given is not None else place, place)


def _said(error: BaseException) -> str:
    return str(error).replace("\n", " ") or type(error).__name__


READERS: dict[str, Callable[[Shard, Columns], Iterator[Record]]] = {
    "files": _read_files,
    "tar": _read_tar,
    "parquet": _read_parquet,
    "dataset": _read_dataset,
}
"""By kind of shard."""
