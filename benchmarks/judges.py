"""Which schedule and which degree keep most at one cost, by several real models at once: how defaults are chosen.

    python studies/photos/prepare.py                     # 256 photographs, fetched
    python benchmarks/judges.py                          # the photographs to choose on
    python benchmarks/judges.py --held-back              # the others
    python benchmarks/judges.py --untouched              # every second of the others, which no search has used
    python benchmarks/judges.py --judges clip --schedules "every block" --degrees ToMe random    # a part of it

Judges: CLIP ViT-B/16's image embedding, its patches at every position, the saliency ViT-S/14's CLS, its patches at
every position, MiniLM's sentence embedding. A setting is a schedule and a degree; the number of tokens that a schedule
merges in each of its blocks is solved, so that all settings of a judge cost alike: `--flops` of the encoder's
multiply-accumulates. Measured is the drift, 1 − cosine to the unmerged model's vector with the inputs' mean taken off
both; of each seed its mean over the inputs. Written are
benchmarks/results/judges{,_held_back,_untouched}{,_50}.{json,md}, _50 for a cost of 50 % instead of 61; what is in the
JSON already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from cases import RESULTS, described, machine, save
from rich.progress import track
from torch import Tensor

import turbovlm
from turbovlm.encoder.schedule import EncoderShape, spread, token_counts

sys.path.insert(0, str(Path(__file__).parents[1] / "studies" / "photos"))
BATCH, USUAL = 16, 0.61
PARTS = {"judges": slice(0, None, 2), "judges_held_back": slice(1, None, 2), "judges_untouched": slice(3, None, 4)}
"""Photographs and sentences: to choose on; the others; and those of the others that no search has used."""
PUBLISHED = {"similarity": "keys", "partition": "alternate", "order": "partition", "reduce": "merge", "restore": "copy"}


@dataclass(frozen=True)
class Judge:
    """A model that people use, what it is asked, and the vectors that are compared.

    Attributes:
        inputs: batches of one size each.
        vectors: what it makes of a batch, `[inputs, width]`, or `[inputs, tokens, width]`, which count alike.
        dense: whether every position is asked for.
    """

    model: nn.Module
    inputs: Sequence[Any]
    vectors: Callable[[Any], Tensor]
    dense: bool = False


def clip_judge(part: slice) -> Judge:
    from turbovlm_lab.zoo import clip

    model = clip.load_clip()
    pixels = clip.preprocess(photographs(part))
    return Judge(model, pixels.split(BATCH), lambda batch: model(pixel_values=batch).image_embeds)


def clip_patches_judge(part: slice) -> Judge:
    judge = clip_judge(part)
    return Judge(
        judge.model, judge.inputs, lambda batch: judge.model(pixel_values=batch).last_hidden_state[:, 1:], True
    )


def saliency_judge(part: slice) -> Judge:
    from turbovlm_lab.zoo import load_saliency_vit, preprocess

    backbone = load_saliency_vit().backbone
    pixels = preprocess(photographs(part))
    return Judge(backbone, pixels.split(BATCH), lambda batch: backbone(pixel_values=batch).last_hidden_state[:, 0])


def patches_judge(part: slice) -> Judge:
    judge = saliency_judge(part)
    return Judge(
        judge.model, judge.inputs, lambda batch: judge.model(pixel_values=batch).last_hidden_state[:, 1:], True
    )


def minilm_judge(part: slice) -> Judge:
    """Sentences one by one, so that no padding is merged for nothing."""
    from text import sentences

    from turbovlm_lab.zoo import load_minilm

    model = load_minilm()
    texts = [text for text in sentences() if len(text.split()) >= 12][part][:200]
    return Judge(model, [model.tokens([text]) for text in texts], lambda batch: model(**batch))


JUDGES = {
    "clip": clip_judge,
    "clip patches": clip_patches_judge,
    "saliency": saliency_judge,
    "patches": patches_judge,
    "minilm": minilm_judge,
}


def photographs(part: slice) -> list[Any]:
    """Of those that studies/photos fetches."""
    from prepare import load_photos

    return load_photos()[part]


def blocks_from(share: float) -> Callable[[int], list[int]]:
    """Every block from that share of the depth on."""
    return lambda depth: list(range(round(share * depth), depth))


def blocks_spread(count: int, first: float, last: float) -> Callable[[int], list[int]]:
    """As many blocks, evenly spread between two shares of the depth."""
    return lambda depth: sorted({round(depth * (first + (last - first) * i / max(count - 1, 1))) for i in range(count)})


SCHEDULES: dict[str, Callable[[int], list[int]]] = {
    "every block": blocks_from(0),
    "every second block": lambda depth: list(range(0, depth, 2)),
    "from a sixth on": blocks_from(1 / 6),
    "from a quarter on": blocks_from(1 / 4),
    "from a third on": blocks_from(1 / 3),
    "four merges": blocks_spread(4, 1 / 4, 9 / 12),
    "second third": lambda depth: list(range(round(depth / 3), round(2 * depth / 3))),
    "one block earlier as well": lambda depth: list(range(round(depth / 4), round(2 * depth / 3))),
}
"""Blocks that merge, by the depth; each merges as many tokens as the others. With `flops=`, all pairs of CLIP's tokens
merge in the second third, or one block earlier as well, by default, those of other images in every second block, and
halves of text in every one."""

DEGREES: dict[str, dict[str, Any]] = {
    "ToMe": {"degree": "redundancy", **PUBLISHED},
    "one half into the other": {"partition": "random"},
    "all pairs": {"partition": "all"},
    "paper (α=180)": {"degree": "weighted_difference", "alpha": 180, **PUBLISHED},
    "all pairs, R − 10A": {"degree": "weighted_difference", "alpha": 10, "partition": "all"},
    "random": {"degree": "random", "partition": "random"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=list(JUDGES), metavar="NAME")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), metavar="NAME")
    parser.add_argument("--degrees", nargs="+", choices=DEGREES, default=list(DEGREES), metavar="NAME")
    parser.add_argument("--flops", type=float, default=USUAL, help="share of the cost left (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the random halves (default: %(default)s)")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--held-back", action="store_true", help="the inputs that are not there to choose on")
    others.add_argument("--untouched", action="store_true", help="the half of those that no search at all has used")
    args = parser.parse_args()
    part = "judges_held_back" if args.held_back else "judges_untouched" if args.untouched else "judges"
    name = part if args.flops == USUAL else f"{part}_{args.flops:.0%}".rstrip("%")
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"flops": args.flops, "judges": {}}
    found["machine"] = machine()
    for judge_name in args.judges:
        judge = JUDGES[judge_name](PARTS[part])
        known = found["judges"].setdefault(judge_name, {"inputs": sum(map(count, judge.inputs)), "runs": {}})
        with torch.inference_mode():
            whole = vectors_of(judge)
        runs = [(s, d, seed) for s in args.schedules for d in args.degrees for seed in range(seeds_of(d, args.seeds))]
        for schedule, degree, seed in track([run for run in runs if key(*run) not in known["runs"]], judge_name):
            known["runs"][key(schedule, degree, seed)] = measured(judge, whole, schedule, degree, seed, args.flops)
            save(path, found)
    (RESULTS / f"{name}.md").write_text(report(found))
    print(report(found))


def key(schedule: str, degree: str, seed: int) -> str:
    return f"{schedule} | {degree} | {seed}"


def seeds_of(degree: str, seeds: int) -> int:
    """One where nothing is drawn."""
    return seeds if DEGREES[degree].get("partition") == "random" else 1


def count(batch: Any) -> int:
    return len(batch) if isinstance(batch, Tensor) else len(batch["input_ids"])


def first_of(batch: Any) -> Any:
    return batch[:1] if isinstance(batch, Tensor) else {name: values[:1] for name, values in batch.items()}


def vectors_of(judge: Judge) -> Tensor:
    return torch.cat([judge.vectors(batch) for batch in judge.inputs])


def measured(judge: Judge, whole: Tensor, schedule: str, degree: str, seed: int, flops: float) -> dict[str, float]:
    """Drift and cost of one setting."""
    settings = DEGREES[degree] | {"seed": seed, "dense": judge.dense}
    groups: dict[int, list[int]] = {}
    with torch.inference_mode(), turbovlm.apply(judge.model, r=0, **settings) as handle:
        (feature,) = handle.features
        judge.vectors(first_of(judge.inputs[0]))
        images = feature.last.lengths[0]  # tokens of an image of this size, which need not be the native one
    for place, batch in enumerate(judge.inputs):
        groups.setdefault(images if isinstance(batch, Tensor) else batch["input_ids"].shape[1], []).append(place)
    shape = feature.shape
    vectors: dict[int, Tensor] = {}
    ratios: list[float] = []
    blocks = SCHEDULES[schedule](shape.depth)
    for tokens, places in groups.items():
        amounts, ratio = solve(shape, tokens, blocks, flops)
        ratios += [ratio] * sum(count(judge.inputs[place]) for place in places)
        with torch.inference_mode(), turbovlm.apply(judge.model, r=amounts, **settings):
            vectors |= {place: judge.vectors(judge.inputs[place]) for place in places}
    merged, centre = torch.cat([vectors[place] for place in sorted(vectors)]), whole.mean(dim=0)
    drift = 1 - F.cosine_similarity(whole - centre, merged - centre, dim=-1)
    drift = drift if drift.ndim == 1 else drift.mean(dim=1)
    return {
        "drift": float(drift.mean()),
        "standard_error": float(drift.std() / len(drift) ** 0.5),
        "median": float(drift.median()),
        "macs": statistics.mean(ratios),
    }


def solve(shape: EncoderShape, tokens: int, blocks: Sequence[int], flops: float) -> tuple[list[int], float]:
    """Equally many tokens in each of those blocks, by one more or less, of cost closest to the share; and that cost."""
    best, full, ratio = [0] * shape.depth, shape.macs((tokens,) * (shape.depth + 1)), 1.0
    for total in range(len(blocks) * (tokens // 2) + 1):  # more than there are, where blocks give half of theirs
        amounts = dict(zip(blocks, spread(total, len(blocks))))
        listed = [amounts.get(block, 0) for block in range(shape.depth)]
        cost = shape.macs(token_counts(listed, tokens, shape.protected, 0)) / full
        if abs(cost - flops) < abs(ratio - flops):
            best, ratio = listed, cost
    return best, ratio


def report(found: dict[str, Any]) -> str:
    lines = ["# Schedules and degrees by several judges", ""]
    lines += [f"{found['flops']:.0%} of the multiply-accumulates. {described(found['machine'])}"]
    for name, judge in found["judges"].items():
        tome = judge["runs"].get(key("every block", "ToMe", 0), {}).get("drift")
        lines += ["", f"## {name}, {judge['inputs']} inputs", ""]
        if tome is not None:
            lines += [f"Drift as a share of ToMe's in every block, {tome:.4f}; lowest and highest seed.", ""]
        degrees = [degree for degree in DEGREES if any(f" | {degree} | " in run for run in judge["runs"])]
        lines += [f"| schedule | {' | '.join(degrees)} |", "|---|" + "--:|" * len(degrees)]
        for schedule in SCHEDULES:
            cells = [cell(judge["runs"], schedule, degree, tome or 1) for degree in degrees]
            if any(cells):
                lines.append(f"| {schedule} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(runs: dict[str, dict[str, float]], schedule: str, degree: str, unit: float) -> str:
    drifts = [run["drift"] / unit for name, run in runs.items() if name.startswith(f"{schedule} | {degree} | ")]
    if not drifts:
        return ""
    mean = statistics.mean(drifts)
    return f"{mean:.2f}" if len(drifts) == 1 else f"{mean:.2f} ({min(drifts):.2f} to {max(drifts):.2f})"


if __name__ == "__main__":
    main()
