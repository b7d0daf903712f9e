"""A corpus embedded on Ray Data: tasks read and decode, actors hold the model, this process writes.

A shard is read by one task, which gives its batches one after another; Ray Data hands each to an actor that is free, and
halts the tasks where actors fall behind. Batches are those of the engine in one process, so the rows are the same.
"""

from __future__ import annotations

import importlib.metadata
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from turbovlm.corpus.embed import Engine
from turbovlm.corpus.embedder import Embedder, Rows
from turbovlm.corpus.job import Job
from turbovlm.corpus.reading import read_batches
from turbovlm.corpus.shards import Shard
from turbovlm.corpus.tables import Columns
from turbovlm.errors import ConfigError, TurboError
from turbovlm.loading.processors import load_preparation

OLDEST = (2, 60)


def _check_installed() -> None:
    """Refuse releases of Ray that this was not tried with."""
    try:
        found = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise TurboError("the engine ray needs Ray Data: pip install 'turbovlm[ray]'") from None
    major, minor = (int(part) for part in found.split(".")[:2])
    if not OLDEST <= (major, minor) < (3, 0):
        raise TurboError(f"ray {found} is installed; the engine ray was tried with {'.'.join(map(str, OLDEST))} and on")


def on_ray(concurrency: int = 1, cpus_per_actor: int = 1) -> Engine:
    """The engine that runs the model in actors of Ray Data.

    Args:
        concurrency: actors, each with the model, on a GPU of its own where the job's device is one.
        cpus_per_actor: cores of each.

    Raises:
        TurboError: Ray is not installed, or an older release.
    """
    _check_installed()

    def run(job: Job, shards: Sequence[Shard], columns: Columns) -> Iterator[Rows]:
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        gpus = 0 if job.model.device == "cpu" else 1
        check_resources(concurrency, cpus_per_actor, gpus, ray.cluster_resources())
        yield from _run(job, shards, columns, concurrency, cpus_per_actor, gpus)

    return run


def check_resources(concurrency: int, cpus: int, gpus: int, has: dict[str, float]) -> None:
    """Refuse actors that a cluster cannot hold, or that leave no core for reading: Ray would wait without a word.

    Raises:
        ConfigError: naming what is asked for and what there is.
    """
    if concurrency * gpus > has.get("GPU", 0):
        raise ConfigError(f"concurrency={concurrency}: takes {concurrency} GPUs, Ray has {has.get('GPU', 0):g}")
    cores = has.get("CPU", 0)
    if concurrency * cpus >= cores:
        most = max(int((cores - 1) // cpus), 0)
        raise ConfigError(
            f"concurrency={concurrency}: takes {concurrency * cpus} of the {cores:g} cores that Ray has, which leaves none "
            f"for reading; at most {most} with {cpus} each"
        )


def _run(job: Job, shards: Sequence[Shard], columns: Columns, concurrency: int, cpus: int, gpus: int) -> Iterator[Rows]:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # there is one for all of it
    read = _Reader(job, columns)
    tasks = ray.data.from_items([{"shard": pickle.dumps(shard)} for shard in shards], override_num_blocks=len(shards))
    batches = tasks.map_batches(read, batch_size=1, num_cpus=1)
    found = batches.map_batches(
        _Actor,
        fn_constructor_kwargs={"job": job, "threads": cpus},
        batch_size=1,
        concurrency=concurrency,
        num_cpus=cpus,
        num_gpus=gpus,
    )
    for row in found.iter_rows():
        yield pickle.loads(row["rows"])


class _Reader:
    """Reads a shard, batch after batch. A task of Ray's."""

    def __init__(self, job: Job, columns: Columns) -> None:
        self.job, self.columns = job, columns
        self.__name__ = "read"

    def __call__(self, row: dict[str, np.ndarray[Any, Any]]) -> Iterator[dict[str, list[bytes]]]:
        generates = "caption" in self.job.outputs
        prepare = load_preparation(self.job.model, self.job.prompt, generates=generates)
        for batch in read_batches(pickle.loads(row["shard"][0]), self.job.batch, prepare, self.columns):
            yield {"batch": [pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)]}


class _Actor:
    """Holds a model, and embeds batch after batch."""

    def __init__(self, job: Job, threads: int) -> None:
        import torch

        if job.model.device == "cpu":
            torch.set_num_threads(threads)
        self.embedder = Embedder(job)

    def __call__(self, row: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[bytes]]:
        rows = self.embedder(pickle.loads(row["batch"][0]))
        return {"rows": [pickle.dumps(rows, pickle.HIGHEST_PROTOCOL)]}
