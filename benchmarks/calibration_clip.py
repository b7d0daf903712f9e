"""What `turbovlm.calibrate` brings real CLIP, ViT-B/16's image tower, on photographs that it has not seen.

    python studies/photos/prepare.py        # 256 photographs, fetched
    python benchmarks/calibration_clip.py   # 50 minutes on two cores, most of it for the speed-ups

Half of the photographs are given to `calibrate`, as many others measured: drift of the image embedding (1 − cosine, the
mean photograph taken off), beside ToMe's and the default's at the same cost. The promised bound is tried as in
benchmarks/calibration.py. `calibrate(speedup=…)` is asked with several seeds, and what it found is timed again.

Writes benchmarks/results/calibration_clip.{json,md}.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import mean, median
from typing import Any

import torch
from calibration import BATCH, SEED, _tried, load_photos
from cases import RESULTS, described, load, machine, save
from judges import DEGREES, solve

import turbovlm
from turbovlm import Calibration, TurboConfig
from turbovlm.calibration.subjects.encoder import EncoderSubject
from turbovlm.cli.measuring import progress_bar
from turbovlm_lab.zoo import clip

FLOPS, SPEEDUP, ASKED = 0.6, 1.5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("drift", "speed"), default=["drift", "speed"])
    parser.add_argument("--asked", type=int, default=ASKED, help="speed-ups asked for (default: %(default)s)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, path = clip.load_clip(), RESULTS / "calibration_clip.json"
    pixels = clip.preprocess(load_photos())
    order = random.Random(SEED).sample(range(len(pixels)), len(pixels))
    given, held = order[: len(order) // 2], order[len(order) // 2 :]
    found = load(path)
    for part in args.parts:
        if part == "drift":
            found["drift"] = on_others(model, pixels, given, held)
        else:
            found["speed"] = []
            for seed in range(args.asked):
                found["speed"].append(again(model, pixels[given], seed))
                save(path, found)
        found["machine"] = machine()
        save(path, found)
    path.with_suffix(".md").write_text(report(found))
    print(report(found))


def subject_of(model: Any, images: torch.Tensor) -> EncoderSubject:
    return EncoderSubject(model, images, TurboConfig(r=0), frozenset(), SEED, lambda _: None, batch=BATCH)


def calibrated(model: Any, images: torch.Tensor, **how: Any) -> tuple[Calibration, float]:
    """What is found, and in how many seconds."""
    start = time.perf_counter()
    with progress_bar(len(images) // 2 * 40, f"calibrating, {how}") as advance:
        found = turbovlm.calibrate(model, images, batch=BATCH, progress=advance, **how)
    return found, time.perf_counter() - start


def on_others(model: Any, pixels: torch.Tensor, given: list[int], held: list[int]) -> dict[str, Any]:
    found, seconds = calibrated(model, pixels[given], flops=FLOPS)
    print(f"{seconds:.0f} s: {found}", flush=True)
    subject = subject_of(model, pixels)
    with turbovlm.apply(model, r=0, blocks="every") as handle:
        shape = handle.features[0].shape  # type: ignore[union-attr]
    amounts, _ = solve(shape, subject.encoder.tokens, range(shape.depth), FLOPS)
    with turbovlm.apply(model, flops=FLOPS) as handle:
        default = handle.schedule(subject.encoder.tokens).merged
    configs = {
        "ToMe": TurboConfig(r=amounts, **DEGREES["ToMe"]),
        "default": TurboConfig(r=default, partition="all"),
        "calibrated": found.config,
    }
    rows = {
        name: {"macs": subject.cost(config), "drift": subject.drift(config, held).tolist(), "config": str(config)}
        for name, config in configs.items()
    }
    return {"rows": rows, "seconds": seconds, "bound": _tried(subject, found, given, held)}


def again(model: Any, images: torch.Tensor, seed: int) -> dict[str, Any]:
    """A speed-up asked for, and timed again."""
    found, seconds = calibrated(model, images, speedup=SPEEDUP, seed=seed)
    timed = subject_of(model, images).speedup(found.config)
    return {"promised": found.speedup, "timed": timed, "macs": found.flops, "drift": found.drift, "seconds": seconds}


def report(found: dict[str, Any]) -> str:
    lines = ["# What calibration brings CLIP", "", described(found["machine"]), ""]
    if "drift" in found:
        rows, bound = found["drift"]["rows"], found["drift"]["bound"]
        tome = mean(rows["ToMe"]["drift"])
        lines += [f"{len(rows['ToMe']['drift'])} photographs that took no part, as many were calibrated on, in"]
        lines += [f"{found['drift']['seconds'] / 60:.1f} minutes.", ""]
        lines += ["| setting | MACs | drift | of ToMe's | median | r |", "|---|--:|--:|--:|--:|---|"]
        for name, row in rows.items():
            drift = row["drift"]
            said = row["config"].removeprefix("TurboConfig(")
            lines.append(
                f"| {name} | {row['macs']:.1%} | {mean(drift):.4f} | {mean(drift) / tome:.2f} | {median(drift):.4f} | "
                f"{said[: said.index(')') + 1]} |"
            )
        promise = bound["promise"]
        lines += [
            "",
            f"- A bound for {bound['coverage']:.0%} of images, from half of {bound['photographs']} photographs:",
        ]
        lines += [f"  it held on the other half in {bound['holds']} of {bound['splits']} splits."]
        lines += [f"- The bound that was promised for {promise['coverage']:.0%}, {promise['bound']:.4f}: below it are"]
        lines += [f"  {promise['share below']:.1%} of the photographs held out."]
    if "speed" in found:
        rows = found["speed"]
        near = sum(abs(row["timed"] / row["promised"] - 1) <= 0.03 for row in rows)
        lines += [
            "",
            f"`speedup={SPEEDUP}`, asked {len(rows)} times: within 3 % when timed again in {near} of them.",
            "",
        ]
        lines += ["| promised | timed again | MACs | drift | minutes |", "|--:|--:|--:|--:|--:|"]
        for row in rows:
            cells = f"{row['promised']:.2f}× | {row['timed']:.2f}× | {row['macs']:.1%} | {row['drift']:.4f}"
            lines.append(f"| {cells} | {row['seconds'] / 60:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
