"""Plant faults in a random sample of lines, one at a time, and say which of them no test notices.

    python tools/mutation.py                       # 200 faults in ops/ and encoder/, two at a time: hours on two cores
    python tools/mutation.py --sample 20 --seed 1  # a look
    python tools/mutation.py --out FOLDER          # goes on where a run into that folder was stopped
    python tools/mutation.py --survivors           # only those that no test noticed in the last run

The faults are those of cosmic-ray (https://cosmic-ray.readthedocs.io), which this script installs into an environment
of its own; but for those in type annotations, which are never run. Each is planted in a copy of the repository, where
the tests that cover its file are run until one fails (`TESTS`); before, they have to pass without a fault. Written are
benchmarks/results/mutation_seed*.md, with every survivor, and .json. Reasons why a survivor may live stand in
tools/mutation_reasons.json, by file, line of code and fault.

Tests that are written for the survivors of a sample notice those; what all tests notice of any fault is what they
noticed of a sample at first, which the report keeps.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REASONS = Path(__file__).with_name("mutation_reasons.json")
MODULES = ["src/turbovlm/ops", "src/turbovlm/encoder"]
COSMIC_RAY = "cosmic_ray==8.7.0"
PATIENCE = 4.0
"""Times the tests' own duration after which a fault counts as noticed, as one that makes a loop endless is."""

COMMON = ["tests/test_reference.py", "tests/test_golden.py", "tests/test_exact_values.py", "tests/test_verify.py"]
TESTS: dict[str, list[str]] = {
    "src/turbovlm/ops/kernels/": ["tests/test_kernels.py", "tests/test_reference_fast.py"],
    "src/turbovlm/ops/fused.py": ["tests/test_kernels.py", "tests/test_reference_fast.py"],
    "src/turbovlm/ops/": [*COMMON, "tests/test_ops.py", "tests/test_routes.py", "tests/test_reference_fast.py"],
    "src/turbovlm/encoder/schedule.py": [
        "tests/test_schedule.py",
        *COMMON,
        "tests/test_apply.py",
        "tests/test_macs.py",
    ],
    "src/turbovlm/encoder/families/": [
        "tests/test_dual_encoders.py",
        "tests/test_joint.py",
        "tests/test_apply.py",
        "tests/test_text.py",
        "tests/test_invariants.py",
    ],
    "src/turbovlm/encoder/": [*COMMON, "tests/test_apply.py", "tests/test_invariants.py", "tests/test_text.py"],
}
"""Tests that are run for a file, by the beginning of its path; the first that fits."""


def main() -> int:
    """Sample, plant, test and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200, metavar="N", help="faults (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="faults tested at a time (default 2)")
    parser.add_argument("--out", type=Path, help="folder of the run; one that was stopped there goes on")
    parser.add_argument("--survivors", action="store_true", help="the seed's last survivors, after tests were added")
    args = parser.parse_args()
    last: dict[str, Any] = json.loads(_results(args.seed).read_text()) if args.survivors else {}
    out = args.out or Path(tempfile.mkdtemp(prefix="mutation-"))
    out.mkdir(parents=True, exist_ok=True)
    print(f"the run is in {out}", flush=True)
    cosmic_ray = _environment(out)
    faults = [each for each in last.get("outcomes", ()) if each["outcome"] == "survived"]
    if not args.survivors:
        faults = _sample(out, cosmic_ray, args.sample, args.seed)
    copies = [_copy(out / f"copy{i}") for i in range(args.workers)]
    done = out / "outcomes.jsonl"
    seen = {json.loads(line)["job"] for line in done.read_text().splitlines()} if done.exists() else set()
    left = [fault for fault in faults if fault["job"] not in seen]
    with ThreadPoolExecutor(args.workers) as pool, done.open("a") as file:
        limits = _limits({_tests_of(fault["path"]) for fault in left}, copies, pool)
        tested = functools.partial(_tested, free=list(copies), cosmic_ray=cosmic_ray, limits=limits)
        for number, outcome in enumerate(pool.map(tested, left), len(seen) + 1):
            file.write(json.dumps(outcome) + "\n")
            file.flush()
            print(f"{number}/{len(faults)} {outcome['outcome']:8} {outcome['path']}:{outcome['row']}", flush=True)
    outcomes = {outcome["job"]: outcome for outcome in map(json.loads, done.read_text().splitlines())}
    if args.survivors:
        outcomes = {each["job"]: outcomes.get(each["job"], each) for each in last["outcomes"]}
    _report(list(outcomes.values()), args.seed, last.get("noticed_at_first"))
    return 0


def _results(seed: int) -> Path:
    return RESULTS / f"mutation_seed{seed}.json"


def _environment(out: Path) -> Path:
    """The command of cosmic-ray, in an environment of its own."""
    folder = out / "environment"
    if not (folder / "bin" / "cosmic-ray").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", COSMIC_RAY], check=True)
    return folder / "bin" / "cosmic-ray"


def _sample(out: Path, cosmic_ray: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """So many of all faults that cosmic-ray knows, drawn from a seed."""
    config, session = out / "cosmic-ray.toml", out / "session.sqlite"
    if not session.exists():
        modules = json.dumps(MODULES)
        config.write_text(
            f"[cosmic-ray]\nmodule-path = {modules}\ntimeout = 60.0\nexcluded-modules = []\n"
            'test-command = "true"\n'
            '[cosmic-ray.distributor]\nname = "local"\n'
        )
        subprocess.run([cosmic_ray, "init", config, session], cwd=ROOT, check=True)
    fields = "job_id, module_path, operator_name, operator_args, occurrence, start_pos_row, start_pos_col"
    with sqlite3.connect(session) as database:
        rows = sorted(database.execute(f"SELECT {fields} FROM mutation_specs"), key=lambda row: row[1:])
    names = ("job", "path", "operator", "arguments", "occurrence", "row", "column")
    found = [dict(zip(names, row)) for row in rows]
    run = [fault for fault in found if not _is_annotated(fault["path"], fault["row"], fault["column"])]
    print(f"{len(run)} faults can be planted; {len(found) - len(run)} more are in annotations", flush=True)
    return random.Random(seed).sample(run, min(count, len(run)))


def _is_annotated(path: str, row: int, column: int) -> bool:
    """Whether a place in a file is inside of a type annotation."""
    return any(start <= (row, column) < end for start, end in _annotations(path))


@functools.cache
def _annotations(path: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where each annotation of a file begins and ends: row and column."""
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    found = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    return [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in found
        if node is not None
    ]


def _tests_of(path: str) -> tuple[str, ...]:
    return tuple(next(tests for start, tests in TESTS.items() if path.startswith(start)))


def _pytest(copy: Path, tests: tuple[str, ...], limit: float | None = None) -> int:
    """Exit status of some tests in a copy, which end at the first that fails."""
    environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy / 'lab' / 'src'}"}
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    return subprocess.run(pytest, cwd=copy, env=environment, capture_output=True, timeout=limit).returncode


def _limits(groups: set[tuple[str, ...]], copies: list[Path], pool: ThreadPoolExecutor) -> dict[tuple[str, ...], float]:
    """Seconds that each group of tests may take, from what it takes without a fault."""

    def limit(copy: Path, tests: tuple[str, ...]) -> float:
        start = time.monotonic()
        if _pytest(copy, tests):
            raise SystemExit(f"these tests fail without any fault: {' '.join(tests)}")
        seconds = time.monotonic() - start
        print(f"{seconds:.0f} s without a fault: {' '.join(tests)}", flush=True)
        return PATIENCE * seconds

    ordered = sorted(groups)
    one = [copies[i % len(copies)] for i in range(len(ordered))]  # tests alone change no file of a copy
    return dict(zip(ordered, pool.map(limit, one, ordered)))


def _copy(folder: Path) -> Path:
    """A copy of what git tracks, to plant faults in."""
    if not folder.exists():
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in files.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def _tested(
    fault: dict[str, Any], free: list[Path], cosmic_ray: Path, limits: dict[tuple[str, ...], float]
) -> dict[str, Any]:
    """What became of a fault: `"killed"`, `"survived"` or `"timeout"`, with its difference to the code."""
    copy = free.pop()
    file, original = copy / fault["path"], (ROOT / fault["path"]).read_text()
    try:
        command = [cosmic_ray, "apply", fault["path"], fault["operator"], str(fault["occurrence"])]
        subprocess.run(command, cwd=copy, check=True, capture_output=True)
        tests = _tests_of(fault["path"])
        planted = file.read_text().splitlines()
        changed = [(a, b) for a, b in zip(original.splitlines(), planted) if a != b] or [("", "")]
        if fault.get("before", changed[0][0].strip()) != changed[0][0].strip():
            raise SystemExit(f"{fault['path']} has changed since the last run: plant a whole sample again")
        try:
            outcome = "survived" if _pytest(copy, tests, limits[tests]) == 0 else "killed"
        except subprocess.TimeoutExpired:
            outcome = "timeout"
        return {**fault, "outcome": outcome, "before": changed[0][0].strip(), "after": changed[0][1].strip()}
    finally:
        file.write_text(original)
        free.append(copy)


def _report(outcomes: list[dict[str, Any]], seed: int, at_first: int | None) -> None:
    """The table of survivors, with the reasons that are known.

    `at_first`: how many of the sample were noticed before tests were written for its survivors; None if that is now.
    """
    reasons: dict[str, str] = json.loads(REASONS.read_text()) if REASONS.exists() else {}
    survivors = [outcome for outcome in outcomes if outcome["outcome"] == "survived"]
    killed = len(outcomes) - len(survivors)
    share = f"{killed} of {len(outcomes)} faults are noticed by a test ({killed / len(outcomes):.0%})"
    if at_first is not None:
        share += f"; {at_first} ({at_first / len(outcomes):.0%}) before tests were added for it"
    date = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    lines = [
        "# Faults planted in ops/ and encoder/",
        "",
        f"`python tools/mutation.py --sample {len(outcomes)} --seed {seed}`, {date}, Python {sys.version.split()[0]}, "
        f"{COSMIC_RAY}: {share}.",
        "",
        "| file | line | planted instead | why it may live |",
        "|---|---|---|---|",
    ]
    for outcome in sorted(survivors, key=lambda outcome: (outcome["path"], outcome["row"])):
        key = f"{outcome['path']}: {outcome['before']} -> {outcome['after']}"
        before, after = (outcome[name].replace("|", "\\|") for name in ("before", "after"))
        lines.append(f"| {outcome['path']} | `{before}` | `{after}` | {reasons.get(key, '')} |")
    file = _results(seed)
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")
    first = killed if at_first is None else at_first
    written = {"date": date, "seed": seed, "noticed_at_first": first, "outcomes": outcomes}
    file.write_text(json.dumps(written, indent=1) + "\n")
    print(f"{killed} of {len(outcomes)} noticed; survivors are in {file.with_suffix('.md')}")


if __name__ == "__main__":
    sys.exit(main())
