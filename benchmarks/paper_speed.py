"""The speed-ups that the Turbo paper prints (Tables 1, 2, 5 and 7), beside ours for the same encoders.

    python benchmarks/paper_speed.py                    # writes benchmarks/results/paper_speed.{json,md}

The paper's are ratios of throughputs on an RTX 3090, of whole models where there is a text part; ours are of the image
encoder on this machine's CPU, fp32, random weights, with the published setting `TurboConfig.paper(r)`.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from cases import RESULTS, compare_shown, described, load, machine, save

from turbovlm import TurboConfig
from turbovlm.profile.paper import ENCODERS, ROWS, PaperRow

FILE = RESULTS / "paper_speed.json"
TABLE_1 = tuple(
    PaperRow(1, "BLIP-B", "NLVR2", r, False, None, speedup, "blip-384", "printed for two pictures and the text part")
    for r, speedup in ((35, 1.56), (45, 1.91))
)
PRINTED = tuple(row for row in (*TABLE_1, *ROWS) if row.r)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    results = load(FILE)
    for encoder in dict.fromkeys(row.encoder for row in PRINTED):
        if encoder not in results:
            results[encoder] = {"machine": machine(), **measure(encoder, args.batch, args.rounds)}
            save(FILE, results)
    (RESULTS / "paper_speed.md").write_text(report(results))
    print(report(results))


def measure(encoder: str, batch: int, rounds: int) -> dict[str, Any]:
    """The encoder with every r that the paper prints for it."""
    size, build = ENCODERS[encoder]
    torch.manual_seed(0)
    model, pictures = build().eval(), torch.randn(batch, 3, size, size)
    amounts = sorted({row.r for row in PRINTED if row.encoder == encoder})
    versions = {f"r={r}": TurboConfig.paper(r) for r in amounts}
    comparison = compare_shown(model, pictures, versions, encoder, rounds, warmup=0)
    del model
    gc.collect()
    return comparison.to_dict()


def report(results: dict[str, Any]) -> str:
    first = next(iter(results.values()))
    lines = ["# The paper's speed-ups, and ours", "", described(first["machine"]), ""]
    lines += [
        f"Ours: batch {first['batch']}, {first['dtype']}, eager, process CPU time, medians of {first['rounds']} "
        "interleaved rounds. r*: deduced, not printed.",
        "",
        "| table, model, data | r | printed | ours | quartiles | MACs | efficiency | remark |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in PRINTED:
        run = next(run for run in results[row.encoder]["runs"] if run["name"] == f"r={row.r}")
        low, high = run["speedup_quartiles"]
        name, amount = f"{row.table} {row.model} {row.dataset}", f"{row.r}{'*' if row.deduced else ''}"
        lines.append(
            f"| {name} | {amount} | {row.printed_speedup:.2f}× "
            f"| **{run['speedup']:.2f}×** | {low:.2f}–{high:.2f} | {run['macs_ratio']:.2f}× | {run['efficiency']:.3f} "
            f"| {row.remark} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
