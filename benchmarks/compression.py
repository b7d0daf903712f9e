"""Turbo on top of model compression: pruned, in 8 bits, in 4 bits; each with merged tokens and without.

    python studies/photos/prepare.py           # 256 photographs, fetched
    python studies/compression/quantise.py     # GPTQ's weights in 4 bits; see there for what it needs
    python benchmarks/compression.py           # on half of the photographs, and 200 images of each task: an hour
    python benchmarks/compression.py --quick   # the whole path, on the demo's photographs and 16 images
    python benchmarks/compression.py --variants none pruned     # some of the variants
    python benchmarks/compression.py --parts compiled tasks     # these alone, beside the last run's rest
    python benchmarks/compression.py --docs    # the last run's tables, put into docs/compression.md

The pretrained ViT-S/14 of turbovlm_lab.zoo is compressed with half of the photographs and measured on the others. All
is compared with the model that is neither compressed nor merged:

- drift: 1 − cosine of CLS and of the patches' tokens at every position, the mean photograph taken off;
- salient IoU on the photographs; the built-in saliency task's score kept, with its 95 % bootstrap interval;
- the score kept on the other built-in tasks, whose models see with the first ten of the encoder's twelve blocks;
- multiply-accumulates, memory of the weights, and process time (interleaved in one process, medians);
- loss over sum: what both lose together, over what compression and Turbo lose alone; for the tasks' scores also the
  difference of the two, with its interval, as the ratio of two small losses says little;
- speed-up over product: the speed-up of both, over the product of the two alone;
- other fate: the share of merged tokens that would not have gone, or not into the same partner, had the compressed
  model's block decided on the same input.

It stops if r=0, or removal, changes one bit of an output, or if one byte of the saved weights differs with tokens
merged or after it. Writes compression.md and compression.json to benchmarks/results; --quick writes
compression_quick.md and compression_quick.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
from collections.abc import Callable
from dataclasses import astuple
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn as nn
from cases import RESULTS, compare_shown, described, load, machine, save
from compressed import BATCH, SEED, VARIANTS, photographs
from compression_tasks import TASKS, ask_tasks, beyond_sum, points, task_lines
from torch import Tensor

import turbovlm
from turbovlm import TurboConfig
from turbovlm.cli.measuring import progress_bar
from turbovlm.encoder import block as engine
from turbovlm.errors import TurboError
from turbovlm.profile.compare import Comparison
from turbovlm.profile.macs import macs
from turbovlm.profile.quantize import weight_bytes
from turbovlm.sharing import twin
from turbovlm_lab.demo.saliency import overlap, salient_region
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.evaluate.builtin_models import _find, zoo_predictor
from turbovlm_lab.evaluate.scoring import scores
from turbovlm_lab.evaluate.statistics import kept
from turbovlm_lab.reproduce.published import Printed, printed_rows
from turbovlm_lab.zoo import load_saliency_vit
from turbovlm_lab.zoo.saliency import SaliencyViT

TASK, IMAGES, FLOPS = "saliency", 200, 0.6
TURBO = TurboConfig(flops=FLOPS, dense=True)
ROUNDS, TIMED = 10, 8
"""Rounds of timing, and photographs in a batch of them."""
QUICK = {"images": 16, "rounds": 2, "timed": 2}
DOCS = Path(__file__).parents[1] / "docs" / "compression.md"
MARKS = ("<!-- measured -->\n", "<!-- end -->\n")
PARTS = ("photographs", "compiled", "tasks")
COMPILED = ("none", "pruned, refitted", "int8 weights", "int8 dynamic")
"""What is timed compiled as well."""
LIBRARIES = ("turbovlm", "torch", "transformers", "torchao", "bitsandbytes", "torch-pruning")
SUM, PRODUCT = 1.3, 0.9
"""Goals: both lose at most 1.3 times the sum of what each loses; their speed-ups multiply, within 10 %."""
LOSSES: dict[str, Callable[[dict[str, Any]], float]] = {
    "CLS": lambda row: fmean(row["CLS"]),
    "patches": lambda row: fmean(row["patches"]),
    "salient IoU": lambda row: 1 - fmean(row["IoU"]),
    "task": lambda row: 1 - row["kept"][0],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="few photographs, images and rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default: %(default)s)")
    parser.add_argument("--docs", action="store_true", help="measure nothing; put the last run's tables into docs")
    args = parser.parse_args()
    name = "compression_quick" if args.quick else "compression"
    if args.docs:
        into_docs(report(load(args.out / f"{name}.json")))
        return
    sizes = QUICK if args.quick else {"images": IMAGES, "rounds": ROUNDS, "timed": TIMED}
    given, held = photographs(args.quick)
    file, names = args.out / f"{name}.json", list(dict.fromkeys(["none", *args.variants]))
    found = load(file) if file.exists() else {}
    try:
        if "photographs" in args.parts:
            found |= measured(load_saliency_vit(), given, held, names, **sizes)
        if "compiled" in args.parts:
            found["compiled"] = compiled(given, held[: sizes["timed"]], names, sizes["rounds"])
        if "tasks" in args.parts:
            found["tasks"] = {"machine": machine(), **asked(given, names, sizes["images"])}
    except TurboError as error:
        parser.error(str(error))
    save(file, found)
    (args.out / f"{name}.md").write_text(report(found))
    print(report(found))


@torch.no_grad()
def compiled(given: Tensor, pixels: Tensor, names: list[str], rounds: int) -> dict[str, Any]:
    """Times of versions that `torch.compile` has been through, the model itself too."""
    backbone: Any = load_saliency_vit().backbone
    variants = {name: VARIANTS[name](backbone, given) for name in names if name in COMPILED}
    times = _timed(variants, pixels, rounds, compile=True)
    rows = [
        {"variant": name, "turbo": turbo, "seconds": list(times.run(_label(name, turbo)).seconds)}
        for name in variants
        for turbo in (False, True)
    ]
    return {"machine": machine(), "timing": times.conditions, "rows": rows}


@torch.no_grad()
def asked(given: Tensor, names: list[str], images: int) -> dict[str, Any]:
    """The other built-in tasks, of every variant that is no mere step to another."""
    backbone: Any = load_saliency_vit().backbone
    names = [name for name in names if name != "pruned"]
    with progress_bar(len(names) * (1 + 2 * len(TASKS)), "asking") as advance:
        variants = {}
        for name in names:
            variants[name] = VARIANTS[name](backbone, given)
            advance(1)
        return {"pictures": images, "rows": ask_tasks(variants, TURBO, images, advance)}


@torch.no_grad()
def measured(
    model: SaliencyViT, given: Tensor, held: Tensor, names: list[str], *, images: int, rounds: int, timed: int
) -> dict[str, Any]:
    """Every variant with tokens merged and without, measured on the photographs `held`."""
    backbone: Any = model.backbone
    with progress_bar(len(names), "compressing") as advance:
        variants = {}
        for name in names:
            variants[name] = VARIANTS[name](backbone, given)
            advance(1)
    own = _seen(model, held, None)
    asked = _Task(model, images)
    scored: dict[tuple[str, bool], tuple[float, ...]] = {}
    rows: list[dict[str, Any]] = []
    with progress_bar(2 * len(names) * (len(held) + images), "measuring") as advance:
        for name, variant in variants.items():
            assert_unharmed(variant, held[:2])
            whole = SaliencyViT(variant, model.head).eval()
            for config in (None, TURBO):
                row: dict[str, Any] = {"variant": name, "turbo": config is not None}
                row |= _costs(variant, held, config)
                row |= _quality(_seen(whole, held, config), own)
                advance(len(held))
                score = scored[name, row["turbo"]] = asked.parts(variant, config)
                row["kept"] = astuple(kept(score, scored["none", False], seed=SEED))
                advance(images)
                if config is not None:
                    row["beyond"] = beyond_sum(score, scored[name, False], scored["none", True], scored["none", False])
                    row["decisions"] = decisions(backbone, variant, held)
                rows.append(row)
    times = _timed(variants, held[:timed], rounds)
    for row in rows:
        row["seconds"] = list(times.run(_label(row["variant"], row["turbo"])).seconds)
    return {
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in LIBRARIES},
        "seed": SEED,
        "photographs": {"given": len(given), "held out": len(held)},
        "task": {"name": TASK, "pictures": images},
        "flops": FLOPS,
        "timing": times.conditions,
        "rows": rows,
    }


def assert_unharmed(model: Any, pixels: Tensor) -> None:
    """r=0 and removal change no bit of the output; no byte of the saved weights differs, merged or after it.

    Raises:
        RuntimeError: one does.
    """
    own, stored = model(pixel_values=pixels).last_hidden_state, _saved(model)
    with turbovlm.apply(model, r=0):
        _demand(torch.equal(model(pixel_values=pixels).last_hidden_state, own), "r=0 changes the output")
    with turbovlm.apply(model, TURBO):
        _demand(not torch.equal(model(pixel_values=pixels).last_hidden_state, own), "nothing was merged")
        _demand(_saved(model) == stored, "the weights saved while tokens are merged differ")
    _demand(torch.equal(model(pixel_values=pixels).last_hidden_state, own), "removal leaves another output")
    _demand(_saved(model) == stored, "the weights saved after removal differ")


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def _saved(model: nn.Module) -> bytes:
    # Of a copy: on CPUs with AVX512-BF16 bitsandbytes packs 4 bits anew, and rounds their scales, when it saves.
    file = io.BytesIO()
    torch.save(copy.deepcopy(model).state_dict(), file)
    return file.getvalue()


def _costs(model: Any, pixels: Tensor, config: TurboConfig | None) -> dict[str, float]:
    with _applied(model, config):
        return {"macs": macs(model, pixel_values=pixels[:1]), "megabytes": weight_bytes(model) / 1e6}


def _applied(model: Any, config: TurboConfig | None) -> Any:
    return contextlib.nullcontext() if config is None else turbovlm.apply(model, config)


def _seen(model: SaliencyViT, pixels: Tensor, config: TurboConfig | None) -> tuple[Tensor, Tensor]:
    """Tokens, `[photographs, 257, width]`, and salient regions."""
    backbone: Any = model.backbone
    with _applied(backbone, config):
        tokens = torch.cat([backbone(pixel_values=chunk).last_hidden_state for chunk in pixels.split(BATCH)])
    regions = [salient_region(model.head(chunk[:, 1:])) for chunk in tokens.split(BATCH)]
    return tokens, torch.cat(regions)


def _quality(seen: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> dict[str, list[float]]:
    mean = own[0].mean(0)
    drift = 1 - torch.cosine_similarity(seen[0] - mean, own[0] - mean, dim=-1)
    found = {"CLS": drift[:, 0], "patches": drift[:, 1:].mean(1), "IoU": overlap(seen[1], own[1])}
    return {name: [round(each, 5) for each in values.tolist()] for name, values in found.items()}


class _Task:
    """The built-in saliency task, asked of any backbone before the pretrained head."""

    def __init__(self, model: SaliencyViT, images: int) -> None:
        self.head, self.data = model.head, DATA[TASK](images)
        prepare = zoo_predictor(TASK, TASK).prepare
        self.prepared = [prepare(sample, None) for sample in self.data.samples]

    def parts(self, backbone: nn.Module, config: TurboConfig | None) -> tuple[float, ...]:
        """The metric of each image."""
        model, found = SaliencyViT(backbone, self.head).eval(), []
        with _applied(backbone, config):
            for start in range(0, len(self.prepared), BATCH):
                found += _find(model, self.prepared[start : start + BATCH])
        return scores(TASK, self.data, found)[0].parts


def decisions(model: Any, compressed: Any, pixels: Tensor) -> float:
    """The share of merged tokens that have another fate by the compressed model's keys, on the same input."""
    merge, shares = engine._attend_and_merge, []

    def both(block: nn.Module, parts: Any, path: Any, feature: Any, index: int, *rest: Any) -> Any:
        found = merge(block, parts, path, feature, index, *rest)
        other_block = compressed.get_submodule(feature.names[index])
        other = merge(other_block, feature.layout.parts(other_block), path, feature, index, *rest)
        own, their = found[1].merges[-1], other[1].merges[-1]
        fates = [each.kept.gather(1, each.source).gather(1, own.src) for each in (own, their)]
        shares.append((fates[0] != fates[1]).float().mean().item())
        return found

    engine._attend_and_merge = both
    try:
        with turbovlm.apply(model, TURBO):
            for chunk in pixels.split(BATCH):
                model(pixel_values=chunk)
    finally:
        engine._attend_and_merge = merge
    return fmean(shares)


def _timed(variants: dict[str, Any], pixels: Tensor, rounds: int, **how: Any) -> Comparison:
    """All in one process, in turn."""

    def become(variant: nn.Module, config: TurboConfig | None, version: nn.Module) -> None:
        version.__dict__.update(twin(variant).__dict__)
        if config is not None:
            turbovlm.apply(version, config)

    versions = {
        _label(name, config is not None): functools.partial(become, variant, config)
        for name, variant in variants.items()
        for config in (None, TURBO)
    }
    return compare_shown(variants["none"], {"pixel_values": pixels}, versions, "timing", rounds, **how)


def _label(variant: str, turbo: bool) -> str:
    return f"{variant}, Turbo" if turbo else variant


def report(found: dict[str, Any]) -> str:
    """Everything as tables in Markdown."""
    photos, task, rows = found["photographs"], found["task"], found["rows"]
    at = {(row["variant"], row["turbo"]): row for row in rows}
    plain = at["none", False]
    machine_says = described(found["machine"])
    more = [f"{name} {number}" for name, number in found["versions"].items() if f"{name} {number}" not in machine_says]
    lines = ["# Turbo on top of compression", "", f"{', '.join([machine_says, *more])}.", ""]
    held, fitted, images = photos["held out"], photos["given"], task["pictures"]
    lines += [
        f"ViT-S/14, seed {found['seed']}; {held} photographs that compression was not fitted on (it was on {fitted}"
    ]
    lines += [f"others); {images} images of the task {task['name']}. Turbo: flops={found['flops']}."]
    lines += [f"Time: {found['timing']}, a shared machine.", ""]
    lines += ["| model | multiply-accumulates | weights, MB | time, s | speed-up | drift of CLS | of patches "]
    lines[-1] += "| salient IoU | score kept |"
    lines.append("|---" * 9 + "|")
    for row in rows:
        cells = [_label(row["variant"], row["turbo"]), f"{row['macs'] / 1e9:.2f} G", f"{row['megabytes']:.1f}"]
        cells += [f"{median(row['seconds']):.3f}", f"{_speedup(plain, row):.2f}×"]
        cells += [f"{fmean(row[name]):.4f}" for name in ("CLS", "patches", "IoU")]
        value, low, high = row["kept"]
        lines.append(f"| {' | '.join([*cells, f'{value:.1%} [{low:.1%}, {high:.1%}]'])} |")
    lines += ["", "## Both together, against each alone", ""]
    lines += [f"- *Loss*: what both lose together, over the sum of what each loses alone; the goal is at most {SUM}."]
    lines += ["- *Beyond*: what both lose of the task's score beyond that sum, in points; below 0, they lose less."]
    lines += [f"- *Speed-up*: of both together, over the product of the two; the goal is {PRODUCT} or more."]
    lines += [
        "- *Other fate*: the share of merged tokens that the compressed model's keys, on the same input, would merge"
    ]
    lines += ["  elsewhere or not at all.", ""]
    lines += [f"| compression | loss: {' | '.join(LOSSES)} | beyond | speed-up | other fate |", "|---" * 8 + "|"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        if name != "none":
            alone, both, turbo = at[name, False], at[name, True], at["none", True]
            cells = [_over(loss(both), loss(alone) + loss(turbo)) for loss in LOSSES.values()]
            cells.append(points(both["beyond"]))
            product = _speedup(plain, alone) * _speedup(plain, turbo)
            cells += [f"{_speedup(plain, both) / product:.2f}", f"{both['decisions']:.1%}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if "compiled" in found:
        lines += _compiled_lines(found["compiled"])
    if "tasks" in found:
        lines += task_lines(found["tasks"]["rows"], _over, SUM)
        lines += ["", f"{found['tasks']['pictures']} images of each. {described(found['tasks']['machine'])}."]
    lines += ["", "## The paper's own rows", "", "Turbo on top of UPop (pruned and retrained) and of GPTQ, as printed."]
    lines += ["Speed-up: over the model itself, on an RTX 3090.", ""]
    lines += ["| table | task | model, data | method | scores | multiply-accumulates | speed-up |", "|---" * 7 + "|"]
    lines += [_printed(row) for row in printed_rows() if row.table < 5 and _compressed(row)]
    return "\n".join(lines) + "\n"


def _compiled_lines(found: dict[str, Any]) -> list[str]:
    at = {(row["variant"], row["turbo"]): row for row in found["rows"]}
    plain, merged = at["none", False], at["none", True]
    lines = ["", "## Compiled", "", f"{found['timing']}; {described(found['machine'])}.", ""]
    lines += ["| compression | alone | with Turbo | over the product |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["variant"] for row in found["rows"]):
        alone, both = (_speedup(plain, at[name, turbo]) for turbo in (False, True))
        product = "" if name == "none" else f"{both / (alone * _speedup(plain, merged)):.2f}"
        lines.append(f"| {name} | {alone:.2f}× | {both:.2f}× | {product} |")
    return lines


def into_docs(text: str) -> None:
    """The report below its title, between the two marks of docs/compression.md."""
    before, rest = DOCS.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    DOCS.write_text(before + MARKS[0] + text.partition("\n")[2] + MARKS[1] + after)


def _compressed(row: Printed) -> bool:
    """Whether it is one of UPop or GPTQ, with Turbo or without."""
    return any(name in row.plugin.lower() for name in ("upop", "gptq"))


def _printed(row: Printed) -> str:
    scored = ", ".join(f"{name} {value:g}" for name, value in row.metrics)
    cells = [str(row.table), row.task, f"{row.model}, {row.dataset}", row.plugin, scored]
    cells += ["" if row.gmacs is None else f"{row.gmacs:g} G", "" if row.speedup is None else f"{row.speedup:.2f}×"]
    return f"| {' | '.join(cells)} |"


def _over(both: float, total: float) -> str:
    """A ratio means nothing where the two lose nothing."""
    return f"{both / total:.2f}" if total > 0.001 else f"{both:.4f} of {total:.4f}"


def _speedup(plain: dict[str, Any], row: dict[str, Any]) -> float:
    return float(median(a / b for a, b in zip(plain["seconds"], row["seconds"])))


if __name__ == "__main__":
    main()
