"""Which settings keep most of a real ViT's output: the table behind TurboConfig's defaults.

    python studies/photos/prepare.py                   # 256 photographs, fetched
    python benchmarks/defaults.py                      # prints, and writes benchmarks/results/defaults.md and .json

The pretrained ViT-S/14 with its saliency head (`turbovlm_lab.zoo`), on the middle squares of 256 different photographs.
Every setting merges the same number of tokens in every block, so all rows of one r cost the same but for the width of
what is compared. Measured against the full model: drift (1 − cosine) of CLS, and of the patches' tokens, restored, each
with the photographs' mean taken off; and IoU of the salient regions. Differences to ToMe are paired, image by
image: mean ± standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from rich.progress import track
from torch import Tensor

import turbovlm
from turbovlm import TurboConfig
from turbovlm_lab.demo.result import describe_machine
from turbovlm_lab.demo.saliency import overlap, salient_region
from turbovlm_lab.zoo import load_saliency_vit, preprocess

sys.path.insert(0, str(Path(__file__).parents[1] / "studies" / "photos"))
from prepare import load_photos

RESULTS = Path(__file__).parent / "results"
SIDE = 224
MEASURES = ("drift of CLS", "drift of the patches", "IoU of the salient region")
KEYS = {"similarity": "keys", "partition": "alternate", "order": "partition", "reduce": "merge", "restore": "copy"}
OLD = {"degree": "weighted_difference", "similarity": "keys"}

SETTINGS: dict[str, Callable[[int], TurboConfig]] = {
    "ToMe (redundancy, keys, alternate)": lambda r: TurboConfig(r, blocks="every", degree="redundancy", **KEYS),
    "random": lambda r: TurboConfig(r, blocks="every", degree="random", **KEYS),
    "semantics": lambda r: TurboConfig(r, blocks="every", degree="semantics", **KEYS),
    "paper, as run: α=180": lambda r: TurboConfig.paper(r),
    "paper, as printed: α=6": lambda r: TurboConfig.paper(r, alpha=0.2),
    "E = R − 2A, keys": lambda r: TurboConfig(r, blocks="every", **OLD),
    "E = R − 2A, heads": lambda r: TurboConfig(r, blocks="every", degree="weighted_difference"),
    "E = R, heads": lambda r: TurboConfig(r, blocks="every", degree="redundancy"),
    "default: weighted distance, heads": lambda r: TurboConfig(r, blocks="every"),
    "default, seed 1": lambda r: TurboConfig(r, blocks="every", seed=1),
    "default, α=0.5": lambda r: TurboConfig(r, blocks="every", alpha=0.5),
    "default, α=2": lambda r: TurboConfig(r, blocks="every", alpha=2),
    "default, α=4": lambda r: TurboConfig(r, blocks="every", alpha=4),
    "default, keys": lambda r: TurboConfig(r, blocks="every", similarity="keys"),
    "default, queries": lambda r: TurboConfig(r, blocks="every", similarity="queries"),
    "default, hidden": lambda r: TurboConfig(r, blocks="every", similarity="hidden"),
    "default, partition alternate": lambda r: TurboConfig(r, blocks="every", partition="alternate"),
    "default, partition grid": lambda r: TurboConfig(r, blocks="every", partition="grid"),
    "default, restored by copies": lambda r: TurboConfig(r, blocks="every", restore="copy"),
    "default, not proportional": lambda r: TurboConfig(r, blocks="every", proportional=False),
    "default, plain means": lambda r: TurboConfig(r, blocks="every", reduce="merge"),
    "default, prune": lambda r: TurboConfig(r, blocks="every", reduce="prune"),
    "default, guided by the mean query": lambda r: TurboConfig(r, blocks="every", guidance="mean"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, nargs="+", default=[12, 16, 20], help="tokens merged in every block")
    args = parser.parse_args()
    model = load_saliency_vit()
    pixels = preprocess([ImageOps.fit(photo, (SIDE, SIDE)) for photo in load_photos()], SIDE)
    with torch.inference_mode():
        full = look(model, pixels, None)
        cases = [(r, name) for r in args.r for name in SETTINGS]
        rows = {
            case: compare(look(model, pixels, SETTINGS[case[1]](case[0])), full)
            for case in track(cases, description="settings")
        }
    machine = dataclasses.asdict(describe_machine())
    text = report(rows, args.r, len(pixels), ", ".join(f"{key} {value}" for key, value in machine.items()))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "defaults.md").write_text(text)
    numbers = [{"r": r, "setting": name, **summary(rows, r, name)} for r, name in rows]
    (RESULTS / "defaults.json").write_text(json.dumps({"machine": machine, "rows": numbers}, indent=1) + "\n")
    print(text)


def look(model: Any, pixels: Tensor, config: TurboConfig | None) -> tuple[Tensor, Tensor]:
    """Tokens, `[images, 257, width]`, and salient regions, `[images, height, width]`."""
    ends, regions = [], []
    handle = turbovlm.apply(model.backbone, dataclasses.replace(config, dense=True)) if config is not None else None
    for chunk in pixels.split(16):
        tokens = model.backbone(pixel_values=chunk).last_hidden_state
        ends.append(tokens)
        regions.append(salient_region(model.head(tokens[:, 1:])))
    if handle is not None:
        handle.remove()
    return torch.cat(ends), torch.cat(regions)


def compare(seen: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor]) -> Tensor:
    """The three measures of each image, `[3, images]`."""
    mean = full[0].mean(0)
    drift = 1 - torch.cosine_similarity(seen[0] - mean, full[0] - mean, dim=-1)
    return torch.stack([drift[:, 0], drift[:, 1:].mean(dim=1), overlap(seen[1], full[1])])


def summary(rows: dict[tuple[int, str], Tensor], r: int, name: str) -> dict[str, list[float]]:
    values = rows[r, name]
    difference = values - rows[r, next(iter(SETTINGS))]
    return {
        "mean": values.mean(1).tolist(),
        "median": values.median(1).values.tolist(),
        "difference_to_tome": difference.mean(1).tolist(),
        "standard_error": (difference.std(1) / difference.shape[1] ** 0.5).tolist(),
    }


def report(rows: dict[tuple[int, str], Tensor], amounts: list[int], images: int, machine: str) -> str:
    lines = ["# What the settings cost", "", f"{images} photographs. {machine}", ""]
    for r in amounts:
        lines += [f"## r={r}", "", "| setting | " + " | ".join(MEASURES) + " |", "|---|---|---|---|"]
        for name in SETTINGS:
            s = summary(rows, r, name)
            cells = [
                f"{s['mean'][i]:.4f} ({s['difference_to_tome'][i]:+.4f} ± {s['standard_error'][i]:.4f})"
                for i in range(3)
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", "Medians:", "", "| setting | " + " | ".join(MEASURES) + " |", "|---|---|---|---|"]
        for name in SETTINGS:
            middle = summary(rows, r, name)["median"]
            lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in middle) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
