"""Images/s of a corpus embedded by a plain loop, by the engine in one process, and on Ray Data with 1, 2 and 4 actors.

    python benchmarks/corpus_actors.py    # where ray is installed; writes benchmarks/results/corpus_actors.{json,md}

A CLIP ViT-B/32 vision tower, random weights, `r=4`, batches of 16, one thread for each process that holds the model.
Images are JPEGs of coloured fields and noise, 320×240. The plain loop opens files, calls the processor on a batch of
them and the model on what it gives, and keeps a list. The engines read shards of 256 images and write Parquet as well.
The more actors, the more images in proportion. Ray is told of a core for each actor and one for reading, whatever the
machine has, so that all start. Rounds interleave. Two loops at once show what two cores give.

What is counted begins when each process with a model has given a batch (before are imports, weights, processes), and
ends ten batches before the last: Ray reads ahead what its object store holds (160 MB, of which Ray Data takes half:
eight batches), and would else be counted without reading.

A forward's time differs by more from run to run than an engine costs, so forwards are timed apart: the cost of an
engine is CPU time per image of all processes (this one, Ray's own, those that read, those that hold the model) that no
forward takes, beyond what the loop needs beside its forwards.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from cases import RESULTS, described, machine, save
from PIL import Image

import turbovlm
from turbovlm.corpus import Job, embed
from turbovlm.corpus.embed import Engine, local
from turbovlm.corpus.embedder import Embedder, Rows
from turbovlm.corpus.shards import Shard
from turbovlm.corpus.tables import Columns
from turbovlm.engines import ray as rays
from turbovlm.engines.ray import on_ray
from turbovlm.loading import ModelSpec

BATCH, SHARD, R = 16, 256, 4
ACTORS = (1, 2, 4)
STORE, TAIL = 160_000_000, 10
SPENT = "spent"
GOAL = 0.10
MARK = "TURBOVLM_BENCHMARK"
TICKS = os.sysconf("SC_CLK_TCK")


class Forwards:
    """CPU seconds of a process since it was asked before: in forwards of the vision encoder, and beside them."""

    def __init__(self, encoder: Any) -> None:
        self.inside = self.begun = 0.0
        self.asked = time.process_time()
        encoder.vision_model.register_forward_pre_hook(self._begin)
        encoder.vision_model.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self.begun = time.thread_time()

    def _end(self, *_: Any) -> None:
        self.inside += time.thread_time() - self.begun

    def spent(self) -> tuple[float, float]:
        now, inside = time.process_time(), self.inside
        beside, self.asked, self.inside = now - self.asked - inside, now, 0.0
        return inside, beside


class Timed(rays._Actor):
    """An actor whose rows say what it spent since the batch before."""

    def __init__(self, job: Job, threads: int) -> None:
        super().__init__(job, threads)
        assert isinstance(self.embedder, Embedder)
        self.forwards = Forwards(self.embedder.model)

    def __call__(self, row: dict[str, Any]) -> dict[str, list[bytes]]:
        rows: Rows = pickle.loads(super().__call__(row)["rows"][0])
        rows.columns[SPENT] = [self.forwards.spent()]
        return {"rows": [pickle.dumps(rows)]}


class Clock:
    """Seconds of the batches behind the first `warm`, of which `counted` are counted."""

    def __init__(self, warm: int, counted: int) -> None:
        self.warm, self.counted, self.begun = warm, counted, time.perf_counter()
        self.spent: list[tuple[float, float]] = []
        self.at: list[tuple[float, dict[tuple[str, str], float]]] = []

    def batch(self, spent: tuple[float, float]) -> None:
        """Note that a batch is there, and what its process spent."""
        self.spent.append(spent)
        if len(self.spent) in (self.warm, self.warm + self.counted):
            self.at.append((time.perf_counter(), cpu_seconds()))

    def found(self) -> dict[str, float]:
        (begun, before), (ended, after) = self.at
        counted = self.spent[self.warm : self.warm + self.counted]
        found = {"images": self.counted * BATCH, "wall": ended - begun, "start_up": begun - self.begun}
        found |= {"forward": sum(each[0] for each in counted), "beside": sum(each[1] for each in counted)}
        for kind in ("reading", "engine"):
            own = {name: seconds for (name, other), seconds in after.items() if other == kind}
            found[kind] = sum(seconds - value_of(before, name) for name, seconds in own.items())
        return found


def value_of(seconds: dict[tuple[str, str], float], name: str) -> float:
    return next((value for (other, _), value in seconds.items() if other == name), 0.0)


def cpu_seconds() -> dict[tuple[str, str], float]:
    """CPU seconds of this process and those that come from it, by process and kind."""
    mark, found = f"{MARK}={os.environ[MARK]}".encode(), {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.name == str(os.getpid()) or mark in (path / "environ").read_bytes():
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                found[path.name, kind_of(path)] = (int(fields[11]) + int(fields[12])) / TICKS
        except OSError:  # it has ended, or is another user's
            continue
    return found


def kind_of(process: Path) -> str:
    """What a process does: hold the model, read, or run the engine. This one is of the last kind, alone or not."""
    command = (process / "cmdline").read_bytes()
    if command.startswith(b"ray::MapWorker"):
        return "model"
    if command.startswith((b"ray::MapBatches", b"ray::IDLE")):  # which is what tasks' processes are between tasks
        return "reading"
    return "engine"


def plain(model: str, folder: Path, counted: int) -> dict[str, float]:
    """The loop that one writes without an engine."""
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    clock = Clock(1, counted)
    encoder = CLIPVisionModelWithProjection.from_pretrained(model).eval()
    processor: Any = AutoImageProcessor.from_pretrained(model)
    turbovlm.apply(encoder, r=R)
    forwards, found = Forwards(encoder), []
    files = sorted(folder.iterdir())[: BATCH * (counted + 1)]
    with torch.inference_mode():
        for start in range(0, len(files), BATCH):
            images = [Image.open(path).convert("RGB") for path in files[start : start + BATCH]]
            outputs: Any = encoder(**processor(images=images, return_tensors="pt"))
            found.append(outputs.image_embeds.numpy())
            clock.batch(forwards.spent())
    return clock.found() | {"engine": 0.0}  # all of it is this process, which is counted already


def loops(count: int, model: str, folder: Path, counted: int) -> dict[str, float]:
    """Plain loops, each in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--loop", model, str(folder), "--batches", str(counted)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(count)
    ]
    found = [json.loads(each.communicate()[0]) for each in started]
    summed = {name: sum(each[name] for each in found) for name in ("images", "forward", "beside", "reading", "engine")}
    return {**summed, **{name: max(each[name] for each in found) for name in ("wall", "start_up")}}


def by(engine: Engine, model: str, folder: Path, counted: int, actors: int = 1) -> dict[str, float]:
    """A corpus embedded by an engine."""
    clock = Clock(actors, counted)

    def clocked(*asked: Any) -> Iterator[Rows]:
        for rows in engine(*asked):
            clock.batch(rows.columns.pop(SPENT)[0])
            yield rows

    out = Path(tempfile.mkdtemp())
    try:
        job = Job(ModelSpec(model), ("pooled",), {"r": R}, BATCH)
        embed(folder, out / "embeddings", job, shard_size=SHARD, engine=clocked)
    finally:
        shutil.rmtree(out)
    return clock.found()


def timed_local(job: Job, shards: Sequence[Shard], columns: Columns) -> Iterator[Rows]:
    """The engine in one process, whose rows say what it spent since the batch before."""
    made: list[Forwards] = []

    class Timed(Embedder):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            made.append(Forwards(self.model))

    with mock.patch.object(importlib.import_module("turbovlm.corpus.embed"), "Embedder", Timed):
        for rows in local(0)(job, shards, columns):
            rows.columns[SPENT] = [made[0].spent()]
            yield rows


def on_actors(actors: int, model: str, folder: Path, counted: int) -> dict[str, float]:
    """On Ray with a core for each actor and one for reading, whether the machine has them or not."""
    import ray

    ray.init(
        "local",
        num_cpus=actors + 1,
        object_store_memory=STORE,
        log_to_driver=False,
        logging_level="ERROR",
        include_dashboard=False,
    )
    try:
        with mock.patch.object(rays, "_Actor", Timed):
            return by(on_ray(actors), model, folder, counted, actors)
    finally:
        ray.shutdown()


def drawn(folder: Path, count: int) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        fields = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((320, 240))
        noise = generator.integers(-8, 8, (240, 320, 3))
        pixels = np.clip(np.asarray(fields) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=85)
    return folder


def save_model(folder: Path, **config: int) -> str:
    """A CLIP vision tower with random weights and its processor; ViT-B/32 where nothing else is said."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    made = CLIPVisionConfig(**config)
    CLIPVisionModelWithProjection(made).save_pretrained(folder)
    side = made.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8, help="of each process with a model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ[MARK] = uuid.uuid4().hex
    if args.loop:
        print(json.dumps(plain(args.loop[0], Path(args.loop[1]), args.batches)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        model = save_model(Path(name) / "model")
        counted = {count: count * args.batches for count in ACTORS}
        folders = {count: drawn(Path(name) / str(count), (counted[count] + count + TAIL) * BATCH) for count in ACTORS}
        versions: dict[str, Callable[[], dict[str, float]]] = {
            "a plain loop": lambda: loops(1, model, folders[1], counted[1]),
            "two loops at once": lambda: loops(2, model, folders[1], counted[1]),
            "one process": lambda: by(timed_local, model, folders[1], counted[1]) | {"engine": 0.0},
        }
        for count in ACTORS:
            what = f"Ray, {count} actor" + ("s" if count > 1 else "")
            versions[what] = lambda n=count: on_actors(n, model, folders[n], counted[n])  # type: ignore[misc]
        runs: dict[str, list[dict[str, float]]] = {version: [] for version in versions}
        for _ in range(args.rounds):
            for version, run in versions.items():
                runs[version].append(run())
                print(version, {key: round(value, 2) for key, value in runs[version][-1].items()}, flush=True)
    results = {"machine": {**machine(), "ray": importlib.metadata.version("ray"), "load_before": load}, "runs": runs}
    save(RESULTS / "corpus_actors.json", results)
    (RESULTS / "corpus_actors.md").write_text(report(results))
    print(report(results))


def report(results: dict[str, Any]) -> str:
    runs = results["runs"]
    lines = [
        "# A corpus embedded: loops, one process, actors of Ray Data",
        "",
        "CLIP ViT-B/32, random weights, `r=4`, batches of 16, one thread for each model. Medians; in brackets the",
        "least and the most. Start-up is not in images/s. CPU time per image: of forwards, and of all processes beside",
        "them, reading among it. *Overhead* is the latter beyond the plain loop's, as a share of all that the loop",
        f"takes; the goal is at most {GOAL:.0%}.",
        "",
        described(results["machine"]),
        "",
        "| | images | images/s | forwards, ms | beside them, ms | of it Ray itself | overhead | start-up, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    loop = beside(runs["a plain loop"])
    whole = statistics.median(loop) + statistics.median(forwards(runs["a plain loop"]))
    for version, each in runs.items():
        speeds, rest = [run["images"] / run["wall"] for run in each], beside(each)
        over = [(mine - statistics.median(loop)) / whole for mine in rest]
        shown = own = ""
        if "loop" not in version:
            shown = f"**{statistics.median(over):+.1%}** ({min(over):+.1%} … {max(over):+.1%})"
        if version.startswith("Ray"):
            own = f"{statistics.median(1000 * run['engine'] / run['images'] for run in each):.1f}"
        lines.append(
            f"| {version} | {each[0]['images']:.0f} | {statistics.median(speeds):.1f} ({min(speeds):.1f} … "
            f"{max(speeds):.1f}) | {statistics.median(forwards(each)):.1f} | {statistics.median(rest):.1f} | {own} "
            f"| {shown} | {statistics.median(run['start_up'] for run in each):.1f} |"
        )
    lines += [
        "",
        "Actors beyond the cores that the machine has share them. *Ray itself* is CPU time of this process, which",
        "collects and writes, and of Ray's that neither read nor hold the model: so much a second, however fast the",
        "model is, and on another core where there is one.",
        "",
    ]
    return "\n".join(lines)


def forwards(runs: list[dict[str, float]]) -> list[float]:
    """CPU milliseconds per image."""
    return [1000 * run["forward"] / run["images"] for run in runs]


def beside(runs: list[dict[str, float]]) -> list[float]:
    """CPU milliseconds per image that no forward takes."""
    return [1000 * sum(run[kind] for kind in ("beside", "reading", "engine")) / run["images"] for run in runs]


if __name__ == "__main__":
    main()
