"""Everything that must be measured on a GPU, in parts of a few minutes that fill one table.

    python benchmarks/gpu.py --list                        # the parts, and how much of each is measured
    python benchmarks/gpu.py --minutes 5                   # goes on where the last call stopped; says what is left
    python benchmarks/gpu.py --parts checks 'vit-l-384/bf16/*'
    python benchmarks/gpu.py --parts '*/compiled/64' --versions model default
    python benchmarks/gpu.py --parts '*/eager/*' --versions default --again          # the library has changed
    python benchmarks/gpu.py --device cpu --small          # the same on a tiny model, to see that it runs

It writes benchmarks/results/gpu.{json,md}, anew with every cell, and skips what is there already. The parts:
`ENCODER/DTYPE/MODE/BATCH`: the model itself, turbovlm and ToMe, eager, in a CUDA graph, or compiled, each version anew,
which takes longest. `routes/DTYPE/WIDTH`: attention with a bias. `kernels/DTYPE/SHAPE`: the steps of a merge.
`checks/DTYPE`: whether all of it is right. What fails is a cell that says why; the exit status is then 1, once nothing
is left. `--results FOLDER` reads and writes elsewhere.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from cases import RESULTS, load, machine, save
from gpu_attention import attention_parts
from gpu_encoders import BATCHES, VERSIONS, encoder_parts
from gpu_kernels import check_parts, kernel_parts
from gpu_part import Bench, Part, free
from gpu_report import is_failed, report

DTYPES = ("bf16", "fp16")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the parts, measure nothing")
    parser.add_argument("--parts", nargs="+", default=["*"], metavar="PATTERN", help="names, or their first levels")
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=VERSIONS, help="of encoders")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="(default: 1 8 64)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after these")
    parser.add_argument("--again", action="store_true", help="forget first what is there of these parts and versions")
    parser.add_argument("--rounds", type=int, default=20, help="how often each version is timed (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny model and tiny shapes; gpu_small.{json,md}")
    args = parser.parse_args(arguments)
    file = args.results / ("gpu_small.json" if args.small else "gpu.json")
    results = {"cells": {}, "seconds": {}} | load(file)
    parts = selected(args)
    if not parts:
        parser.error(f"--parts {' '.join(args.parts)}: no part is called so; --list names them")
    if args.list:
        print(*(told(part, results) for part in parts), sep="\n")
        return
    if args.device == "cpu" and not args.small:
        parser.error("--device cpu: on a CPU this takes days; give --small")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device here: run this on a machine with one, or see --device cpu --small\n")
    here = {"gpu": torch.cuda.get_device_name() if args.device == "cuda" else "none (cpu)", **machine()}
    before = results.get("machine", here)
    for what in ("gpu", "torch"):
        if before[what] != here[what]:
            parser.error(f"{file} was measured on {what} {before[what]}, this is {here[what]}: give other --results")
    results["machine"] = here
    if args.again:
        for key in [key for part in parts for key in part.cells]:
            results["cells"].pop(key, None)

    def keep() -> None:
        save(file, results)
        file.with_suffix(".md").write_text(report(results))

    bench = Bench(args.device, args.rounds, args.small)
    fill(parts, results, bench, time.monotonic() + 60 * args.minutes, keep)
    sys.exit(ending(parts, results))


def selected(args: argparse.Namespace) -> list[Part]:
    """The parts that were asked for, in the order in which they are measured: those that compile encoders last."""
    parts = []
    for dtype in DTYPES:
        parts += check_parts(dtype, args.small)
        parts += encoder_parts(dtype, ("eager", "graph"), args.batches, args.versions, args.small)
        parts += attention_parts(dtype, args.small) + kernel_parts(dtype, args.small)
    for dtype in DTYPES:
        parts += encoder_parts(dtype, ("compiled", "reduce-overhead"), args.batches, args.versions, args.small)
    return [part for part in parts if any(fnmatch(part.name, p) or fnmatch(part.name, f"{p}/*") for p in args.parts)]


def fill(
    parts: Sequence[Part], results: dict[str, Any], bench: Bench, deadline: float, keep: Callable[[], None]
) -> None:
    """Measure the cells that are missing, and keep each at once; begin none after `deadline`, but one in any case."""
    for number, part in enumerate(parts):
        start, missing = time.monotonic(), [key for key in part.cells if key not in results["cells"]]
        measured = part.measure(bench, missing)
        for count, (key, cell) in enumerate(measured, start=1):
            results["cells"][key] = cell
            keep()
            print(f"[{number + 1}/{len(parts)}] {key}: {cell}", flush=True)
            if is_failed(cell) and is_lost(bench):
                sys.exit(f"the GPU does not answer any more after {key}; run this again: what is measured is kept")
            if count < len(missing) and time.monotonic() > deadline:
                break
        measured.close()
        if missing:
            results["seconds"][part.name] = results["seconds"].get(part.name, 0) + time.monotonic() - start
            keep()
            torch.compiler.reset()
            free(bench)
            if time.monotonic() > deadline:
                return


def is_lost(bench: Bench) -> bool:
    """Whether an error has broken the process's connection to the GPU, so that all others would follow from it."""
    try:
        if bench.device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def ending(parts: Sequence[Part], results: dict[str, Any]) -> int:
    """Say what is left, or what has failed; the exit status."""
    left = [part for part in parts if not results["cells"].keys() >= {*part.cells}]
    if left:
        count = sum(key not in results["cells"] for part in left for key in part.cells)
        print(f"left: {count} cells in {len(left)} parts, the next one {left[0].name}; --list has them all")
        return 0
    failed = [key for part in parts for key in part.cells if is_failed(results["cells"][key])]
    print("nothing left", *(f"failed: {key}: {results['cells'][key]['failed']}" for key in failed), sep="\n")
    return 1 if failed else 0


def told(part: Part, results: dict[str, Any]) -> str:
    """A part's name, how many of its cells there are, and what they took."""
    there = [results["cells"][key] for key in part.cells if key in results["cells"]]
    failed, seconds = sum(map(is_failed, there)), results["seconds"].get(part.name)
    took = f", {seconds:.0f} s" if seconds is not None else ""
    return f"{part.name}: {len(there)} of {len(part.cells)}{f', {failed} failed' if failed else ''}{took}"


if __name__ == "__main__":
    main()
