"""Latency of one image over r, on a real checkpoint: the pretrained ViT-S/14 of `turbovlm_lab.zoo` at 518 pixels.

python benchmarks/latency.py                        # writes benchmarks/results/latency.{json,md,png}
"""

from __future__ import annotations

import argparse
from typing import Any

from cases import DTYPES, RESULTS, compare_shown, described, machine, pooled, save

from turbovlm import TurboConfig
from turbovlm.profile import Comparison
from turbovlm_lab.demo.photos import load_photos
from turbovlm_lab.zoo import load_saliency_vit, preprocess

AMOUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, nargs="+", default=AMOUNTS, help="tokens merged per block, on average")
    parser.add_argument("--rounds", type=int, default=6, help="in each of three fresh processes")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "pixels": 518, "tokens": 1370}
    for dtype in args.dtypes:
        results[dtype] = pooled(measure, dtype, tuple(args.r), args.rounds).to_dict()
    save(RESULTS / "latency.json", results)
    (RESULTS / "latency.md").write_text(report(results))
    plot(results)
    print(report(results))


def measure(dtype: str, amounts: tuple[int, ...], rounds: int) -> Comparison:
    """One process's rounds."""
    pixels = preprocess([load_photos()[0].image], size=518)
    model = load_saliency_vit().backbone.to(DTYPES[dtype])
    configs = [TurboConfig(r) for r in amounts]
    return compare_shown(model, {"pixel_values": pixels.to(DTYPES[dtype])}, configs, dtype, rounds)


def report(results: dict[str, Any]) -> str:
    lines = ["# Latency of one image", "", described(results["machine"]), ""]
    lines += [
        "The pretrained ViT-S/14 at 518 pixels (1,370 tokens), a photograph, batch 1, eager, over r; medians over the "
        "rounds of three fresh processes.",
        "",
    ]
    for dtype in (key for key in ("fp32", "bf16") if key in results):
        rows = results[dtype]["runs"]
        lines += [f"## {dtype}", "", "| | ms | speed-up | quartiles | MACs | efficiency | peak MB |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|"]
        for run in rows:
            low, high = run["speedup_quartiles"]
            seconds = sorted(run["wall_seconds"])[len(run["wall_seconds"]) // 2]
            lines.append(
                f"| {run['name']} | {1e3 * seconds:.0f} | {run['speedup']:.3f}× | {low:.3f}–{high:.3f} "
                f"| {run['macs_ratio']:.3f}× | {run['efficiency']:.3f} | {run['peak_bytes'] / 1e6:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, Any]) -> None:
    """Speed-up over r, beside what arithmetic allows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for dtype, colour in (("fp32", "#0b6e99"), ("bf16", "#e08a1e")):
        if dtype not in results:
            continue
        runs = results[dtype]["runs"][1:]
        amounts = [int(run["name"].removeprefix("r=")) for run in runs]
        axis.plot(amounts, [run["speedup"] for run in runs], "o-", color=colour, label=f"{dtype}, measured")
        low, high = zip(*(run["speedup_quartiles"] for run in runs))
        axis.fill_between(amounts, low, high, color=colour, alpha=0.2, linewidth=0)
        allowed = [run["macs_ratio"] for run in runs]
    axis.plot(amounts, allowed, color="#c8102e", linewidth=1, label="MACs ratio")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xlabel("r: tokens merged in every block, of 1,370")
    axis.set_ylabel("speed-up of one image")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()
    figure.savefig(RESULTS / "latency.png", dpi=130)


if __name__ == "__main__":
    main()
