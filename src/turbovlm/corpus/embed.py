"""A corpus embedded: shard after shard into a folder, by one process or on an engine."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turbovlm import __version__
from turbovlm.corpus import folder as folders
from turbovlm.corpus.embedder import Embedder, Rows, check
from turbovlm.corpus.folder import Counts
from turbovlm.corpus.job import Job
from turbovlm.corpus.reading import Batch, read_batches
from turbovlm.corpus.shards import Shard, find_shards
from turbovlm.corpus.tables import Columns, column_of
from turbovlm.errors import DataError, TurboError
from turbovlm.loading.processors import load_preparation

if TYPE_CHECKING:
    import pyarrow

Engine = Callable[[Job, Sequence[Shard], Columns], Iterable[Rows]]
"""Gives the rows of every batch of these shards, in any order, each once."""
NEEDED = ("pyarrow", "PIL", "fsspec", "filelock")
AHEAD = 4
"""Batches that each reading process may have ready."""


@dataclass(frozen=True)
class Summary:
    """What a run has done.

    Attributes:
        folder: where the parts are.
        shards: of the source.
        found: of these, how many an earlier run had done.
        counts: images of all parts.
        made: images of this run.
        seconds: of this run, loading included.
    """

    folder: Path
    shards: int
    found: int
    counts: Counts
    made: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        parts = "1 part" if self.shards == 1 else f"{self.shards} parts"
        before = f", {self.found} of them by a run before" if self.found else ""
        lines = [f"{self.counts.images:,} images in {parts} in {self.folder}{before}"]
        if self.made:
            lines.append(f"{self.made:,} images in {self.seconds:.1f} s: {self.made / self.seconds:.1f} images/s")
        if self.counts.errors:
            lines.append(f"{self.counts.errors:,} could not be read; the column error says why, such as")
            lines += [f"  {example}" for example in self.counts.examples]
        return "\n".join(lines)


def embed(
    source: str | Path,
    out: str | Path,
    job: Job,
    *,
    shard_size: int | None = None,
    columns: Columns = Columns(),  # noqa: B008
    engine: Engine | None = None,
    progress: Callable[[int | None, int], object] | None = None,
) -> Summary:
    """Write a row for each image of a source: its name, width and height, the job's outputs, and an error or none.

    The rows of a shard stand in the source's order in one Parquet file. Where `out` holds an unfinished run of the same
    source and job, it goes on.

    Args:
        source: see `find_shards`.
        out: a folder, new or of an unfinished run.
        job: what is to become of each image.
        shard_size: images of a part.
        columns: where tables have their images.
        engine: what runs the model; `local()` if None.
        progress: is called with the number of images in all, None where only reading tells, and of those that are done.

    Raises:
        ConfigError: a setting is wrong, or the model has not such an output.
        DataError: no images are found, or `out` is of another run; the message says what differs.
        StateError: another process writes to `out`.
        UnsupportedModelError: nothing in the model can be accelerated.
        OSError: the disk is full; parts that are done stay, and the same call goes on.
    """
    begun = time.perf_counter()
    _check_installed()
    shards = find_shards(str(source), shard_size, columns)
    if not shards:
        raise DataError(f"{source}: holds no images")
    out = Path(out).expanduser()
    run = {"source": str(source), **job.described(), "columns": vars(columns)}
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise DataError(
            f"{out}: lies in the source {source}, which would hold its parts the next time; give another folder"
        )
    folders.check_folder(out, run, shards)
    check(job)
    total = sum(shard.images or 0 for shard in shards) if all(shard.images is not None for shard in shards) else None
    with folders.opened(out, run, shards, _versions()):
        before = [shard for shard in shards if folders.is_done(out, shard)]
        counts = sum((folders.counts_of(out, shard) for shard in before), Counts())
        done = found = counts.images
        if progress is not None:
            progress(total, done)
        left = [shard for shard in shards if not folders.is_done(out, shard)]
        for shard, rows in _collected((engine or local())(job, left, columns) if left else (), left):
            if isinstance(rows, int):
                done += rows
                if progress is not None:
                    progress(total, done)
            else:
                counts += folders.write_part(out, shard, _table(rows))
    if counts.images == counts.errors:
        raise DataError(f"{source}: none of {counts.images} images could be read, such as {counts.examples[0]}")
    return Summary(out, len(shards), len(before), counts, counts.images - found, time.perf_counter() - begun)


def local(workers: int | None = None) -> Engine:
    """The engine that runs the model in this process.

    Args:
        workers: processes that read and decode; 0 for this process alone. If None, none beside a model on the CPU, and
            up to 8 beside one on another device.
    """

    def run(job: Job, shards: Sequence[Shard], columns: Columns) -> Iterator[Rows]:
        embedder = Embedder(job)
        cores = torch.get_num_threads()
        count = workers if workers is not None else 0 if job.model.device == "cpu" else min(8, cores)
        for batch in _batches(job, shards, columns, min(count, len(shards))):
            yield embedder(batch)

    return run


class _Reading(torch.utils.data.IterableDataset[Batch]):
    """Shards read one after another, dealt out to the processes of a loader."""

    def __init__(self, job: Job, shards: Sequence[Shard], columns: Columns) -> None:
        self.job, self.shards, self.columns = job, shards, columns

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        prepare = load_preparation(self.job.model, self.job.prompt, generates="caption" in self.job.outputs)
        for shard in self.shards[first::step]:
            yield from read_batches(shard, self.job.batch, prepare, self.columns)


def _batches(job: Job, shards: Sequence[Shard], columns: Columns, workers: int) -> Iterable[Batch]:
    reading, ahead = _Reading(job, shards, columns), AHEAD if workers else None
    begin = functools.partial(_end_with, os.getpid())
    return torch.utils.data.DataLoader(
        reading, batch_size=None, num_workers=workers, prefetch_factor=ahead, worker_init_fn=begin
    )


def _end_with(parent: int, _: int) -> None:
    """End this process when its parent has ended: where that was killed, a loader's process would wait for ever, and
    hold the folder's lock, which it has inherited."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _collected(found: Iterable[Rows], shards: Sequence[Shard]) -> Iterator[tuple[Shard, int | list[Rows]]]:
    """Count the rows of each batch, and give a shard's batches, in order, as soon as all are there.

    Raises:
        TurboError: a batch came twice, or some never came.
    """
    by_index = {shard.index: shard for shard in shards}
    waiting: dict[int, dict[int, Rows]] = {}
    for rows in found:
        shard = by_index.get(rows.shard)
        held = waiting.setdefault(rows.shard, {})
        if shard is None or rows.number in held:
            raise TurboError(f"batch {rows.number} of shard {rows.shard} came twice")
        held[rows.number] = rows
        yield shard, len(rows.names)
        last = next((number for number, each in held.items() if each.last), None)
        if last is not None and len(held) == last + 1:
            yield shard, [held[number] for number in range(last + 1)]
            del waiting[rows.shard], by_index[rows.shard]
    if by_index:
        raise TurboError(
            f"{len(by_index)} of {len(shards)} shards were not embedded whole; start again, and it goes on"
        )


def _table(batches: Sequence[Rows]) -> pyarrow.Table:
    """The rows of a shard."""
    import pyarrow

    def joined(values: Callable[[Rows], Iterable[Any]]) -> list[Any]:
        return [value for rows in batches for value in values(rows)]

    sizes: list[Any] = joined(lambda rows: rows.sizes)
    columns: dict[str, Any] = {
        "name": pyarrow.array(joined(lambda rows: rows.names), pyarrow.string()),
        "width": pyarrow.array([size and size[0] for size in sizes], pyarrow.int32()),
        "height": pyarrow.array([size and size[1] for size in sizes], pyarrow.int32()),
    }
    for name in batches[0].columns:
        values = joined(lambda rows, name=name: rows.columns[name])  # type: ignore[misc]
        columns[name] = column_of(name, values)
    columns["error"] = pyarrow.array(joined(lambda rows: rows.errors), pyarrow.string())
    return pyarrow.table(columns)


def _check_installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise TurboError(f"embedding a corpus needs {', '.join(missing)}: pip install 'turbovlm[embed]'")


def _versions() -> Mapping[str, str]:
    found = {"turbovlm": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("transformers", "timm", "pillow", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
