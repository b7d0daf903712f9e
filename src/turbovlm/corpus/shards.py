"""What a source of images holds, cut into shards: the units that are read by one process and written as one file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from turbovlm.corpus.tables import Columns, columns_of, load_dataset
from turbovlm.errors import ConfigError, DataError, TurboError
from turbovlm.loading.images import IMAGE_SUFFIXES

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
LEAST, MOST = 1_000, 10_000
"""Images of a shard where the user names none: a part of 10,000 embeddings is about 30 MB, and 100 million images then
are 10,000 files; small corpora are cut finer, so that a run that is killed loses little."""


@dataclass(frozen=True)
class Shard:
    """Some images of a source, in their order.

    Attributes:
        index: which of the source's shards it is.
        kind: `"files"`, `"tar"`, `"parquet"` or `"dataset"`.
        source: the folder that files are in; the file; the dataset's id.
        files: of `"files"`: their paths, relative to the folder.
        start, stop: of `"parquet"` the row groups, of `"dataset"` the rows; 0 of others.
        images: how many; None where only reading tells.
        digest: of what was seen of it without reading it: names and sizes.
    """

    index: int
    kind: str
    source: str
    files: tuple[str, ...] = ()
    start: int = 0
    stop: int = 0
    images: int | None = None
    digest: str = ""

    @property
    def part(self) -> str:
        """Name of the file that holds its rows."""
        return f"part-{self.index:06d}.parquet"


def find_shards(source: str, size: int | None = None, columns: Columns = Columns()) -> list[Shard]:  # noqa: B008
    """Cut a source into shards; the same source gives the same ones.

    Args:
        source: a folder of images, of tar files or of Parquet files, searched with the folders in it; one such file; a
            pattern such as `"data/*.tar"`; any of them behind a protocol that `fsspec` knows, such as `s3://`; or the
            id of a dataset of `datasets`.
        size: images of a shard; tar files are one shard each, and row groups stay whole. From 1,000 to 10,000 if None,
            by how many there are.
        columns: where tables have their images.

    Raises:
        ConfigError: `size` is no count.
        DataError: there is no such source, or no images are in it, or it mixes kinds, or a table has no such
            column.
    """
    if size is not None and size < 1:
        raise ConfigError(f"shard_size={size}: must be an integer ≥ 1")
    filesystem, path = _file_system(source)
    found = _files(filesystem, path)
    if not found:
        if filesystem.exists(path):
            raise DataError(
                f"{source}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}), tar or Parquet files"
                if filesystem.isdir(path)
                else f"{source}: is no image, tar or Parquet file"
            )
        if "://" in source or not _may_be_id(source):
            raise DataError(f"{source}: there is no such folder or file")
        return list(_of_dataset(source, size, columns))
    kinds = {_kind(name): name for name, _ in found}
    if len(kinds) > 1:
        named = ", ".join(sorted(kinds.values()))
        raise DataError(
            f"{source}: holds {' and '.join(sorted(kinds))} ({named}); give those of one kind, by a pattern"
        )
    kind = next(iter(kinds))
    if kind == "files":
        root = path if filesystem.isdir(path) else _common_folder([name for name, _ in found])
        return list(_of_files(filesystem.unstrip_protocol(root), root, found, size))
    if kind == "tar":
        return [
            Shard(index, kind, filesystem.unstrip_protocol(name), digest=_digest([(name, bytes_)]))
            for index, (name, bytes_) in enumerate(found)
        ]
    return list(_of_parquet(filesystem, found, size, columns))


def _file_system(source: str) -> tuple[Any, str]:
    """The file system of `fsspec` and the path in it.

    Raises:
        TurboError: its protocol needs a package that is not installed.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise TurboError(f"{source}: {str(error).splitlines()[0]}") from error
    return filesystem, path


def _files(filesystem: Any, path: str) -> list[tuple[str, int]]:
    """Images, tar and Parquet files with their sizes in bytes, by name."""
    if any(sign in path for sign in "*?["):
        found = filesystem.glob(path, detail=True)
    elif filesystem.exists(path):
        found = filesystem.find(path, detail=True)
    else:
        return []
    return sorted(
        (name, int(info.get("size") or 0))
        for name, info in found.items()
        if info.get("type") == "file" and _kind(name) and not PurePosixPath(name).name.startswith(".")
    )


def _kind(name: str) -> str:
    lowered = name.lower()
    if lowered.endswith(TAR_SUFFIXES):
        return "tar"
    suffix = PurePosixPath(lowered).suffix
    return "parquet" if suffix == ".parquet" else "files" if suffix in IMAGE_SUFFIXES else ""


def _common_folder(names: Sequence[str]) -> str:
    folders = [PurePosixPath(name).parent.parts for name in names]
    shared = next(
        (depth for depth, parts in enumerate(zip(*folders)) if len(set(parts)) > 1), min(len(each) for each in folders)
    )
    return str(PurePosixPath(*folders[0][:shared]))


def _size(images: int, size: int | None) -> int:
    return size if size is not None else min(max(LEAST, images // 1000), MOST)


def _of_files(root: str, path: str, found: Sequence[tuple[str, int]], size: int | None) -> Iterator[Shard]:
    step = _size(len(found), size)
    for index, start in enumerate(range(0, len(found), step)):
        some = found[start : start + step]
        files = tuple(name[len(path) :].lstrip("/") for name, _ in some)
        yield Shard(index, "files", root, files, images=len(some), digest=_digest(some))


def _of_parquet(
    filesystem: Any, found: Sequence[tuple[str, int]], size: int | None, columns: Columns
) -> Iterator[Shard]:
    """Row groups of each file, as many as make a shard; a file whose footer does not read is a shard for itself."""
    import pyarrow
    from pyarrow import parquet

    groups: list[tuple[str, int, list[int] | None]] = []
    for name, bytes_ in found:
        try:
            with filesystem.open(name) as file:
                table = parquet.ParquetFile(file)
                footer = table.metadata
                columns_of(name, table.schema_arrow, columns)
                groups.append((name, bytes_, [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]))
        except (pyarrow.ArrowException, OSError):  # reading it says so in its own row
            groups.append((name, bytes_, None))
    step = _size(sum(sum(rows or ()) for _, _, rows in groups), size)
    index = 0
    for name, bytes_, rows in groups:
        url, start = filesystem.unstrip_protocol(name), 0
        if rows is None:
            yield Shard(index, "parquet", url, digest=_digest([(name, bytes_)]))
            index += 1
            continue
        while start < len(rows):
            stop, held = start + 1, rows[start]
            while stop < len(rows) and held + rows[stop] <= step:
                held += rows[stop]
                stop += 1
            yield Shard(index, "parquet", url, (), start, stop, held, _digest([(name, bytes_)]))
            start, index = stop, index + 1


def _may_be_id(source: str) -> bool:
    return not source.startswith((".", "/", "~")) and source.count("/") <= 1 and not any(s in source for s in "*?[")


def _of_dataset(source: str, size: int | None, columns: Columns) -> Iterator[Shard]:
    """Rows of a dataset of the hub, from its cache or fetched.

    Raises:
        DataError: `datasets` cannot load it, or it has no such column.
    """
    table, split = load_dataset(source, columns.split), columns.split
    columns_of(source, table.features.arrow_schema, columns)
    rows = len(table)
    step = _size(rows, size)
    for index, start in enumerate(range(0, rows, step)):
        stop = min(start + step, rows)
        yield Shard(index, "dataset", source, (split,), start, stop, stop - start, _digest([(split, rows)]))


def _digest(files: Sequence[tuple[str, int]]) -> str:
    return hashlib.sha256("".join(f"{name}\0{size}\n" for name, size in files).encode()).hexdigest()[:16]
