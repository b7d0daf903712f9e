"""Which settings keep most of a real ViT's output: the table behind TurboConfig's defaults.

    python benchmarks/defaults.py                      # prints, and writes benchmarks/results/defaults.md and .json

The pretrained ViT-S/14 with its saliency head (`turbovlm.zoo`), on photographs and seeded crops of them. Every setting
merges the same number of tokens in every block, so all rows of one r cost the same but for the similarity's width.
Measured against the full model: drift of CLS (1 − cosine) after block 9 and after the final norm, each with the photos'
mean feature taken off (most of the raw feature is the same for every picture), and IoU of the salient regions.
Differences to ToMe are paired, picture by picture: mean ± standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import turbovlm
from turbovlm import TurboConfig
from turbovlm.demo.photos import load_photos
from turbovlm.demo.result import describe_machine
from turbovlm.demo.run import overlap, salient_region
from turbovlm.zoo import load_saliency_vit, preprocess

RESULTS = Path(__file__).parent / "results"
CROPS = 15
BLOCK = 9
MEASURES = ("drift of CLS, block 9", "drift of CLS, final", "IoU of the salient region")
KEYS = {"similarity": "keys", "partition": "alternate", "order": "partition"}

SETTINGS: dict[str, Callable[[int], TurboConfig]] = {
    "ToMe (redundancy, keys, alternate)": lambda r: TurboConfig(r, degree="redundancy", **KEYS),
    "random": lambda r: TurboConfig(r, degree="random", **KEYS),
    "semantics": lambda r: TurboConfig(r, degree="semantics", **KEYS),
    "paper, as run: α=180": lambda r: TurboConfig.paper(r),
    "paper, as printed: α=6": lambda r: TurboConfig(r, alpha=6, **KEYS),
    "α=2, order spatial": lambda r: TurboConfig(r, alpha=2, **{**KEYS, "order": "spatial"}),
    "redundancy, queries": lambda r: TurboConfig(r, degree="redundancy", **{**KEYS, "similarity": "queries"}),
    "redundancy, hidden": lambda r: TurboConfig(r, degree="redundancy", **{**KEYS, "similarity": "hidden"}),
    "α=2, partition random": lambda r: TurboConfig(r, alpha=2, **{**KEYS, "partition": "random"}),
    "default": TurboConfig,
    "default, seed 1": lambda r: TurboConfig(r, seed=1),
    "default, α=0": lambda r: TurboConfig(r, alpha=0),
    "default, α=4": lambda r: TurboConfig(r, alpha=4),
    "default, α=6": lambda r: TurboConfig(r, alpha=6),
    "default, α=12": lambda r: TurboConfig(r, alpha=12),
    "default, S2": lambda r: TurboConfig(r, degree="coupled_division"),
    "default, partition grid": lambda r: TurboConfig(r, partition="grid"),
    "default, hidden": lambda r: TurboConfig(r, similarity="hidden"),
    "default, queries": lambda r: TurboConfig(r, similarity="queries"),
    "default, not proportional": lambda r: TurboConfig(r, proportional=False),
    "default, prune": lambda r: TurboConfig(r, reduce="prune"),
    "default, guided by the mean query": lambda r: TurboConfig(r, guidance="mean"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, nargs="+", default=[12, 16, 20], help="tokens merged per block")
    parser.add_argument("--crops", type=int, default=CROPS, help="seeded crops of each photograph")
    args = parser.parse_args()
    model, pixels = load_saliency_vit(), preprocess(pictures(args.crops))
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


def pictures(crops: int) -> list[Any]:
    """Each photograph's centre square, and seeded square crops of 40 to 80 % of its side."""
    wholes = [photo for photo in load_photos() if "-" not in photo.name]
    images = [photo.image for photo in wholes]
    for photo in wholes:
        draw = random.Random(photo.name)
        for _ in range(crops):
            side = round(photo.image.width * draw.uniform(0.4, 0.8))
            left, top = (draw.randrange(photo.image.width - side + 1) for _ in range(2))
            images.append(photo.image.crop((left, top, left + side, top + side)))
    return images


def look(model: Any, pixels: Tensor, config: TurboConfig | None) -> tuple[Tensor, Tensor, Tensor]:
    """CLS after block 9 and at the end, `[pictures, width]`, and the salient regions, `[pictures, height, width]`."""
    middle: list[Tensor] = []
    ends, regions = [], []
    block = model.backbone.get_submodule(f"encoder.layer.{BLOCK}")
    hook = block.register_forward_hook(lambda module, args, out: middle.append(out[:, 0].clone()))
    handle = turbovlm.apply(model.backbone, config) if config is not None else None
    for chunk in pixels.split(16):
        tokens = model.backbone(pixel_values=chunk).last_hidden_state
        tokens = handle.restore(tokens) if handle is not None else tokens
        ends.append(tokens[:, 0])
        regions.append(salient_region(model.head(tokens[:, 1:])))
    if handle is not None:
        handle.remove()
    hook.remove()
    norm = model.backbone.layernorm
    return norm(torch.cat(middle)), torch.cat(ends), torch.cat(regions)


def compare(seen: tuple[Tensor, Tensor, Tensor], full: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The three measures of each picture, `[3, pictures]`."""
    drifts = [1 - torch.cosine_similarity(a - b.mean(0), b - b.mean(0), dim=-1) for a, b in zip(seen[:2], full[:2])]
    return torch.stack([*drifts, overlap(seen[2], full[2])])


def summary(rows: dict[tuple[int, str], Tensor], r: int, name: str) -> dict[str, list[float]]:
    values = rows[r, name]
    difference = values - rows[r, next(iter(SETTINGS))]
    return {
        "mean": values.mean(1).tolist(),
        "median": values.median(1).values.tolist(),
        "difference_to_tome": difference.mean(1).tolist(),
        "standard_error": (difference.std(1) / difference.shape[1] ** 0.5).tolist(),
    }


def report(rows: dict[tuple[int, str], Tensor], amounts: list[int], pictures: int, machine: str) -> str:
    lines = ["# What the settings cost", "", f"{pictures} pictures. {machine}", ""]
    for r in amounts:
        lines += [f"## r={r}", "", "| setting | " + " | ".join(MEASURES) + " |", "|---|---|---|---|"]
        for name in SETTINGS:
            s = summary(rows, r, name)
            cells = [
                f"{s['mean'][i]:.4f} ({s['difference_to_tome'][i]:+.4f} ± {s['standard_error'][i]:.4f})"
                for i in range(3)
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
