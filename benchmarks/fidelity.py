"""What the fast ways cost in fidelity, on the pretrained ViT-S/14 of `turbovlm_lab.zoo` and photographs.

    python benchmarks/fidelity.py                       # writes benchmarks/results/fidelity.{json,md}

Decisions: in an fp32 forward, every block's choice is made a second time from queries and keys rounded to bf16 or fp16;
counted are the merged tokens that would not have gone, or not into the same partner. Drift: 1 − cosine between the
final CLS and the fp32 model's own, the photographs' mean feature taken off; in bf16 once with PyTorch's fused attention
and once with plain products (`turbovlm.ops.plain.stored_attention`). Windows: drift at 518 pixels (1,370 tokens), where
`partition="random"` merges within windows, beside the same halves without windows.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from cases import RESULTS, described, machine, save
from torch import Tensor

import turbovlm
from turbovlm import TurboConfig
from turbovlm.encoder import block as engine
from turbovlm.ops import partition, plain
from turbovlm_lab.demo.photos import load_photos
from turbovlm_lab.zoo import load_saliency_vit, preprocess

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAST_PRODUCTS = {"fused": False, "plain products": True}
"""How bfloat16 attends: by PyTorch's fused attention, or by plain products."""
SETTINGS = ((224, 16), (518, 64))
"""Pixels and r."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model = load_saliency_vit().backbone
    photos = [photo.image for photo in load_photos()]
    results: dict[str, Any] = {"machine": machine(), "photos": len(photos)}
    results["decisions"] = [
        {"pixels": size, "r": r, "dtype": name, **decisions(model, preprocess(photos, size), r, dtype)}
        for size, r in SETTINGS
        for name, dtype in LOW.items()
    ]
    results["drift"] = drifts(model, preprocess(photos))
    results["windows"] = windows(model, preprocess(photos, 518))
    save(RESULTS / "fidelity.json", results)
    (RESULTS / "fidelity.md").write_text(report(results))
    print(report(results))


def decisions(model: nn.Module, pixels: Tensor, r: int, dtype: torch.dtype) -> dict[str, float]:
    """Share of the merged tokens with another fate: over all blocks, and in the block where it is largest."""
    ranked_by, merge = engine._ranked_by, engine._merge
    rounded: list[Any] = []
    shares: dict[int, list[float]] = {}

    def both_ranked_by(path: Any, feature: Any, state: Any, heads: Any) -> Any:
        low = {name: getattr(heads, name) for name in ("q", "k", "content", "bias")}
        low = {name: None if value is None else value.to(dtype) for name, value in low.items()}
        rounded.append(ranked_by(path, feature, state, replace(heads, **low)))
        return ranked_by(path, feature, state, heads)

    def both_merges(path: Any, feature: Any, index: int, state: Any, r: int, x: Tensor, *exact: Any) -> Any:
        found = merge(path, feature, index, state, r, x, *exact)
        other = merge(path, feature, index, state, r, x, *rounded.pop())
        fate, other_fate = (_destinations(each[1].merges[-1]) for each in (found, other))
        src = found[1].merges[-1].src
        shares.setdefault(index, []).append(float((fate.gather(1, src) != other_fate.gather(1, src)).float().mean()))
        return found

    engine._ranked_by, engine._merge = both_ranked_by, both_merges
    try:
        with turbovlm.apply(model, TurboConfig(r, blocks="every")), torch.inference_mode():
            for chunk in pixels.split(4):
                model(pixel_values=chunk)
    finally:
        engine._ranked_by, engine._merge = ranked_by, merge
    means = [sum(values) / len(values) for values in shares.values()]
    return {"share": sum(means) / len(means), "worst_block": max(means)}


def _destinations(merge: Any) -> Tensor:
    """For each token, the token in whose place it now lies, `[batch, N]`."""
    return merge.kept.gather(1, merge.source)


def drifts(model: nn.Module, pixels: Tensor) -> dict[str, float]:
    """Mean drift by dtype, attention and r."""
    exact = _cls(model, pixels, None)
    found = {"fp32, r=16": _drift(_cls(model, pixels, TurboConfig(16, blocks="every")), exact)}
    for name, dtype in LOW.items():
        low = copy.deepcopy(model).to(dtype)
        found[f"{name}, the model itself"] = _drift(_cls(low, pixels, None), exact)
        for r in (1, 16):
            for way, fast in FAST_PRODUCTS.items() if name == "bf16" else [("fused", False)]:
                with _attending_by(fast):
                    found[f"{name}, r={r}, {way}"] = _drift(_cls(low, pixels, TurboConfig(r, blocks="every")), exact)
    return found


def windows(model: nn.Module, pixels: Tensor) -> dict[str, dict[str, float]]:
    """Drift with windows and without, and their paired difference over the photographs."""
    exact, found = _cls(model, pixels, None), {}
    before = partition.WINDOWED_FROM
    for r in (16, 64):
        with_windows = _each_drift(_cls(model, pixels, TurboConfig(r, blocks="every")), exact)
        partition.WINDOWED_FROM = 10**9
        try:
            without = _each_drift(_cls(model, pixels, TurboConfig(r, blocks="every")), exact)
        finally:
            partition.WINDOWED_FROM = before
        difference = with_windows - without
        found[f"r={r}"] = {
            "windows": float(with_windows.mean()),
            "all pairs": float(without.mean()),
            "difference": float(difference.mean()),
            "standard_error": float(difference.std() / len(difference) ** 0.5),
        }
    return found


@contextmanager
def _attending_by(fast: bool) -> Iterator[None]:
    before = plain.FAST_BFLOAT16_PRODUCTS
    plain.FAST_BFLOAT16_PRODUCTS = fast
    try:
        yield
    finally:
        plain.FAST_BFLOAT16_PRODUCTS = before


def _cls(model: Any, pixels: Tensor, config: TurboConfig | None) -> Tensor:
    dtype = next(model.parameters()).dtype
    handle = None if config is None else turbovlm.apply(model, config)
    with torch.inference_mode():
        chunks = [model(pixel_values=chunk.to(dtype)).last_hidden_state[:, 0] for chunk in pixels.split(4)]
    if handle is not None:
        handle.remove()
    return torch.cat(chunks).float()


def _each_drift(cls: Tensor, exact: Tensor) -> Tensor:
    mean = exact.mean(0)
    return 1 - torch.cosine_similarity(cls - mean, exact - mean, dim=-1)


def _drift(cls: Tensor, exact: Tensor) -> float:
    return float(_each_drift(cls, exact).mean())


def report(results: dict[str, Any]) -> str:
    """Everything as tables in Markdown."""
    lines = ["# What the fast ways cost in fidelity", "", described(results["machine"]), ""]
    lines += [f"{results['photos']} photographs, the pretrained ViT-S/14.", ""]
    lines += ["## Merged tokens whose fate rounding changes", ""]
    lines += ["| pixels | r | queries and keys in | mean over blocks | worst block |", "|--:|--:|---|--:|--:|"]
    for row in results["decisions"]:
        shares = f"{row['share']:.2%} | {row['worst_block']:.2%}"
        lines.append(f"| {row['pixels']} | {row['r']} | {row['dtype']} | {shares} |")
    lines += ["", "## Drift of CLS from the fp32 model's, 224 pixels", "", "| | drift |", "|---|--:|"]
    lines += [f"| {name} | {value:.5f} |" for name, value in results["drift"].items()]
    lines += ["", "## Windows, 518 pixels", "", "| | windows | all pairs | difference | standard error |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for name, row in results["windows"].items():
        cells = (row[key] for key in ("windows", "all pairs", "difference", "standard_error"))
        lines.append(f"| {name} | " + " | ".join(f"{value:.5f}" for value in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
