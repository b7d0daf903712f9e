"""The sweep of tiles, which needs a GPU, runs at tiny shapes in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention_sweep.py"


def run(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--rounds", "1", *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_tiles_are_compared_and_timed(dtype):
    done = run("--dtype", dtype, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| 1 2 65 ")]
    assert [row.split("|")[1].split()[3:] for row in rows] == [["64", dtype], ["72", dtype]]
    times = [float(cell) for row in rows for cell in row.split("|")[2:6] if cell.strip() != "–"]
    assert len(times) == 8 and min(times) > 0


@pytest.mark.slow
def test_on_a_cpu_nothing_but_the_interpreter_will_do():
    done = run()
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr


def test_the_report_ranks_tiles_by_width(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    sweep = importlib.import_module("attention_sweep")
    fast, slow = (sweep.named(tile) for tile in sweep.TILES[:2])
    seconds = {sweep.NO_BIAS: 2e-3, f"{sweep.NO_BIAS}, flash": 1e-3, sweep.BIAS: 4e-3, fast: 1e-3, slow: 2e-3}
    found = {f"{batch} 16 577 72 bf16": {"chosen": slow, "seconds": seconds} for batch in (8, 64)}
    report = sweep.report({"machine": {"gpu": "x"}, "attention": found})
    assert f"| 8 16 577 72 bf16 | 1.000 | 4.000 | 2.000 | 1.000 | {fast} |" in report
    assert all(f"| 72 bf16, {batch} | {fast}: 1.00; {slow}: 2.00 |" in report for batch in (8, 64))


def test_a_tile_of_other_values_is_an_error(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    sweep = importlib.import_module("attention_sweep")
    small = sweep.inputs((1, 1, 5, 16), sweep.DTYPES["fp16"], "cpu")
    exact = sweep.plain.attend(*(x.double() for x in small[:4]), small[4])
    sweep.check(sweep.TILES[0], small, exact)
    with pytest.raises(AssertionError):
        sweep.check(sweep.TILES[0], small, exact + 0.1)
