"""Cells of equal pixels: how many a page has, what leaving them out saves, and how far the rest then drifts.

    python benchmarks/pixels.py                          # writes benchmarks/results/pixels.{json,md}
    python benchmarks/pixels.py --parts shares drift     # without the times, which take minutes

*Shares*: pages and screens that `pages.py` draws, 1000×1300 pixels, and photographs, as `transformers`' image processor
of Qwen's models gives them to the tower: cells left at tolerances of 0 to 0.2 (a level of 255 is 0.015 of what the
model gets). In Qwen2.5-VL cells stand for each other within its windows; beside it, what were left without that.

*Times*: process CPU time of two blocks of the towers of Qwen2.5-VL and Qwen3-VL and of the prefill of two layers of
their language models (the widths of the 3B and 4B models, random weights, fp32), versions in turn. Blocks and layers
add up, so that their ratios are nearly those of whole models.

*Drift*: CLIP ViT-B/16 with patches of equal pixels left out in front of its first block, of pages of 224 and 448
pixels; 1 − cosine of the image embedding to that of all patches, beside how far apart the embeddings of two pages of
one kind are. A token that stands for others counts as one in attention, as in turbovlm, or as so many (log s); and has
its own embedding, as in turbovlm, or the mean of those that it stands for, which differ by their positions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from cases import RESULTS, described, load, machine, save
from pages import PAGES, as_jpeg, photograph
from torch import Tensor

import turbovlm
from turbovlm.encoder import block as block_module
from turbovlm.encoder.entrance import enter
from turbovlm.encoder.reading import Asked, asking
from turbovlm.encoder.state import State
from turbovlm.ops.pixels import predicted, predicted_in_sequence

SEEDS = 4
TOLERANCES = (0.0, 0.02, 0.05, 0.1, 0.2)
IMAGE, WORDS = 1999, 64
TIMES = ("Qwen2.5-VL", "Qwen3-VL")
TIMED = ("text", "settings screen", "photograph")
PICTURES = {
    **PAGES,
    "text, as JPEG": lambda width, height, seed: as_jpeg(PAGES["text"](width, height, seed)),
    "settings screen, as JPEG": lambda width, height, seed: as_jpeg(PAGES["settings screen"](width, height, seed)),
    "photograph": photograph,
}
WAYS = {
    "counts as one": (False, False),
    "counts as so many": (True, False),
    "counts as one, mean": (False, True),
    "counts as so many, mean": (True, True),
}
"""Whether log s is added, and whether embeddings are averaged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="forwards of each version (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = load(RESULTS / "pixels.json") | {"machine": machine()}
    for name in args.parts:
        with torch.inference_mode():
            results[name] = PARTS[name](args.rounds)
        save(RESULTS / "pixels.json", results)
    (RESULTS / "pixels.md").write_text(report(results))
    print(report(results))


def processed(image: Any, patch: int) -> tuple[Tensor, Tensor]:
    """Pixels and grid as the library's processor gives them."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    found = Qwen2VLImageProcessor(patch_size=patch)(images=[image], return_tensors="pt")
    return found["pixel_values"], found["image_grid_thw"]


def shares(rounds: int) -> dict[str, Any]:
    """Of each kind of picture: cells, and the shares left at each tolerance."""
    found: dict[str, Any] = {}
    for name, draw in PICTURES.items():
        of: dict[str, list[float]] = {}
        count = []
        for seed in range(SEEDS):
            picture = draw(1000, 1300, seed)
            for model, patch, window in (("Qwen2.5-VL", 14, 4), ("without windows", 14, 0), ("Qwen3-VL", 16, 0)):
                pixels, grid = processed(picture, patch)
                cells = pixels.reshape(len(pixels) // 4, -1)
                count += [len(cells)] * (model == "Qwen2.5-VL")
                for tolerance in TOLERANCES:
                    standing = predicted_in_sequence(cells, grid // torch.tensor([1, 2, 2]), tolerance, window)
                    of.setdefault(f"{model}, {tolerance:g}", []).append(len(standing.unique()) / len(cells))
        found[name] = {"cells": statistics.mean(count), "left": {key: statistics.mean(v) for key, v in of.items()}}
        print(name, found[name], flush=True)
    return found


def times(model: Any, patch: int, rounds: int) -> dict[str, Any]:
    """Seconds of the tower and of the prefill, whole and with what is equal left out."""
    found: dict[str, Any] = {}
    for kind in TIMED:
        pixels, grid = processed(PICTURES[kind](560, 728, 0), patch)
        inputs = prompt(len(pixels) // 4) | {"pixel_values": pixels, "image_grid_thw": grid}
        found[kind] = in_turn(model, inputs, rounds)
        print(kind, found[kind], flush=True)
    return found


def in_turn(model: Any, inputs: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    cells = len(inputs["pixel_values"]) // 4
    found: dict[str, Any] = {"cells": cells, "left": cells, "seconds": {}}
    words = {name: value for name, value in inputs.items() if name != "pixel_values"}
    for turn in range(rounds + 1):
        for way in ("whole", "left out"):
            handle = turbovlm.apply(model, pixel_tolerance=0) if way == "left out" else None
            start = time.process_time()
            encoded = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
            middle = time.process_time()
            model(**words, mm_encoder_outputs={"image": encoded}, logits_to_keep=1)
            end = time.process_time()
            if handle is not None:
                found["left"] = handle.visual[0].kept.shape[1]
                handle.remove()
            if turn > 0:
                found["seconds"].setdefault(f"tower, {way}", []).append(middle - start)
                found["seconds"].setdefault(f"prefill, {way}", []).append(end - middle)
    return found


def prompt(tokens: int) -> dict[str, Tensor]:
    ids = torch.cat([torch.full((tokens,), IMAGE), torch.arange(100, 100 + WORDS)]).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int()}


def qwen2_5() -> tuple[Any, int]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    vision |= {"out_hidden_size": 2048, "fullatt_block_indexes": [1]}
    text = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2}
    text |= {"num_hidden_layers": 2, "vocab_size": 2000, "max_position_embeddings": 4096}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=IMAGE - 1)
    return _seeded(Qwen2_5_VLForConditionalGeneration, config), 14


def qwen3() -> tuple[Any, int]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "out_hidden_size": 2560}
    vision |= {"deepstack_visual_indexes": [0]}
    text = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8}
    text |= {"num_hidden_layers": 2, "vocab_size": 2000, "max_position_embeddings": 4096, "head_dim": 128}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6}}
    config = Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=IMAGE - 1)
    return _seeded(Qwen3VLForConditionalGeneration, config), 16


def _seeded(make: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return make(config).eval()


def drift(rounds: int) -> dict[str, Any]:
    """Of each kind of page and size: patches left, and the drift of each way."""
    from turbovlm_lab.zoo import clip

    model, found = clip.load_clip(), {}
    for side in (224, 448):
        for name, draw in PAGES.items():
            pixels = clip.preprocess([draw(side, side, seed) for seed in range(SEEDS)], side)
            found[f"{name}, {side}"] = drift_of(model, pixels)
            print(name, side, found[f"{name}, {side}"], flush=True)
    return found


def drift_of(model: Any, pixels: Tensor) -> dict[str, Any]:
    known = {"interpolate_pos_encoding": True}
    whole = F.normalize(model(pixels, **known).image_embeds, dim=-1)
    pairs = [(i, j) for i in range(len(whole)) for j in range(i)]
    apart = statistics.mean(float(1 - whole[i] @ whole[j]) for i, j in pairs)
    side = pixels.shape[-1] // 16
    drifts: dict[str, list[float]] = {way: [] for way in WAYS}
    left = []
    for image, wanted in zip(pixels, whole):
        patches = image.view(3, side, 16, side, 16).permute(1, 3, 0, 2, 4).reshape(side * side, -1)
        patch = predicted(patches, (1, side, side), 0.0)
        left.append(len(patch.unique()) / len(patch))
        standing = torch.cat([torch.zeros(1, dtype=torch.int64), patch + 1])
        for way, (counts, mean) in WAYS.items():
            block_module.enter = counted if counts else enter
            with turbovlm.apply(model, r=0) as handle:
                feature = handle.features[0]
                block = model.get_submodule(feature.names[0])  # type: ignore[attr-defined]
                hook = block.register_forward_pre_hook(averages(standing)) if mean else None
                asked = Asked(feature, frozenset(), standing=standing)  # type: ignore[arg-type]
                with asking(asked):
                    out = F.normalize(model(image.unsqueeze(0), **known).image_embeds[0], dim=-1)
                if hook is not None:
                    hook.remove()
            block_module.enter = enter
            drifts[way].append(float(1 - out @ wanted))
    return {"left": statistics.mean(left), "apart": apart, "drift": {k: statistics.mean(v) for k, v in drifts.items()}}


def counted(feature: Any, state: State, hidden: Tensor, standing: Tensor) -> tuple[Tensor, State]:
    """`enter`, where a token that stands for others counts as so many."""
    left, state = enter(feature, state, hidden, standing)
    sizes = torch.bincount(state.merges[0].source[0], minlength=left.shape[1]).unsqueeze(0).to(left.dtype)
    return left, state.changed(sizes=sizes)


def averages(standing: Tensor) -> Any:
    """A hook that gives each token the mean of all that one token stands for."""

    def hook(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0][0]
        counts = torch.bincount(standing, minlength=len(hidden)).clamp(min=1).unsqueeze(1)
        means = torch.zeros_like(hidden).index_add_(0, standing, hidden) / counts
        return means[standing].unsqueeze(0), *args[1:]

    return hook


PARTS = {
    "shares": shares,
    "drift": drift,
    "Qwen2.5-VL": lambda rounds: times(*qwen2_5(), rounds),
    "Qwen3-VL": lambda rounds: times(*qwen3(), rounds),
}


def report(results: dict[str, Any]) -> str:
    lines = ["# Cells of equal pixels", "", described(results["machine"]), ""]
    if "shares" in results:
        lines += [f"Cells left, of {SEEDS} pictures of each kind, 1000×1300 pixels before the processor.", ""]
        heads = ["picture", "cells"]
        heads += [f"Qwen2.5-VL, {tolerance:g}" for tolerance in TOLERANCES]
        heads += ["without windows, 0", "Qwen3-VL, 0", "Qwen3-VL, 0.05"]
        lines += table(
            heads,
            (
                [name, f"{found['cells']:.0f}", *(f"{found['left'][head]:.0%}" for head in heads[2:])]
                for name, found in results["shares"].items()
            ),
        )
    timed = [(f"{name}, {kind}", one) for name in TIMES for kind, one in results.get(name, {}).items()]
    if timed:
        lines += ["Two blocks of the tower and two layers of prefill, medians, s of CPU time; tolerance 0.", ""]
        heads = ["", "tokens", "left", "tower", "left out", "speed-up", "prefill", "left out", "speed-up"]
        rows = []
        for name, found in timed:
            row = [name, str(found["cells"]), str(found["left"])]
            for part in ("tower", "prefill"):
                own, less = (statistics.median(found["seconds"][f"{part}, {way}"]) for way in ("whole", "left out"))
                row += [f"{own:.2f}", f"{less:.2f}", f"**{own / less:.2f}×**"]
            rows.append(row)
        lines += table(heads, rows)
    if "drift" in results:
        lines += ["Drift of CLIP's image embedding, and how far apart two pages of one kind are.", ""]
        rows = [
            [
                name,
                f"{found['left']:.0%}",
                f"{found['apart']:.4f}",
                *(f"{each:.4f}" for each in found["drift"].values()),
            ]
            for name, found in results["drift"].items()
        ]
        lines += table(["page", "patches left", "two pages", *WAYS], rows)
    return "\n".join(lines)


def table(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


if __name__ == "__main__":
    main()
