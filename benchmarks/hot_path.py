"""Where the time of merging goes.

    python benchmarks/hot_path.py                       # shares, curve and operators: writes results/hot_path.*
    python benchmarks/hot_path.py --parts shares        # merging's share of the encoder's time, per case and dtype
    python benchmarks/hot_path.py --parts curve         # the same from 197 to 16,385 tokens, with and without windows
    python benchmarks/hot_path.py --parts operators --label before
                                                        # PyTorch's profile of one forward, kept under that label

`operators` needs nothing but turbovlm's public functions, so it also runs on earlier releases: put their `src` first on
PYTHONPATH and give another label. Merging is everything that an accelerated block does beside its own modules and
attention: features, the guide's row, similarity, the choice, and the merge.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from cases import CASES, CPU_CASES, DTYPES, RESULTS, build, described, images, load, machine, save
from rich.progress import track
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import turbovlm
from turbovlm import TurboConfig
from turbovlm.encoder import block as engine
from turbovlm.ops import partition
from turbovlm.profile import macs

FILE = RESULTS / "hot_path.json"
PARTS = ("shares", "curve", "operators")
SIDES = (14, 24, 32, 48, 64, 96, 128)
"""Patches per side of the curve's images; 5 % of the tokens are merged per block, on average."""
PROFILED = (("vit-b-384", "fp32"), ("vit-b-384", "bf16"), ("dinov2-s-224", "fp32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--label", default="now", help="name of the profile that `operators` writes")
    args = parser.parse_args()
    results = load(FILE)
    if "operators" in args.parts:
        results.setdefault("operators", {})[args.label] = {
            "machine": machine(),
            **{f"{case} {dtype}": operators(case, dtype) for case, dtype in PROFILED},
        }
        save(FILE, results)
    if "shares" in args.parts:
        cases = [(case, dtype) for case in CPU_CASES for dtype in ("fp32", "bf16")]
        rows = {f"{c} {d}": share_of_case(c, d) for c, d in track(cases, description="shares")}
        results["shares"] = {"machine": machine(), "rows": rows}
        save(FILE, results)
    if "curve" in args.parts:
        results["curve"] = {"machine": machine(), "rows": [point(s) for s in track(SIDES, description="curve")]}
        save(FILE, results)
    (RESULTS / "hot_path.md").write_text(report(results))
    if "curve" in results:
        plot(results["curve"]["rows"])
    print(report(results))


def operators(case: str, dtype: str) -> dict[str, dict[str, list[float]]]:
    """Calls and self CPU time in µs of every operator, in one forward of the model and of the accelerated model."""
    model, pixels = build(CASES[case], DTYPES[dtype]), images(CASES[case], 8, DTYPES[dtype])
    found = {"model": _profile(model, pixels)}
    with turbovlm.apply(model, TurboConfig(CASES[case].r)):
        found["turbo"] = _profile(model, pixels)
    return found


def _profile(model: nn.Module, pixels: Tensor) -> dict[str, list[float]]:
    with torch.inference_mode():
        for _ in range(2):
            model(pixels)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            for _ in range(3):
                model(pixels)
    averages = record.key_averages()
    return {e.key: [e.count / 3, e.self_cpu_time_total / 3] for e in averages if e.key.startswith(("aten", "turbovlm"))}


@contextmanager
def clocked(*names: str) -> Iterator[dict[str, float]]:
    """Seconds spent in functions of encoder/block.py, summed."""
    spent = dict.fromkeys(names, 0.0)

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return result

        return watched

    originals = {name: getattr(engine, name) for name in names}
    try:
        for name, function in originals.items():
            setattr(engine, name, watch(name, function))
        yield spent
    finally:
        for name, function in originals.items():
            setattr(engine, name, function)


def merging(model: nn.Module, pixels: Tensor, config: TurboConfig, seconds: float) -> tuple[float, float]:
    """Seconds of one accelerated forward, and of merging in it: medians over `seconds` or 3 forwards."""
    totals, merges = [], []
    with turbovlm.apply(model, config), torch.inference_mode():
        model(pixels)
        while len(totals) < 3 or sum(totals) < seconds:
            with clocked("guide_of", "_compared", "_merge") as spent:
                start = time.perf_counter()
                model(pixels)
                totals.append(time.perf_counter() - start)
            merges.append(sum(spent.values()))
    return statistics.median(totals), statistics.median(merges)


def share_of_case(case: str, dtype: str) -> dict[str, float]:
    """Merging in one forward of batch 8."""
    model, pixels = build(CASES[case], DTYPES[dtype]), images(CASES[case], 8, DTYPES[dtype])
    total, merges = merging(model, pixels, TurboConfig(CASES[case].r), seconds=8)
    return {"seconds": total, "merging": merges, "share": merges / total}


def point(side: int) -> dict[str, float]:
    """A ViT-S/16 of `side`² patches, batch 1, fp32: the model, merging as it is, and merging without windows."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", img_size=16 * side, num_classes=0).eval()
    pixels = torch.randn(1, 3, 16 * side, 16 * side)
    config = TurboConfig(round(0.05 * (side**2 + 1)))
    with torch.inference_mode():
        plain = []
        while len(plain) < 3 or sum(plain) < 5:
            start = time.perf_counter()
            model(pixels)
            plain.append(time.perf_counter() - start)
    total, merges = merging(model, pixels, config, seconds=5)
    before = partition.WINDOWED_FROM
    partition.WINDOWED_FROM = 10**9
    try:
        full_total, full_merges = merging(model, pixels, config, seconds=5)
    finally:
        partition.WINDOWED_FROM = before
    with turbovlm.apply(model.to("meta"), config):
        left = macs(model, pixels.to("meta"))
    return {
        "tokens": side**2 + 1,
        "r": config.r,
        "model": statistics.median(plain),
        "turbo": total,
        "share": merges / total,
        "full_share": full_merges / full_total,
        "macs_ratio": macs(model, pixels.to("meta")) / left,
    }


def report(results: dict[str, Any]) -> str:
    """Everything as tables in Markdown."""
    lines = ["# Where the time of merging goes", ""]
    if "shares" in results:
        lines += [described(results["shares"]["machine"]), "", "## Merging's share of the encoder's time", ""]
        lines += ["Batch 8, eager, wall-clock time, medians.", ""]
        lines += ["| model | dtype | r | s/forward | merging, ms | share |", "|---|---|--:|--:|--:|--:|"]
        for key, row in results["shares"]["rows"].items():
            case, dtype = key.split()
            numbers = f"{row['seconds']:.3g} | {1e3 * row['merging']:.1f} | {row['share']:.1%}"
            lines.append(f"| {CASES[case].name} | {dtype} | {CASES[case].r} | {numbers} |")
    if "curve" in results:
        lines += ["", "## As the number of tokens grows", "", described(results["curve"]["machine"]), ""]
        lines += [
            "ViT-S/16, batch 1, fp32, 5 % of the tokens merged per block, on average; wall-clock time, medians.",
            "",
        ]
        head = ["tokens", "r", "model, s", "turbo, s", "speed-up", "MACs", "merging's share", "without windows"]
        lines += ["| " + " | ".join(head) + " |", "|--:" * len(head) + "|"]
        for row in results["curve"]["rows"]:
            ratio = row["model"] / row["turbo"]
            cells = [f"{row['tokens']:,}", f"{row['r']}", f"{row['model']:.3g}", f"{row['turbo']:.3g}", f"{ratio:.2f}×"]
            cells += [f"{row['macs_ratio']:.2f}×", f"{row['share']:.1%}", f"{row['full_share']:.1%}"]
            lines.append("| " + " | ".join(cells) + " |")
    for label, found in results.get("operators", {}).items():
        lines += ["", f"## Operators of one forward: {label}", "", described(found["machine"]), ""]
        for key in (key for key in found if key != "machine"):
            lines += [f"{key}, batch 8: self CPU time in ms, calls in brackets; from 0.5 % of the forward on", ""]
            lines += [*_operator_table(found[key]), ""]
    return "\n".join(lines) + "\n"


def _operator_table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    model, turbo = found["model"], found["turbo"]
    whole = sum(time for _, time in turbo.values())
    names = sorted({**model, **turbo}, key=lambda name: -turbo.get(name, [0, 0])[1])
    large = [n for n in names if max(turbo.get(n, [0, 0])[1], model.get(n, [0, 0])[1]) >= whole / 200]

    def cell(of: dict[str, list[float]], name: str) -> str:
        return f"{of[name][1] / 1e3:.2f} ({of[name][0]:.0f})" if name in of else ""

    rows = [f"| {name} | {cell(model, name)} | {cell(turbo, name)} |" for name in large]
    totals = [sum(time for _, time in of.values()) / 1e3 for of in (model, turbo)]
    head = ["| operator | the model | with turbo |", "|---|--:|--:|"]
    return [*head, *rows, f"| all, also smaller ones | {totals[0]:.1f} | {totals[1]:.1f} |"]


def plot(rows: list[dict[str, float]]) -> None:
    """Merging's share over the number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    tokens = [row["tokens"] for row in rows]
    axis.plot(tokens, [100 * row["full_share"] for row in rows], "o--", color="0.6", label="all pairs compared")
    axis.plot(tokens, [100 * row["share"] for row in rows], "o-", color="#0b6e99", label="as it is: windows from 1,025")
    axis.axhline(5, color="#c8102e", linewidth=0.8)
    axis.annotate("5 %", (tokens[-1], 5), textcoords="offset points", xytext=(0, 4), color="#c8102e", ha="right")
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [f"{n:,}" for n in tokens])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens")
    axis.set_ylabel("merging, % of the encoder's time")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()
    figure.savefig(RESULTS / "hot_path.png", dpi=130)


if __name__ == "__main__":
    main()
