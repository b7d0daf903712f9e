"""The folder that a run writes to: what the run is, and a Parquet file for each shard that is done.

A part is written under another name, flushed to the disk, and renamed: it is there whole or not at all, so the parts
that are there are the list of what is done.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbovlm.corpus.shards import Shard
from turbovlm.errors import DataError, StateError

if TYPE_CHECKING:
    import pyarrow

MANIFEST, LOCK, UNFINISHED = "_run.json", ".lock", "_unfinished-"  # readers of a folder of Parquet pass over these
FORMAT = 1
PATIENCE = 3.0
"""Seconds until a lock counts as another run's: processes that read end a moment after the run that was killed."""


@dataclass(frozen=True)
class Counts:
    """Images of parts.

    Attributes:
        images: rows.
        errors: rows without a result.
        examples: names and reasons of the first of these.
    """

    images: int = 0
    errors: int = 0
    examples: tuple[str, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        examples = (self.examples + other.examples)[:5]
        return Counts(self.images + other.images, self.errors + other.errors, examples)


def check_folder(folder: Path, run: Mapping[str, Any], shards: Sequence[Shard]) -> None:
    """Refuse a folder that holds something else than this run, before anything is loaded.

    Args:
        folder: to write to; need not exist.
        run: the job, as JSON takes it.
        shards: of the source.

    Raises:
        DataError: it is a file, holds other files, or another run; the message says what differs.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file; give a folder")
    manifest = folder / MANIFEST
    if not manifest.exists():
        others = sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, UNFINISHED + MANIFEST))
        if others:
            raise DataError(f"{folder}: holds {others[0]} and is not the folder of a run; give a new or an empty one")
        return
    try:
        there = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{manifest}: does not read ({error}); give another folder") from error
    ours = _manifest(run, shards)
    differing = _differences(there, ours)
    if differing:
        raise DataError(
            f"{folder}: is of another run: {'; '.join(differing)}. Give another folder, or what that run was given"
        )


def _manifest(run: Mapping[str, Any], shards: Sequence[Shard]) -> dict[str, Any]:
    held = [{"part": shard.part, "of": _of(shard), "images": shard.images, "digest": shard.digest} for shard in shards]
    manifest: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **run, "shards": held}))  # as it is read again
    return manifest


def _of(shard: Shard) -> str:
    if shard.files and shard.kind == "files":
        return f"{shard.files[0]} … {shard.files[-1]}" if len(shard.files) > 1 else shard.files[0]
    rows = f"[{shard.start}:{shard.stop}]" if shard.stop else ""
    return shard.source.rpartition("/")[2] + rows


def _differences(there: Any, ours: Mapping[str, Any]) -> list[str]:
    """What differs, each in a few words; versions of libraries may."""
    if not isinstance(there, dict) or there.get("format") != FORMAT:
        return [f"{MANIFEST} is of another format"]
    found = []
    for name in [*ours, *(name for name in there if name not in ours)]:
        if name in ("shards", "versions"):
            continue
        if there.get(name) != ours.get(name):
            found.append(f"{name} is {_short(there.get(name))} there and {_short(ours.get(name))} here")
    theirs, own = there.get("shards", []), ours["shards"]
    if theirs != own:
        changed = next((mine["of"] for other, mine in zip(theirs, own) if other != mine), None)
        what = f"{len(theirs)} shards there and {len(own)} here" if len(theirs) != len(own) else "files have changed"
        found.append(f"the source differs: {what}" + (f", first at {changed}" if changed else ""))
    return found


def _short(value: Any) -> str:
    said = json.dumps(value, ensure_ascii=False)
    return said if len(said) <= 60 else said[:57] + "…"


@contextlib.contextmanager
def opened(
    folder: Path, run: Mapping[str, Any], shards: Sequence[Shard], versions: Mapping[str, str]
) -> Iterator[None]:
    """Hold the folder for one run; it is made, and what an earlier run left unfinished is removed.

    Raises:
        DataError: as `check_folder`.
        StateError: another process writes to it.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except filelock.Timeout:
        raise StateError(f"{folder}: another run is writing to it; wait for its end, or give another folder") from None
    try:
        check_folder(folder, run, shards)
        for left in folder.glob(f"{UNFINISHED}*"):
            left.unlink()
        if not (folder / MANIFEST).exists():
            content = {**_manifest(run, shards), "versions": dict(versions)}
            with _whole(folder / MANIFEST) as path:
                path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give another name to write to, and make it this file once it is on the disk; remove it where that fails."""
    other = path.with_name(UNFINISHED + path.name)
    try:
        yield other
        with other.open("rb") as file:
            os.fsync(file.fileno())
        other.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # else a power cut can undo the renaming
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno is None:
            raise
        said = f"{os.strerror(error.errno)}; parts that are done stay, and the same call goes on once this is cured"
        raise OSError(error.errno, said, str(path)) from error
    finally:
        other.unlink(missing_ok=True)


def is_done(folder: Path, shard: Shard) -> bool:
    """Whether a shard's part is there."""
    return (folder / shard.part).exists()


def write_part(folder: Path, shard: Shard, table: pyarrow.Table) -> Counts:
    """Write a shard's rows, whole or not at all.

    Raises:
        OSError: the disk is full, or may not be written.
    """
    from pyarrow import parquet

    wrong = [(name, error) for name, error in zip(table["name"].to_pylist(), table["error"].to_pylist()) if error]
    counts = Counts(len(table), len(wrong), tuple(f"{name}: {error}" for name, error in wrong[:5]))
    said = json.dumps({"images": counts.images, "errors": counts.errors, "examples": counts.examples})
    with _whole(folder / shard.part) as path:
        parquet.write_table(table.replace_schema_metadata({"turbovlm": said}), path, compression="zstd")
    return counts


def counts_of(folder: Path, shard: Shard) -> Counts:
    """What a part that is done holds.

    Raises:
        DataError: it does not read.
    """
    import pyarrow
    from pyarrow import parquet

    path = folder / shard.part
    try:
        said = json.loads(parquet.read_schema(path).metadata[b"turbovlm"])
    except (pyarrow.ArrowException, OSError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: is no part of a run ({error}); remove it, and it is made again") from error
    return Counts(said["images"], said["errors"], tuple(said["examples"]))
