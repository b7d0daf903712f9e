"""The speed-ups that the Turbo paper prints (Tables 1, 2, 5 and 7), beside ours for the same encoders.

    python benchmarks/paper_speed.py                    # writes benchmarks/results/paper_speed.{json,md}

The paper's are ratios of throughputs on an RTX 3090, of whole models where there is a text part; ours are of the image
encoder on this machine's CPU, fp32, random weights, with the published setting `TurboConfig.paper(r)`. The library runs
BLIP's encoder without fused attention; there ours are over the same encoder on it, and over the library's beside them.
"""

from __future__ import annotations

import argparse
import functools
import gc
from typing import Any

import torch
import torch.nn as nn
from cases import RESULTS, compare_shown, described, load, machine, save

from turbovlm import TurboConfig
from turbovlm.encoder.block import unmerged_forward
from turbovlm.encoder.layout import Layout
from turbovlm.encoder.state import State
from turbovlm.encoder.towers import find_towers
from turbovlm.profile import Quartiles
from turbovlm_lab.costs.paper import ENCODERS, ROWS, PaperRow

SDPA = "on SDPA"
"""The encoder itself, where its library does not run it on fused attention."""
FILE = RESULTS / "paper_speed.json"
TABLE_1 = tuple(
    PaperRow(1, "BLIP-B", "NLVR2", r, False, None, speedup, "blip-384", "printed for two images and the text part")
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
    model, images = build().eval(), torch.randn(batch, 3, size, size)
    amounts = sorted({row.r for row in PRINTED if row.encoder == encoder})
    versions: dict[str, Any] = {f"r={r}": TurboConfig.paper(r) for r in amounts}
    if encoder.startswith("blip-"):
        versions = {SDPA: on_sdpa, **versions}
    comparison = compare_shown(model, images, versions, encoder, rounds, warmup=0)
    del model
    gc.collect()
    return comparison.to_dict()


def on_sdpa(model: nn.Module) -> None:
    """Give every block of the encoder its two halves with fused attention, and no merge between them."""
    for tower in find_towers(model):
        for _, block in tower.blocks:
            block.forward = functools.partial(_unmerged, block, tower.layout, State(0, (), tower.prefix))


def _unmerged(block: nn.Module, layout: Layout, state: State, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return unmerged_forward(block, layout, TurboConfig(r=0), x, state, {})


def report(results: dict[str, Any]) -> str:
    first = next(iter(results.values()))
    lines = ["# The paper's speed-ups, and ours", "", described(first["machine"]), ""]
    lines += [
        f"Ours: batch {first['batch']}, {first['dtype']}, eager, process CPU time, medians of {first['rounds']} "
        "interleaved rounds, over the same encoder on fused attention (SDPA). The library runs BLIP's encoder without: "
        "*over the library's* is what its users gain. r*: deduced, not printed.",
        "",
        "| table, model, data | r | printed | ours | quartiles | MACs | efficiency | over the library's | remark |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in PRINTED:
        runs = {run["name"]: run for run in results[row.encoder]["runs"]}
        run, itself = runs[f"r={row.r}"], runs.get(SDPA, runs["model"])
        ours = Quartiles.of([a / b for a, b in zip(itself["seconds"], run["seconds"])])
        name, amount = f"{row.table} {row.model} {row.dataset}", f"{row.r}{'*' if row.deduced else ''}"
        library = f"{run['speedup']:.2f}×" if SDPA in runs else ""
        lines.append(
            f"| {name} | {amount} | {row.printed_speedup:.2f}× | **{ours.median:.2f}×** "
            f"| {ours.low:.2f}–{ours.high:.2f} | {run['macs_ratio']:.2f}× | {ours.median / run['macs_ratio']:.3f} "
            f"| {library} | {row.remark} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
