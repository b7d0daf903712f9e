"""10,000 images embedded with three kills, and on a disk that fills up, against runs that nothing stopped.

    python benchmarks/corpus_stops.py    # where ray is installed; as root, for the small disk; about ten minutes
                                         # writes benchmarks/results/corpus_stops.{json,md}

Drawn images in tars of 250, one in 300 of which does not decode; a small CLIP vision tower with random weights, `r=8`.
`turbovlm embed` runs in processes of its own, as a user starts it. Each engine embeds the corpus once as it is. Then a
second run is killed three times, at moments drawn from a seed: SIGKILL to the process, then to the whole group of
processes, then Ctrl-C, each followed by the same command. The one-process engine also writes to a file system of a few
hundred kilobytes until that is full, and goes on once there is room. All must end with the same parts, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import RESULTS, described, machine, save
from corpus_actors import save_model
from PIL import Image
from pyarrow import parquet
from rich.console import Console

ROOT = Path(__file__).parents[1]
TAR, BATCH, R = 250, 50, 8
BROKEN = 300
"""One image in so many does not decode."""
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
SMALL |= {"image_size": 64, "patch_size": 8, "projection_dim": 64}
KILLS = ("the process", "all of its processes", "Ctrl-C")
PATIENCE = 1800
STDERR = Console(stderr=True)


@dataclass(frozen=True)
class Stop:
    """How a run was stopped, the parts that were whole then, its exit code, and the last line that it said."""

    how: str
    parts: int
    code: int
    said: str


@dataclass(frozen=True)
class Run:
    """A corpus embedded: its stops, seconds in all, images, those with an error, a digest of its parts and of rows."""

    name: str
    stops: tuple[Stop, ...]
    seconds: float
    images: int
    errors: int
    parts: str
    rows: str


def draw(folder: Path, images: int) -> Path:
    """Tars of JPEGs, 64 to 160 pixels a side."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for first in range(0, images, TAR):
        with tarfile.open(folder / f"{first // TAR:03d}.tar", "w") as tar:
            for index in range(first, min(first + TAR, images)):
                content = _jpeg(generator)
                member = tarfile.TarInfo(f"{index:05d}.jpg")
                content = content[:100] if index % BROKEN == 7 else content
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def _jpeg(generator: np.random.Generator) -> bytes:
    width, height = (int(side) for side in generator.integers(64, 160, 2))
    fields = Image.fromarray(generator.integers(0, 255, (5, 5, 3), dtype=np.uint8))
    out = io.BytesIO()
    fields.resize((width, height)).save(out, "JPEG", quality=85)
    return out.getvalue()


class Embedding:
    """`turbovlm embed` in a process of its own."""

    def __init__(self, corpus: Path, model: str, out: Path, engine: str, log: Path) -> None:
        self.out, self.log = out, log
        command = [sys.executable, "-W", "ignore", "-m", "turbovlm", "embed", str(corpus), "--model", model]
        command += ["--r", str(R), "--batch", str(BATCH), "--engine", engine, "--out", out.name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local", "TERM": "dumb", "COLUMNS": "400"}
        with log.open("w") as into:
            self.process = subprocess.Popen(
                command,
                stdout=into,
                stderr=into,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
                cwd=out.parent,
            )

    def parts(self) -> list[Path]:
        return sorted(self.out.glob("part-*.parquet"))

    def stop_at(self, parts: int, behind: float, how: str) -> Stop:
        """Stop it so many seconds behind the moment at which so many parts were there."""
        until = time.monotonic() + PATIENCE
        while len(self.parts()) < parts and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(behind)
        if self.process.poll() is not None:
            raise SystemExit(f"the run ended before it was stopped: {self.said()}")
        if how == "the process":
            os.kill(self.process.pid, signal.SIGKILL)
        else:
            os.killpg(self.process.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
        return self.ended(how)

    def ended(self, how: str) -> Stop:
        code = self.process.wait(PATIENCE)
        return Stop(how, len(self.parts()), code, self.said())

    def said(self) -> str:
        lines = [line.strip() for line in self.log.read_text().replace("\r", "\n").splitlines()]
        return next((line for line in reversed(lines) if line), "")


def digest_of_parts(out: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(out.glob("part-*.parquet")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def rows_of(out: Path) -> tuple[int, int, str]:
    """Rows, those with an error, and a digest of all, sorted by name."""
    table = parquet.read_table(out).sort_by("name")
    names = table.column("name").to_pylist()
    if len(set(names)) != len(names):
        raise SystemExit(f"{out}: {len(names) - len(set(names))} rows are there twice")
    errors = sum(error is not None for error in table.column("error").to_pylist())
    digest = hashlib.sha256(repr(table.to_pydict()).encode())
    return len(names), errors, digest.hexdigest()


def finished(name: str, out: Path, begun: float, stops: list[Stop], last: Stop) -> Run:
    if last.code:
        raise SystemExit(f"{name}: ended with {last.code}: {last.said}")
    images, errors, rows = rows_of(out)
    run = Run(name, tuple(stops), time.perf_counter() - begun, images, errors, digest_of_parts(out), rows)
    STDERR.print(run, highlight=False)
    return run


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def whole(engine: str, corpus: Path, model: str, folder: Path) -> Run:
    begun, out = time.perf_counter(), folder / f"{engine}-whole"
    ended = Embedding(corpus, model, out, engine, folder / "log").ended("")
    return finished(f"{engine}, not stopped", out, begun, [], ended)


def killed(engine: str, corpus: Path, model: str, folder: Path, seed: int) -> Run:
    begun, out, stops = time.perf_counter(), folder / f"{engine}-killed", []
    chance, tars = random.Random(f"{seed} {engine}"), len(list(corpus.iterdir()))
    for number, how in enumerate(KILLS):
        third = tars // (len(KILLS) + 1)
        parts = number * third + chance.randint(1, third)
        run = Embedding(corpus, model, out, engine, folder / "log")
        stops.append(run.stop_at(parts, chance.uniform(0, 0.5), how))
    ended = Embedding(corpus, model, out, engine, folder / "log").ended("")
    return finished(f"{engine}, stopped three times", out, begun, stops, ended)


def on_a_small_disk(corpus: Path, model: str, folder: Path, kilobytes: int) -> Run:
    begun, disk, stops = time.perf_counter(), folder / "disk", []
    with small_disk(disk, kilobytes):
        for _ in range(2):  # the second time it is as full as before
            ended = Embedding(corpus, model, disk / "out", "local", folder / "log").ended("disk full")
            if ended.code != 2:
                raise SystemExit(f"a full disk ended with {ended.code} and not 2: {ended.said}")
            stops.append(ended)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        ended = Embedding(corpus, model, disk / "out", "local", folder / "log").ended("")
        return finished("local, on a disk that fills up", disk / "out", begun, stops, ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--engines", nargs="+", default=["local", "ray"], choices=["local", "ray"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    if args.images < 2 * TAR * (len(KILLS) + 1):
        parser.error(f"--images {args.images}: at least {2 * TAR * (len(KILLS) + 1)}, for parts between the stops")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, corpus = save_model(folder / "model", **SMALL), draw(folder / "corpus", args.images)
        runs = []
        for engine in args.engines:
            runs += [whole(engine, corpus, model, folder), killed(engine, corpus, model, folder, args.seed)]
        size = sum(path.stat().st_size for path in (folder / f"{args.engines[0]}-whole").iterdir())
        if os.geteuid() == 0:
            runs.append(on_a_small_disk(corpus, model, folder, size // 3 // 1024))
    about = {**machine(), "pyarrow": importlib.metadata.version("pyarrow")}
    about |= {"ray": importlib.metadata.version("ray")} if "ray" in args.engines else {}
    results = {"machine": about, "seed": args.seed, "runs": [asdict(run) for run in runs]}
    save(RESULTS / "corpus_stops.json", results)
    (RESULTS / "corpus_stops.md").write_text(report(results))
    print(report(results))
    if len({run.parts for run in runs}) > 1 or len({run.rows for run in runs}) > 1:
        raise SystemExit("the runs differ")


def report(results: dict[str, Any]) -> str:
    runs = results["runs"]
    same = len({(run["parts"], run["rows"]) for run in runs}) == 1
    lines = [
        "# A corpus embedded, and stopped on the way",
        "",
        f"{runs[0]['images']:,} drawn images in {-(-runs[0]['images'] // TAR)} tars, {runs[0]['errors']} of which do "
        f"not decode; `turbovlm embed … --r {R}`, a part for each tar.",
        f"{'Every run ended with the same parts, byte for byte' if same else '**The runs differ**'}, no row lost or "
        "doubled.",
        "",
        described(results["machine"]),
        "",
        "| run | stopped by (whole parts then, exit code) | seconds | rows | SHA-256 of the parts |",
        "|---|---|--:|--:|---|",
    ]
    for run in runs:
        stops = ", ".join(f"{stop['how']} ({stop['parts']}, {stop['code']})" for stop in run["stops"]) or "—"
        seconds = f"{run['seconds']:.0f}"
        lines.append(f"| {run['name']} | {stops} | {seconds} | {run['images']:,} | {run['parts'][:16]} |")
    said = {stop["said"] for run in runs for stop in run["stops"] if stop["code"] > 0}
    lines += ["", "What a run says that Ctrl-C or a full disk ends:", "", *(f"- `{each}`" for each in sorted(said)), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
