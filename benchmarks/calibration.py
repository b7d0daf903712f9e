"""What `turbovlm.calibrate` brings, on images that it has not seen.

    python studies/photos/prepare.py            # 256 photographs, fetched
    python benchmarks/calibration.py            # photographs, then the built-in tasks: an hour on two cores
    python benchmarks/calibration.py photos     # the photographs alone

Photographs: half of them are given to `calibrate`, with the pretrained ViT-S/14; on the other half every setting is
measured against the full model: drift (1 − cosine, the mean photograph taken off) of CLS and of the patches' tokens at
every position, and IoU of the salient region. Thresholds cost what they cost on those images; so the default is
measured once more at that cost. The promised bound is tried on 100 random splits of the photographs that were not
searched on: it is taken from one half and has to hold on the other. What is calibrated for a speed-up is timed again.

Tasks: `calibrate` is given 128 images of a built-in task, without answers, and `evaluate` asks 200 others.

Generated images: `calibrate` is given prompts of the built-in text-to-image model; on others its settings stand beside
one `keep` for all resolutions at the same cost.

Writes calibration.md and calibration.json to benchmarks/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor

import turbovlm
from turbovlm import Calibration, DenoiseConfig, TurboConfig
from turbovlm.calibration.bound import upper_bound
from turbovlm.calibration.subjects.denoiser import DenoiserSubject
from turbovlm.calibration.subjects.encoder import EncoderSubject
from turbovlm.cli.measuring import progress_bar
from turbovlm_lab.demo.result import describe_machine
from turbovlm_lab.demo.saliency import overlap, salient_region
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.evaluate.builtin_models import MODELS, zoo_predictor
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.settings import METHODS, OWN, by_method, methods
from turbovlm_lab.evaluate.study import Study, run_study
from turbovlm_lab.zoo import load_saliency_vit, preprocess
from turbovlm_lab.zoo.emoji import emoji_prompts, load_emoji_pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "studies" / "photos"))
from prepare import load_photos

RESULTS = Path(__file__).parent / "results"
SIDE, BATCH, EFFORT, SEED = 224, 16, 40, 0
SHARES = (0.75, 0.6, 0.45)
SPLITS, SPEEDUP, TIMINGS = 100, 1.5, 5
TASKS = ("saliency", "classification", "retrieval", "captioning", "vqa", "nlvr2")
IMAGES, CALIBRATED_ON = 200, 128
PARTS = ("photos", "pictures", "tasks")
MADE, PROMPTS, STEPS = (0.9, 0.8), 64, 10
"""Shares of the denoiser's multiply-accumulates, prompts to calibrate on and as many to look at, denoising steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=PARTS, help="(default: all)")
    args = parser.parse_args()
    file = RESULTS / "calibration.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    machine = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(describe_machine()).items())
    for part in args.parts or PARTS:
        start = time.perf_counter()
        found[part] = {"photos": on_photos, "pictures": on_images, "tasks": on_tasks}[part]()
        found[part]["machine"] = f"{machine}, {(time.perf_counter() - start) / 60:.0f} minutes"
        file.write_text(json.dumps(found, indent=1) + "\n")
        text = report(found)
        (RESULTS / "calibration.md").write_text(text)
    print(text)


def on_photos() -> dict[str, Any]:
    torch.set_grad_enabled(False)
    model = load_saliency_vit()
    pixels = preprocess([ImageOps.fit(photo, (SIDE, SIDE)) for photo in load_photos()], SIDE)
    order = random.Random(SEED).sample(range(len(pixels)), len(pixels))
    given, held = order[: len(order) // 2], order[len(order) // 2 :]
    subject = _subject(model.backbone, pixels)
    own = _seen(model, pixels[held], None)
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        configs: dict[str, TurboConfig] = {name: by_method(TurboConfig(flops=share), name) for name in METHODS}
        for name, per_image in (("calibrated", False), ("calibrated, per image", True)):
            start = time.perf_counter()
            found = _calibrated(model.backbone, pixels[given], f"{share:.0%}, {name}", share, per_image)
            configs[name] = found.config
            if share == 0.6 and not per_image:
                bound = _tried(subject, found, given, held)
            print(f"{name}, {share:.0%}: {time.perf_counter() - start:.0f} s, {configs[name]}", flush=True)
        for name, config in configs.items():
            rows.append({"flops": share, "setting": name, **_measured(model, pixels[held], config, own)})
        cost = rows[-1]["macs"]
        same = TurboConfig(flops=round(cost, 3))
        rows.append({"flops": share, "setting": "default at that cost", **_measured(model, pixels[held], same, own)})
    return {"rows": rows, "bound": bound, "speed": _timed(model.backbone, pixels[given])}


def _subject(model: Any, images: Tensor) -> EncoderSubject:
    return EncoderSubject(model, images, TurboConfig(r=0), frozenset(), SEED, lambda _: None, batch=BATCH)


def _calibrated(
    model: Any, images: Any, what: str, flops: float, per_image: bool = False, **settings: Any
) -> Calibration:
    with progress_bar(len(images) // 2 * (EFFORT + 20), what) as advance:
        return turbovlm.calibrate(
            model, images, flops=flops, per_image=per_image, effort=EFFORT, batch=BATCH, progress=advance, **settings
        )


def _seen(model: Any, pixels: Tensor, config: TurboConfig | None) -> tuple[Tensor, Tensor, float]:
    """Tokens, salient regions, and the share of the encoder's multiply-accumulates."""
    tokens, costs, own_tokens = [], [1.0], 1 + (SIDE // 14) ** 2
    if config is None:
        tokens = [model.backbone(pixel_values=chunk).last_hidden_state for chunk in pixels.split(BATCH)]
    else:
        dense = dataclasses.replace(config, dense=True, trace=config.thresholds is not None)
        with turbovlm.apply(model.backbone, dense) as handle:
            costs = [] if config.thresholds else [handle.schedule(own_tokens).ratio]
            shape = handle.features[0].shape
            for chunk in pixels.split(1 if config.thresholds else BATCH):
                tokens.append(model.backbone(pixel_values=chunk).last_hidden_state)
                if config.thresholds:
                    counts = (tokens[-1].shape[1], *(entry.sizes.shape[1] for entry in handle.trace))
                    costs.append(shape.macs(counts) / shape.macs((counts[0],) * len(counts)))
    seen = torch.cat(tokens)
    return seen, salient_region(model.head(seen[:, 1:])), sum(costs) / len(costs)


def _measured(
    model: Any, pixels: Tensor, config: TurboConfig, own: tuple[Tensor, Tensor, float]
) -> dict[str, float | list[float]]:
    tokens, regions, cost = _seen(model, pixels, config)
    mean = own[0].mean(0)
    drift = 1 - torch.cosine_similarity(tokens - mean, own[0] - mean, dim=-1)
    both = {"CLS": drift[:, 0], "patches": drift[:, 1:].mean(1), "IoU": overlap(regions, own[1])}
    return {"macs": cost, **{name: [round(each, 5) for each in values.tolist()] for name, values in both.items()}}


def _tried(subject: EncoderSubject, found: Calibration, given: list[int], held: list[int]) -> dict[str, Any]:
    """How often a bound from one half of the photographs that were not searched on holds on the other half."""
    count = len(given)
    searched = {given[place] for place in random.Random(SEED).sample(range(count), count)[: count // 2]}
    drift = subject.drift(found.config, [place for place in (*given, *held) if place not in searched]).tolist()
    holds, below = 0, []
    for split in range(SPLITS):
        mixed = random.Random(split).sample(drift, len(drift))
        bound = upper_bound(mixed[: len(mixed) // 2])
        others = mixed[len(mixed) // 2 :]
        below.append(sum(value <= bound.value for value in others) / len(others))
        holds += below[-1] >= int(bound.coverage * len(others)) / len(others)
    promised = sum(value <= found.bound for value in drift[len(drift) - len(held) :]) / len(held)
    return {
        "splits": SPLITS,
        "photographs": len(drift),
        "coverage": bound.coverage,
        "holds": holds,
        "mean share below": sum(below) / len(below),
        "promise": {"coverage": found.coverage, "bound": found.bound, "share below": promised},
    }


def _timed(backbone: Any, images: Tensor) -> dict[str, Any]:
    start = time.perf_counter()
    with progress_bar(len(images) // 2 * (EFFORT + 20), f"{SPEEDUP} times faster") as advance:
        found = turbovlm.calibrate(backbone, images, speedup=SPEEDUP, effort=EFFORT, batch=BATCH, progress=advance)
    seconds = time.perf_counter() - start
    subject = _subject(backbone, images)
    return {
        "asked": SPEEDUP,
        "promised": found.speedup,
        "macs": found.flops,
        "seconds": seconds,
        "measured": [subject.speedup(found.config) for _ in range(TIMINGS)],
    }


def on_images() -> dict[str, Any]:
    pipe = load_emoji_pipeline()
    prompts = random.Random(SEED).sample(list(emoji_prompts()), 2 * PROMPTS)
    inputs = {"guidance_scale": 3.0}
    rows = []
    for share in MADE:
        with progress_bar(PROMPTS * 10, f"images, {share:.0%}") as advance:
            start = time.perf_counter()
            found = turbovlm.calibrate(
                pipe, prompts[:PROMPTS], flops=share, steps=STEPS, inputs=inputs, batch=BATCH, progress=advance
            )
            seconds = time.perf_counter() - start
        whole, fixed, options = DenoiseConfig(1.0), frozenset[str](), {"steps": STEPS, "inputs": inputs, "batch": BATCH}
        held = DenoiserSubject(pipe, prompts[PROMPTS:], whole, fixed, SEED, lambda _: None, **options)
        keep = held.configured(whole, held.flat, share)
        assert keep is not None
        for name, config in (("one keep", keep), ("calibrated", found.config)):
            drift = held.drift(config, range(PROMPTS))
            rows.append(
                {
                    "flops": share,
                    "setting": name,
                    "macs": held.cost(config),
                    "drift": drift.tolist(),
                    "config": f"keep={list(config.keep)}, components={list(config.components)}, "  # type: ignore[arg-type]
                    f"degree={config.degree}, alpha={config.alpha}, restore={config.restore}, refresh={config.refresh}",
                    "seconds": seconds if config is found.config else 0.0,
                    "below bound": (drift <= found.bound).float().mean().item(),
                    "coverage": found.coverage,
                }
            )
    return {"rows": rows}


def on_tasks() -> dict[str, Any]:
    found = {}
    for task in TASKS:
        predictor = zoo_predictor(task, MODELS[task].removeprefix("zoo:"))
        more = DATA[task](IMAGES + CALIBRATED_ON).samples
        of_name = {image.name: image for sample in more for image in sample.images}
        data = DATA[task](IMAGES)
        asked = {image.name for sample in data.samples for image in sample.images}
        others = [image for name, image in of_name.items() if name not in asked][:CALIBRATED_ON]
        images = preprocess([image.open().resize((SIDE, SIDE)) for image in others], SIDE)
        config = _calibrated(predictor.model, images, task, 0.6, dense=predictor.dense).config
        each = _calibrated(predictor.model, images, f"{task}, per image", 0.6, True, dense=predictor.dense).config
        print(task, len(others), config, each.thresholds, flush=True)
        settings = [Setting(OWN), *methods((TurboConfig(flops=0.6),), ("ToMe", "turbovlm"))]
        settings.append(Setting("calibrated", (config,)))
        alone = [Setting(OWN), Setting("calibrated, per image", (each,))]
        with tempfile.TemporaryDirectory() as folder:
            study = _asked(task, predictor, data, settings, Path(folder) / "a", BATCH)
            one = _asked(task, predictor, data, alone, Path(folder) / "b", 1) if each.thresholds else None
        rows = [*study.rows[1:], *([] if one is None else one.rows[1:])]
        found[task] = [
            {
                "setting": row.setting,
                "macs": row.ratio,
                "kept": None if row.metrics[0].kept is None else dataclasses.astuple(row.metrics[0].kept),
                "same": None if row.same is None else dataclasses.astuple(row.same),
                "metric": row.metrics[0].name,
            }
            for row in rows
        ]
    return {"tasks": found}


def _asked(task: str, predictor: Any, data: Any, settings: list[Setting], folder: Path, batch: int) -> Study:
    with progress_bar(len(data.samples) * len(settings), task) as advance:
        return run_study(
            task,
            MODELS[task],
            predictor,
            data,
            settings,
            folder,
            batch=batch,
            on_progress=lambda _, done: advance(done),
        )


def report(found: dict[str, Any]) -> str:
    lines = ["# What calibration brings", ""]
    if "photos" in found:
        lines += _photo_lines(found["photos"])
    if "pictures" in found:
        lines += ["## Image generation, prompts held out", "", f"{found['pictures']['machine']}.", ""]
        lines += [
            "| setting | multiply-accumulates | drift | below the promised bound | settings |",
            "|---|---|---|---|---|",
        ]
        for row in found["pictures"]["rows"]:
            below = f"{row['below bound']:.0%} of {row['coverage']:.0%} promised" if row["seconds"] else ""
            lines.append(
                f"| {row['setting']}, {row['flops']:.0%} | {row['macs']:.1%} | {_mean(row['drift']):.5f} | {below} | "
                f"{row['config']} |"
            )
        lines.append("")
    if "tasks" in found:
        lines += ["## Tasks, at 60 % of the encoder's multiply-accumulates", "", f"{found['tasks']['machine']}.", ""]
        lines += ["| task | setting | multiply-accumulates | kept | same answer |", "|---|---|---|---|---|"]
        for task, rows in found["tasks"]["tasks"].items():
            for row in rows:
                kept, same = (_interval(row[name]) for name in ("kept", "same"))
                lines.append(f"| {task}: {row['metric']} | {row['setting']} | {row['macs']:.1%} | {kept} | {same} |")
        lines.append("")
    return "\n".join(lines)


def _photo_lines(photos: dict[str, Any]) -> list[str]:
    rows = photos["rows"]
    lines = ["## Photographs, held out", "", f"{photos['machine']}.", ""]
    lines += ["In brackets the ratio to ToMe's mean at the same target.", ""]
    for share in SHARES:
        some = [row for row in rows if row["flops"] == share]
        tome = next(row for row in some if row["setting"] == "ToMe")
        lines += [f"### {share:.0%} of the encoder's multiply-accumulates", ""]
        lines += ["| setting | multiply-accumulates | drift of CLS | drift of the patches | salient IoU |"]
        lines += ["|---|---|---|---|---|"]
        for row in some:
            cells = [f"{_mean(row[m]):.4f} ({_mean(row[m]) / _mean(tome[m]):.2f}×)" for m in ("CLS", "patches")]
            lines.append(
                f"| {row['setting']} | {row['macs']:.1%} | {cells[0]} | {cells[1]} | {_mean(row['IoU']):.4f} |"
            )
        lines.append("")
    bound, speed = photos["bound"], photos["speed"]
    promise = bound["promise"]
    lines += ["### What was promised", ""]
    lines += [
        f"- A bound for {bound['coverage']:.0%} of images, from half of {bound['photographs']} photographs: it held "
        f"on the other half in {bound['holds']} of {bound['splits']} splits; {bound['mean share below']:.1%} of the "
        "others were below on average.",
        f"- The bound that `calibrate` promised for {promise['coverage']:.0%}, {promise['bound']:.4f}: "
        f"{promise['share below']:.1%} of the photographs held out are below.",
        f"- `speedup={speed['asked']}`: promised {speed['promised']:.2f}, timed again "
        f"{', '.join(f'{each:.2f}' for each in speed['measured'])}; {speed['macs']:.1%} of the multiply-accumulates, "
        f"found in {speed['seconds'] / 60:.1f} minutes.",
        "",
    ]
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _interval(values: list[float] | None) -> str:
    return "" if values is None else f"{values[0]:.1%} [{values[1]:.1%}, {values[2]:.1%}]"


if __name__ == "__main__":
    main()
