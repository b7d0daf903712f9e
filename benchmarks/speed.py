"""Speed on the CPU: turbovlm beside the model itself and beside other ways of merging.

    python benchmarks/speed.py                            # everything, about two hours on 2 cores; goes on where it was
    python benchmarks/speed.py --cases vit-b-384 --dtypes fp32 --modes eager
    python benchmarks/speed.py --report                   # only write the tables and the plot from what was measured

Writes benchmarks/results/speed.json after every measurement (a measurement found there is not repeated; --again does),
and speed.md and speed.png at the end. Small models are measured in three fresh processes, whose rounds are pooled:
where memory happens to lie moves a process's times by several percent. Leave the machine alone meanwhile: process CPU
time of one program rises when another fills the caches.

Modes: `eager` batch 8, with every rival; `compiled` batch 8; `b1` and `b32`: eager, batch 1 and 32. Eager models are
also sliced: cut by the same schedule for nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from cases import (
    CASES,
    CPU_CASES,
    DTYPES,
    RESULTS,
    Case,
    build,
    default_at_cost,
    described,
    images,
    load,
    machine,
    pooled,
    save,
)
from rich.console import Console
from rich.progress import Progress
from rivals import published, sliced, with_sdpa

import turbovlm
from turbovlm.profile import Comparison, compare

MODES = {"eager": 8, "compiled": 8, "b1": 1, "b32": 32}
"""Batch size of each mode."""
SECONDS, FEWEST, MOST = 40, 3, 20
"""Rounds are as many as the model itself does in this time, within these bounds."""
PROCESSES, LONG = 3, 2
"""Fresh processes that share the rounds, where the model's own forward takes less than so many seconds."""
FILE = RESULTS / "speed.json"
RIVALS = {"published": published, "SDPA": with_sdpa}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CPU_CASES, default=CPU_CASES, metavar="CASE")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"), metavar="DTYPE")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=tuple(MODES), metavar="MODE")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    measured = load(FILE)
    if not args.report:
        todo = [(mode, case, dtype) for mode in args.modes for case in args.cases for dtype in args.dtypes]
        for mode, case, dtype in todo:
            key = f"{case} {dtype} {mode}"
            if args.again or key not in measured:
                Console(stderr=True).print(f"{time.strftime('%H:%M:%S')} {key}", highlight=False)
                measured[key] = {
                    **pooled(measure, case, dtype, mode, processes=PROCESSES, long=LONG).to_dict(),
                    "machine": machine(),
                }
                save(FILE, measured)
    (RESULTS / "speed.md").write_text(report(measured))
    plot(measured)
    print(report(measured))


def measure(name: str, dtype: str, mode: str) -> Comparison:
    """One process's rounds."""
    case = CASES[name]
    model, inputs = build(case, DTYPES[dtype]), images(case, MODES[mode], DTYPES[dtype])
    versions: dict[str, Any] = {"turbo": default_at_cost(model, case)}
    if mode == "eager":
        versions |= {rival: prepare(case.r) for rival, prepare in RIVALS.items()}
    if mode != "compiled":
        with turbovlm.apply(model, versions["turbo"]) as handle:
            versions["sliced"] = sliced(handle.schedules[0].merged)
    seconds = _seconds(model, inputs)
    rounds = max(FEWEST, min(MOST, round(SECONDS / seconds)))
    if seconds < LONG:
        rounds = -(-rounds // PROCESSES)
    warmup = 1 if mode == "compiled" or seconds < LONG else 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(mode, total=(warmup + rounds) * (len(versions) + 1))
        return compare(
            model,
            inputs,
            versions,
            rounds=rounds,
            warmup=warmup,
            compile=mode == "compiled",
            progress=lambda done: progress.advance(task, done),
        )


def _seconds(model: torch.nn.Module, inputs: torch.Tensor) -> float:
    """Of the second forward: the first one is slower."""
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            model(inputs)
            seconds = time.perf_counter() - start
            if seconds > LONG:
                break
        return seconds


def report(measured: dict[str, Any]) -> str:
    """Every measurement as tables in Markdown."""
    lines = ["# Speed on the CPU", ""]
    for text in dict.fromkeys(
        described({**m["machine"], "date": m["machine"]["date"][:10]}) for m in measured.values()
    ):
        lines += [text, ""]
    lines += [
        "Speed-ups are over the model itself, on SDPA, in the same mode, dtype and batch: medians of interleaved "
        "rounds, by process CPU time. *turbo*: the default setting, at as many multiply-accumulates as the paper's "
        "with r in every block. *MACs*: ratio of multiply-accumulates, what arithmetic allows. *Efficiency*: the "
        "first over the second. *published*, *SDPA*: token merging as others ship it (benchmarks/rivals.py). *sliced*: "
        "tokens of the same schedule cut off for nothing, the most that merging by it can gain here.",
        "",
    ]
    for mode, batch in MODES.items():
        rows = [
            _row(CASES[c], d, measured[f"{c} {d} {mode}"], mode) for c, d in _pairs() if f"{c} {d} {mode}" in measured
        ]
        if not rows:
            continue
        rivals = mode == "eager"
        head = ["model", "dtype", "r", "images/s", "with turbo", "MACs", "speed-up", "quartiles", "efficiency"]
        head += ["sliced"] if mode != "compiled" else []
        head += ["published", "SDPA", "turbo over published"] if rivals else []
        head += ["peak MB", "with turbo", "rounds"]
        title = f"Batch {batch}, {'compiled' if mode == 'compiled' else 'eager'}"
        lines += [f"## {title}", "", "| " + " | ".join(head) + " |", "|---|---" + "|--:" * (len(head) - 2) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def _pairs() -> list[tuple[str, str]]:
    return [(case, dtype) for case in CPU_CASES for dtype in ("fp32", "bf16")]


def _row(case: Case, dtype: str, result: dict[str, Any], mode: str) -> list[str]:
    runs = {run["name"]: run for run in result["runs"]}
    model, turbo = runs["model"], runs["turbo"]
    low, high = turbo["speedup_quartiles"]
    row = [case.name, dtype, str(case.r), f"{model['images_per_second']:.3g}", f"{turbo['images_per_second']:.3g}"]
    row += [f"{turbo['macs_ratio']:.3f}×", f"**{turbo['speedup']:.3f}×**", f"{low:.3f}–{high:.3f}"]
    row += [f"{turbo['efficiency']:.3f}"]
    if mode != "compiled":
        row += [f"{runs['sliced']['speedup']:.3f}×" if "sliced" in runs else "–"]  # of earlier measurements
    if mode == "eager":
        row += [f"{runs[name]['speedup']:.3f}×" for name in RIVALS]
        over = statistics.median(a / b for a, b in zip(runs["published"]["seconds"], turbo["seconds"]))
        row += [f"{over:.2f}×"]
    return [*row, *(f"{run['peak_bytes'] / 1e6:.1f}" for run in (model, turbo)), str(result["rounds"])]


def plot(measured: dict[str, Any]) -> None:
    """The batch-8 eager speed-ups of every case and way of merging, over what arithmetic allows."""
    from matplotlib.figure import Figure

    colours = {"turbo": "#0b6e99", "SDPA": "#8fb8c9", "published": "0.75"}
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    for axis, dtype in zip(figure.subplots(2, 1, sharex=True), ("fp32", "bf16")):
        found = [case for case in CPU_CASES if f"{case} {dtype} eager" in measured]
        for place, case in enumerate(found):
            runs = {run["name"]: run for run in measured[f"{case} {dtype} eager"]["runs"]}
            for shift, (name, colour) in zip((-0.27, 0, 0.27), colours.items()):
                low, high = runs[name]["speedup_quartiles"]
                value = runs[name]["speedup"]
                whiskers = [[value - low], [high - value]]
                label = {"turbo": "turbovlm", "SDPA": "ToMe on SDPA", "published": "ToMe as published"}[name]
                axis.bar(place + shift, value, 0.25, color=colour, yerr=whiskers, label=label if place == 0 else None)
            line = {"color": "#c8102e", "linewidth": 2, "label": "MACs ratio" if place == 0 else None}
            axis.plot([place - 0.42, place + 0.42], [runs["turbo"]["macs_ratio"]] * 2, **line)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(found)), [f"{CASES[case].name}\nr={CASES[case].r}" for case in found], fontsize=8)
        axis.set_ylabel(f"speed-up, {dtype}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, ncols=4, loc="lower right", framealpha=0.95)
    figure.suptitle("Speed-up over the model on SDPA: batch 8, eager, 2 CPU cores")
    figure.savefig(RESULTS / "speed.png", dpi=120)


if __name__ == "__main__":
    main()
