"""What else merging could be: features, pairs, degrees, weights, sizes, rounds and schedules, at equal cost.

    python studies/photos/prepare.py          # 256 photographs, fetched
    python studies/design_space/study.py      # 20 minutes on two cores

Every design merges in a real pretrained ViT-S/14 at the same multiply-accumulates, and is measured by what it hands on:

- on 256 photographs, the saliency model (12 blocks): drift (1 − cosine, the mean image taken off both) of CLS and of
  the patches' tokens at every position, and the IoU of the salient region;
- on 128 images of the built-in tasks (10 blocks): drift of the dual encoder's vectors, and of the tokens that the
  scene reader is given.

Differences to the default are paired, image by image, ± their standard error. The photographs' odd and even halves
are reported apart: what is better by chance on one is not on the other. Writes report.md, results.json and a plot to
benchmarks/results/design_space.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from merging import Design, merged_tokens
from PIL import ImageOps
from rich.progress import track
from torch import Tensor

from turbovlm.calibration.schedule_search import EncoderCost
from turbovlm.calibration.subject import Spread
from turbovlm.encoder.schedule import EncoderShape
from turbovlm_lab.demo.result import describe_machine
from turbovlm_lab.demo.saliency import overlap, salient_region
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.zoo import load_saliency_vit, preprocess
from turbovlm_lab.zoo.dual_encoder import load_dual_encoder
from turbovlm_lab.zoo.reader import load_scene_reader

sys.path.insert(0, str(Path(__file__).parents[1] / "photos"))
from prepare import load_photos

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "design_space"
FLOPS, SIDE, TOKENS, BATCH, SCENES = 0.6, 224, 257, 16, 128
MEASURES = ("CLS", "patches", "salient IoU", "dual encoder", "reader's tokens")
DEFAULT, TOME = "default", "ToMe"
KEYS = {"features": "keys", "pairs": "alternate", "reduce": "mean"}
DESIGNS: Mapping[str, Mapping[str, Design]] = {
    "published": {
        TOME: Design(**KEYS, degree="redundancy"),
        "Turbo as run, α=180": Design(**KEYS, degree="difference", alpha=180),
        "Turbo as printed, α=6": Design(**KEYS, degree="difference", alpha=6),
        "Turbo, R/A": Design(**KEYS, degree="division"),
        "random": Design(**KEYS, degree="random"),
    },
    "the default, and one thing changed: what is compared": {
        DEFAULT: Design(),
        "queries": Design(features="queries"),
        "values": Design(features="values"),
        "keys, mean of heads": Design(features="keys"),
        "keys less the picture's mean": Design(features="centred"),
        "the MLP's input": Design(features="hidden"),
        "the tokens": Design(features="tokens"),
    },
    "who may be merged into whom": {
        "even and odd": Design(pairs="alternate"),
        "less into more important half": Design(pairs="important"),
        "into any more important": Design(pairs="order"),
        "any pair, best first": Design(pairs="any"),
        "two rounds per block": Design(rounds=2),
        "four rounds per block": Design(rounds=4),
    },
    "how tokens are ranked": {
        "R alone": Design(degree="redundancy"),
        "−A alone": Design(degree="semantics"),
        "R − 2A": Design(degree="difference", alpha=2),
        "R − 20A": Design(degree="difference", alpha=20),
        "α=½": Design(alpha=0.5),
        "α=4": Design(alpha=4),
        "A instead of its root": Design(degree="weighted, not the root"),
        "A times the value's length": Design(weight="value"),
        "A of all queries": Design(weight="received"),
        "weighed at both ends": Design(degree="both ends"),
        "pairs scored at both ends": Design(degree="pairwise"),
        "Ward's cost": Design(degree="Ward"),
        "Ward's cost, pairs scored": Design(degree="pairwise Ward"),
        "Ward's cost, the MLP's input": Design(degree="Ward", features="hidden"),
    },
    "how they are merged": {
        "plain means": Design(reduce="mean"),
        "dropped": Design(reduce="prune"),
        "without log s": Design(proportional=False),
    },
}


def shape_of(depth: int) -> EncoderShape:
    """Of a ViT-S/14; comparing is counted apart."""
    width = 384
    return EncoderShape(
        attention_weights=(4 * width**2,) * depth,
        mlp_weights=(8 * width**2,) * depth,
        attention_widths=(width,) * depth,
        hidden_size=width,
        similarity_width=(0,) * depth,
        patch_weights=3 * 14**2 * width,
        prefix=1,
    )


def _shares(depth: int) -> Mapping[str, Spread]:
    """Spread of what there is that each block takes, before they are scaled to the cost."""
    middle = (depth - 1) / 2
    return {
        "every block the same share": (1.0,) * depth,
        "more and more": tuple(1 + (block - middle) / middle for block in range(depth)),
        "less and less": tuple(1 - (block - middle) / middle for block in range(depth)),
        "the first half only": tuple(float(block < depth // 2) for block in range(depth)),
        "the second half only": tuple(float(block >= depth // 2) for block in range(depth)),
        "every third block": tuple(float(block % 3 == 0) for block in range(depth)),
        "the first block only": (1.0,) + (0.0,) * (depth - 1),
    }


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, its images, and what it hands on of its tokens: vectors, or regions where a name is in `regions`."""

    model: Any
    pixels: Tensor
    own: Tensor
    reads: Mapping[str, Any]
    regions: tuple[str, ...] = ()

    def amounts(self, shares: Spread | None) -> list[int] | None:
        encoder = EncoderCost(shape_of(self.model.config.num_hidden_layers), TOKENS)
        found = encoder.amounts(encoder.even() if shares is None else shares, FLOPS)
        return None if found is None else list(found)

    def measure(self, design: Design, amounts: list[int]) -> tuple[dict[str, Tensor], int]:
        done = [merged_tokens(self.model, chunk, amounts, design) for chunk in self.pixels.split(BATCH)]
        tokens = torch.cat([each for each, _ in done])
        found = {}
        for name, read in self.reads.items():
            seen, own = read(tokens), read(self.own)
            if name in self.regions:
                found[name] = overlap(seen, own)
                continue
            mean = own.mean(0)
            drift = 1 - torch.cosine_similarity(seen - mean, own - mean, dim=-1)
            found[name] = drift if drift.ndim == 1 else drift.mean(1)
        return found, done[0][1]


def subjects() -> list[Subject]:
    saliency = load_saliency_vit()
    photos = preprocess([ImageOps.fit(photo, (SIDE, SIDE)) for photo in load_photos()], SIDE)
    reads = {
        "CLS": operator.itemgetter((slice(None), 0)),
        "patches": lambda tokens: tokens[:, 1:],
        "salient IoU": lambda tokens: torch.cat(
            [salient_region(saliency.head(some[:, 1:])) for some in tokens.split(BATCH)]
        ),
    }
    dual, reader = load_dual_encoder(), load_scene_reader()
    images = [sample.images[0].open() for task in ("retrieval", "captioning") for sample in DATA[task](64).samples]
    scenes = preprocess([image.resize((SIDE, SIDE)) for image in images], SIDE)
    read_scenes = {
        "dual encoder": lambda tokens: dual.vision.classifier(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], -1)),
        "reader's tokens": lambda tokens: reader.connector(tokens),
    }
    return [
        Subject(saliency.backbone, photos, _own(saliency.backbone, photos), reads, ("salient IoU",)),
        Subject(reader.encoder, scenes, _own(reader.encoder, scenes), read_scenes),
    ]


def _own(model: Any, pixels: Tensor) -> Tensor:
    return torch.cat([model(pixel_values=chunk).last_hidden_state for chunk in pixels.split(BATCH)])


def main() -> None:
    start = time.perf_counter()
    with torch.inference_mode():
        asked = subjects()
        cases = [(group, name, design, None) for group, some in DESIGNS.items() for name, design in some.items()]
        depths = {subject.model.config.num_hidden_layers for subject in asked}
        schedules = {name: {depth: _shares(depth)[name] for depth in depths} for name in _shares(12)}
        cases += [("how much in which block", name, Design(), shares) for name, shares in schedules.items()]
        measured = [(group, name, _measured(asked, design, shares)) for group, name, design, shares in track(cases)]
    rows = [(group, name, *found) for group, name, found in measured if found is not None]
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(describe_machine()).items())
    minutes = (time.perf_counter() - start) / 60
    text = report(rows, f"{machine}, {minutes:.0f} minutes")
    (RESULTS / "report.md").write_text(text)
    (RESULTS / "results.json").write_text(json.dumps(_plain(rows), indent=1) + "\n")
    plot(rows)
    print(text)


def _measured(
    asked: list[Subject], design: Design, shares: Mapping[int, Spread] | None
) -> tuple[dict[str, Tensor], float] | None:
    """Each measure of every image, and what comparing costs, as a share of the encoder's multiply-accumulates.

    None where the schedule cannot come to the cost.
    """
    found: dict[str, Tensor] = {}
    compared = []
    for subject in asked:
        depth = subject.model.config.num_hidden_layers
        amounts = subject.amounts(None if shares is None else shares[depth])
        if amounts is None:
            return None
        values, comparing = subject.measure(design, amounts)
        compared.append(comparing / shape_of(depth).macs((TOKENS,) * (depth + 1)))
        found |= values
    return found, compared[0]


Rows = list[tuple[str, str, dict[str, Tensor], float]]


def report(rows: Rows, machine: str) -> str:
    default = next(values for _, name, values, _ in rows if name == DEFAULT)
    lines = ["# The space of designs", "", f"At {FLOPS:.0%} of the encoder's multiply-accumulates. {machine}.", ""]
    lines += ["In brackets the difference to the default, paired, ± its standard error. *Halves*: the mean of drift of"]
    lines += ["CLS and patches on the photographs of odd and of even number. *Comparing*: multiply-accumulates of it,"]
    lines += ["which come on top, as a share of the unmerged encoder's."]
    for group in dict.fromkeys(group for group, *_ in rows):
        lines += ["", f"## {group[0].upper()}{group[1:]}", ""]
        lines += [f"| design | {' | '.join(MEASURES)} | halves | comparing |", "|---|" + "---|" * (len(MEASURES) + 2)]
        for _, name, values, compared in (row for row in rows if row[0] == group):
            cells = [_cell(values.get(measure), default[measure]) for measure in MEASURES]
            both = (values["CLS"] + values["patches"]) / 2
            cells += [f"{both[::2].mean():.4f}, {both[1::2].mean():.4f}", f"{compared:.1%}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Tensor | None, default: Tensor) -> str:
    if values is None:
        return "—"
    difference = values - default
    error = difference.std() / len(difference) ** 0.5
    return f"{values.mean():.4f} ({difference.mean():+.4f} ± {error:.4f})"


def _plain(rows: Rows) -> list[dict[str, Any]]:
    return [
        {
            "group": group,
            "design": name,
            "comparing": compared,
            **{key: round(value.mean().item(), 5) for key, value in values.items()},
        }
        for group, name, values, compared in rows
    ]


def plot(rows: Rows) -> None:
    """The difference of each design to the default, with two standard errors: CLS and patches."""
    import matplotlib.pyplot as plt

    default = next(values for _, name, values, _ in rows if name == DEFAULT)
    figure, axes = plt.subplots(1, 2, figsize=(11, 9), sharey=True, layout="constrained")
    for axis, measure in zip(axes, ("CLS", "patches")):
        base = default[measure].mean()
        for place, (_, _, values, _) in enumerate(rows):
            ratio = values[measure] / base
            error = 2 * (values[measure] - default[measure]).std() / len(ratio) ** 0.5 / base
            axis.errorbar(ratio.mean(), -place, xerr=error, fmt="o", color="#1f77b4", markersize=4)
        axis.axvline(1, color="0.6", linewidth=1)
        axis.set(xscale="log", title=f"drift of {measure} ÷ the default's")
        axis.set_xticks([0.8, 1, 1.5, 2, 4, 8], ["0.8", "1", "1.5", "2", "4", "8"])
        axis.set_xticks([], minor=True)
        axis.set_yticks([-place for place in range(len(rows))], [name for _, name, *_ in rows])
        axis.grid(axis="x", alpha=0.3)
    for suffix in ("png", "svg"):
        figure.savefig(RESULTS / f"designs.{suffix}", dpi=110)


if __name__ == "__main__":
    main()
