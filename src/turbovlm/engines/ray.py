"""A corpus embedded on Ray Data: tasks read and decode, actors hold the model, this process writes.

A shard is read by one task, which gives its batches one after another; Ray Data hands each to an actor that is free,
and halts the tasks where actors fall behind. Batches are those of the engine in one process, so the rows are the same.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from turbovlm.corpus.embed import Engine
from turbovlm.corpus.embedder import Embedder, Rows
from turbovlm.corpus.job import Job
from turbovlm.corpus.reading import Record, batch_of, read_batches
from turbovlm.corpus.shards import Shard
from turbovlm.corpus.tables import Columns, column_of
from turbovlm.errors import ConfigError, DataError, TurboError
from turbovlm.loading import ModelSpec
from turbovlm.loading.processors import load_preparation

OLDEST = (2, 60)


def on_ray(concurrency: int = 1, cpus_per_actor: int = 1) -> Engine:
    """The engine that runs the model in actors of Ray Data.

    It runs on the cluster that the caller has called `ray.init` for, else on the one that `RAY_ADDRESS` names or that
    `ray start` has started here, else on one that it starts on this machine and stops again. Every node must see the
    source under the same path or URL, have the model's files, and have turbovlm installed; only this process writes.

    Args:
        concurrency: actors, each with the model, on a GPU of its own where the job's device is one.
        cpus_per_actor: cores of each. Those that are left read and decode, one shard each.

    Raises:
        TurboError: Ray is not installed, or an older release; later, that there is no such cluster.
    """
    _check_installed()

    def run(job: Job, shards: Sequence[Shard], columns: Columns) -> Iterator[Rows]:
        gpus = _gpus(job.model.device)
        with _cluster() as nodes:
            check_resources(nodes, concurrency, cpus_per_actor, gpus)
            yield from _run(job, shards, columns, concurrency, cpus_per_actor, gpus)

    return run


def check_resources(nodes: Sequence[Mapping[str, float]], concurrency: int, cpus: int, gpus: int) -> None:
    """Refuse actors that a cluster cannot hold, or that leave no core for reading: Ray would wait without a word.

    Args:
        nodes: what each has: `"CPU"`, `"GPU"`.
        concurrency: actors.
        cpus: cores of an actor, which are of one node.
        gpus: GPUs of an actor.

    Raises:
        ConfigError: naming what is asked for and what there is.
    """
    asked = f"concurrency={concurrency} of {cpus} " + ("core each" if cpus == 1 else "cores each")
    cores, devices = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    has = f"Ray has {cores} cores and {devices} GPUs on {len(nodes)} " + ("node" if len(nodes) == 1 else "nodes")
    if concurrency * gpus > devices:
        raise ConfigError(f"{asked} and a GPU: {has}; at most concurrency={devices}")
    fitting = sum(_fitting(node, cpus, gpus) for node in nodes)
    most = max(min(fitting, (cores - 1) // cpus), 0)
    if concurrency > most:
        remedy = f"at most concurrency={most}" if most else "take fewer cores for each, or start Ray with more"
        raise ConfigError(f"{asked}: {has}, of which reading takes one or more; {remedy}")


def _fitting(node: Mapping[str, float], cpus: int, gpus: int) -> int:
    by_cores = int(node.get("CPU", 0) // cpus)
    return min(by_cores, int(node.get("GPU", 0) // gpus)) if gpus else by_cores


def _check_installed() -> None:
    """Refuse releases of Ray that this was not tried with."""
    try:
        found = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise TurboError("the engine ray needs Ray Data: pip install 'turbovlm[ray]'") from None
    major, minor = (int(part) for part in found.split(".")[:2])
    if not OLDEST <= (major, minor) < (3, 0):
        oldest = ".".join(map(str, OLDEST))
        raise TurboError(f"ray {found} is installed; the engine ray takes {oldest} to 2.x: pip install 'turbovlm[ray]'")


def _gpus(device: str) -> int:
    """GPUs of an actor. Each sees its own alone.

    Raises:
        ConfigError: the device is one that Ray does not deal out.
    """
    if device in ("cpu", "cuda"):
        return int(device == "cuda")
    raise ConfigError(f"device={device!r}: Ray gives each actor the next GPU that is free; cpu or cuda")


@contextlib.contextmanager
def _cluster() -> Iterator[list[dict[str, float]]]:
    """What the nodes of a cluster have; what was not started before is quiet, and stops at the end."""
    import ray.data

    own = not ray.is_initialized()
    if own:
        try:
            ray.init(log_to_driver=False, logging_level="ERROR")  # warnings of the start are of every start
        except ConnectionError as error:
            address = os.environ.get("RAY_ADDRESS", "unset")
            raise TurboError(f"RAY_ADDRESS={address}: {error}; unset it to run on this machine") from error
        logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        with _quiet() if own else contextlib.nullcontext():
            yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if own:
            ray.shutdown()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let Ray Data say on the terminal what is a warning or worse; its log file has the rest. It must be imported."""

    def matters(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and not str(record.msg).startswith("Progress bars")

    shown = [each for each in logging.getLogger("ray.data").handlers if isinstance(each, logging.StreamHandler)]
    for handler in shown:
        handler.addFilter(matters)
    try:
        yield
    finally:
        for handler in shown:
            handler.removeFilter(matters)


def _run(job: Job, shards: Sequence[Shard], columns: Columns, concurrency: int, cpus: int, gpus: int) -> Iterator[Rows]:
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False  # there is a bar for all of it
    context.target_max_block_size = 1  # byte: each batch is a block, or a shard is one, which one actor then has alone
    with ray.data.DataContext.current(context):
        tasks = ray.data.from_items([{"shard": pickle.dumps(each)} for each in shards], override_num_blocks=len(shards))
    batches = tasks.map_batches(
        _Reader(job, columns),
        batch_size=1,
        ray_remote_args_fn=lambda: {"num_cpus": 1},  # with it, Ray Data leaves reading out of the actors
    )
    found = batches.map_batches(
        _Actor,
        fn_constructor_kwargs={"job": job, "threads": cpus},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    for row in found.iter_rows():
        rows = pickle.loads(row["rows"])
        if isinstance(rows, TurboError):
            raise rows
        yield rows


class _Reader:
    """Reads a shard, batch after batch. A task of Ray's."""

    def __init__(self, job: Job, columns: Columns) -> None:
        self.job, self.columns = job, columns
        self.__name__ = "read"

    def __call__(self, row: dict[str, np.ndarray[Any, Any]]) -> Iterator[dict[str, list[bytes]]]:
        generates = "caption" in self.job.outputs
        try:
            prepare = load_preparation(self.job.model, self.job.prompt, generates=generates)
            for batch in read_batches(pickle.loads(row["shard"][0]), self.job.batch, prepare, self.columns):
                yield {"batch": [_packed(batch)]}
        except TurboError as error:
            yield {"batch": [_packed(error)]}


class _Actor:
    """Holds a model, and embeds batch after batch.

    An error of ours travels as a result: one that is raised in a constructor arrives as text alone, and Ray Data prints
    traces of others.
    """

    def __init__(self, job: Job, threads: int) -> None:
        if job.model.device == "cpu":
            torch.set_num_threads(threads)
        self.embedder: Embedder | TurboError
        try:
            self.embedder = Embedder(job)
        except TurboError as error:
            self.embedder = error

    def __call__(self, row: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[bytes]]:
        batch = pickle.loads(row["batch"][0])
        if isinstance(self.embedder, TurboError):
            return {"rows": [_packed(self.embedder)]}
        try:
            return {"rows": [_packed(batch if isinstance(batch, TurboError) else self.embedder(batch))]}
        except TurboError as error:
            return {"rows": [_packed(error)]}


class ImageEmbedder:
    """What `turbovlm embed` makes of images, for a Ray Data pipeline of your own.

        images.map_batches(
            ImageEmbedder,
            fn_constructor_kwargs={"model": "openai/clip-vit-base-patch16", "r": 8},
            batch_size=32,
            compute=ray.data.ActorPoolStrategy(size=2),
        )

    It adds the outputs to a batch, and the column `error`, which says why an image has none. Images are decoded and
    prepared in the actor too.

    Args:
        model: a hub id, a folder, timm:NAME …
        outputs: see `Job`.
        labels: see `Job`.
        prompt: see `Job`.
        max_new_tokens: see `Job`.
        image: the column of images: files' bytes, or pixels in uint8, `[height, width, 3]`, as `ray.data.read_images`
            gives them.
        device: CUDA if None where the actor has a GPU.
        dtype: of the model.
        settings: keywords of `turbovlm.apply`; none leaves the model as it is.

    Raises:
        TurboError: the model cannot be loaded.
        ConfigError: it has not such an output, or a setting is wrong.
        UnsupportedModelError: nothing in it can be accelerated.
    """

    def __init__(
        self,
        model: str,
        *,
        outputs: Sequence[str] = (),
        labels: Sequence[str] = (),
        prompt: str | None = None,
        max_new_tokens: int = 32,
        image: str = "image",
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        spec = ModelSpec(model, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
        self.image = image
        self.embedder = Embedder(
            Job(spec, tuple(outputs), settings, labels=tuple(labels), prompt=prompt, max_new_tokens=max_new_tokens)
        )
        self.prepare = load_preparation(spec, prompt, generates="caption" in outputs)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed a batch of columns.

        Raises:
            DataError: it has no such column, or none of images.
        """
        if self.image not in batch:
            raise DataError(f"image={self.image!r}: there is no such column; there are {', '.join(batch)}")
        made = self.embedder(batch_of([self._record(value) for value in batch[self.image]], self.prepare))
        return {
            **batch,
            **{name: column_of(name, values) for name, values in made.columns.items()},
            "error": column_of("error", made.errors),
        }

    def _record(self, value: Any) -> Record:
        if value is None:
            return Record("", None, "cannot be read: the row is empty")
        if isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim > 1):
            return Record("", value)
        kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"column {self.image!r}: must hold files' bytes or pixels in uint8, has {kind}")


def _packed(value: object) -> bytes:
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
