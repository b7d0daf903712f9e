"""Images/s of a corpus embedded by a plain loop, by the engine in one process, and on Ray Data with 1, 2 and 4 actors.

    python benchmarks/corpus_actors.py    # where ray is installed; writes benchmarks/results/corpus_actors.{json,md}

A CLIP ViT-B/32 vision tower, random weights, `r=4`, batches of 16, one thread for each process that holds the model.
Images are JPEGs of coloured fields and noise, 320×240. The plain loop opens files, calls the processor on a batch of
them and the model on what it gives, and keeps a list. The engines read shards of 64 images and write Parquet as well.
The more actors, the more images in proportion. Ray is told of a core for each actor and one for reading, whatever the
machine has, so that all start. Rounds interleave. Two loops at once are what actors that fill both cores are compared
with: what the processors of this machine do in a second of CPU time hangs on whether the other one is busy.

What is counted begins when each process with a model has given a batch (before are imports, weights, processes), and
ends ten batches before the last: Ray reads ahead what its object store holds (160 MB, of which Ray Data takes half:
eight batches), and would else be counted without reading. CPU time is that of all processes: this one, Ray's own,
those that read and those that hold the model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import RESULTS, described, machine, save
from PIL import Image

import turbovlm
from turbovlm.corpus import Job, embed
from turbovlm.corpus.embed import Engine, local
from turbovlm.corpus.embedder import Rows
from turbovlm.engines.ray import on_ray
from turbovlm.loading import ModelSpec

BATCH, SHARD, R = 16, 64, 4
ACTORS = (1, 2, 4)
STORE, TAIL = 160_000_000, 10
KINDS = ("model", "reading", "engine")
LOOPS = ("a plain loop", "two loops at once")
GOAL = 0.10
MARK = "TURBOVLM_BENCHMARK"
TICKS = os.sysconf("SC_CLK_TCK")


class Clock:
    """Wall and CPU seconds of the batches behind the first `warm`, of which `counted` are counted."""

    def __init__(self, warm: int, counted: int) -> None:
        self.warm, self.counted, self.begun = warm, counted, time.perf_counter()
        self.seen = 0
        self.at: list[tuple[float, dict[tuple[str, str], float]]] = []

    def batch(self) -> None:
        """Note that a batch is there."""
        self.seen += 1
        if self.seen in (self.warm, self.warm + self.counted):
            self.at.append((time.perf_counter(), cpu_seconds()))

    def found(self) -> dict[str, float]:
        (begun, before), (ended, after) = self.at
        kinds = dict.fromkeys(KINDS, 0.0)
        for (name, kind), seconds in after.items():
            kinds[kind] += seconds - sum(value for (other, _), value in before.items() if other == name)
        found = {"images": self.counted * BATCH, "wall": ended - begun, "start_up": begun - self.begun}
        return {**found, "cpu": sum(kinds.values()), **kinds}


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
    found = []
    files = sorted(folder.iterdir())[: BATCH * (counted + 1)]
    with torch.inference_mode():
        for start in range(0, len(files), BATCH):
            images = [Image.open(path).convert("RGB") for path in files[start : start + BATCH]]
            outputs: Any = encoder(**processor(images=images, return_tensors="pt"))
            found.append(outputs.image_embeds.numpy())
            clock.batch()
    return clock.found()


def loops(count: int, model: str, folder: Path, counted: int) -> dict[str, float]:
    """Plain loops, each in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--loop", model, str(folder), "--batches", str(counted)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(count)
    ]
    found = [json.loads(each.communicate()[0]) for each in started]
    summed = {name: sum(each[name] for each in found) for name in ("images", "cpu", *KINDS)}
    return {**summed, **{name: max(each[name] for each in found) for name in ("wall", "start_up")}}


def by(engine: Engine, model: str, folder: Path, counted: int, actors: int = 1) -> dict[str, float]:
    """A corpus embedded by an engine."""
    clock = Clock(actors, counted)

    def clocked(*asked: Any) -> Iterator[Rows]:
        for rows in engine(*asked):
            clock.batch()
            yield rows

    out = Path(tempfile.mkdtemp())
    try:
        job = Job(ModelSpec(model), ("pooled",), {"r": R}, BATCH)
        embed(folder, out / "embeddings", job, shard_size=SHARD, engine=clocked)
    finally:
        shutil.rmtree(out)
    return clock.found()


def on_actors(actors: int, model: str, folder: Path, counted: int) -> dict[str, float]:
    """On Ray with a core for each actor and one for reading, whether the machine has them or not."""
    import ray

    ray.init(
        num_cpus=actors + 1,
        object_store_memory=STORE,
        log_to_driver=False,
        logging_level="ERROR",
        include_dashboard=False,
    )
    try:
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


def save_model(folder: Path) -> str:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig()).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
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
            "one process": lambda: by(local(0), model, folders[1], counted[1]),
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
        "least and the most. Start-up is not in images/s. *Beyond loops* is what the engine costs: CPU time per image",
        f"of all processes, against the loops' of the same round; the goal is at most {GOAL:.0%}. One process and one",
        "actor are compared with one loop, more actors with two at once, which fill two cores as they do.",
        "",
        described(results["machine"]),
        "",
        "| | images | images/s | CPU ms per image | beyond loops | of Ray itself | start-up, s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for version, each in runs.items():
        cpu, speeds = per_image(each), [run["images"] / run["wall"] for run in each]
        beyond = own = ""
        if "loop" not in version:
            base = per_image(runs[LOOPS["actors" in version]])
            over = [mine / theirs - 1 for mine, theirs in zip(cpu, base)]
            beyond = f"**{statistics.median(over):+.1%}** ({min(over):+.0%} … {max(over):+.0%})"
        if version.startswith("Ray"):
            own = f"{statistics.median(run['engine'] / run['cpu'] for run in each):.1%}"
        lines.append(
            f"| {version} | {each[0]['images']:.0f} | {statistics.median(speeds):.1f} ({min(speeds):.1f} … "
            f"{max(speeds):.1f}) | {1000 * statistics.median(cpu):.1f} | {beyond} | {own} "
            f"| {statistics.median(run['start_up'] for run in each):.1f} |"
        )
    lines += [
        "",
        "Actors beyond the cores that the machine has share them. *Of Ray itself* is CPU time of this process, which",
        "collects and writes, and of Ray's that neither read nor hold the model: so much a second, however fast the",
        "model is. The rest is reading in processes of their own, and a model that shares caches and cores with it.",
        "",
    ]
    return "\n".join(lines)


def per_image(runs: list[dict[str, float]]) -> list[float]:
    return [run["cpu"] / run["images"] for run in runs]


if __name__ == "__main__":
    main()
