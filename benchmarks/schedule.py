"""What is kept over the steps: early steps coarse or late ones, at about equal mean keep; drift and time of each.

    python benchmarks/schedule.py                # benchmarks/results/schedule.{json,md}, what they lack; ten minutes
    python benchmarks/schedule.py --models emoji --out tried

On two small text-to-image models, 64×64 pixels, guidance 3, fp32, one thread: a transformer of FLUX's kind trained on
drawings (turbovlm_lab.zoo.drawings), 8 images in 12 steps, and a UNet trained on emoji (turbovlm_lab.zoo.emoji), 24
images in 10 steps. Drift is the relative error of the last latent against the unmerged run of the same seed, per image;
its mean and standard error. Time is process CPU time of the run that made them, as a ratio to the mean of two unmerged
ones, before and behind those of one call of this script.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import diffusion_quality
import stacks
import torch
from cases import RESULTS, described, load, machine, save
from torch import Tensor
from tqdm import tqdm

import turbovlm
from turbovlm import DenoiseConfig
from turbovlm.shares import keep_at, written
from turbovlm_lab.zoo.drawings import load_drawings_pipeline
from turbovlm_lab.zoo.emoji import load_emoji_pipeline

SCHEDULES: dict[str, Any] = {
    f"{name}, {mean}": keep
    for mean, low, high in ((0.75, 0.5, 1.0), (0.5, 0.3, 0.7))
    for name, keep in {
        "the same": mean,
        "early coarse": {0: low, 0.5: high},
        "late coarse": {0: high, 0.5: low},
        "all but the first quarter coarse": {0: 1.0, 0.25: round((4 * mean - 1) / 3, 2)},
    }.items()
}
"""By name, and about the share that is kept on average."""

STEPS = {"drawings": stacks.STEPS, "emoji": diffusion_quality.STEPS}
IMAGES = {"drawings": 8, "emoji": 24}
Made = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--out", default="schedule", metavar="NAME", help="of the files under results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = load(RESULTS / f"{args.out}.json")
    results |= {"machine": machine()}
    for model in args.models:
        pipe, make = {"drawings": drawings, "emoji": emoji}[model]()
        found = results.setdefault("models", {}).setdefault(model, {"runs": {}})
        found |= {"images": IMAGES[model], "steps": STEPS[model]}
        found["runs"] |= measured(pipe, make, model, [name for name in SCHEDULES if name not in found["runs"]])
        save(RESULTS / f"{args.out}.json", results)
    (RESULTS / f"{args.out}.md").write_text(report(results))
    print(report(results))


def drawings() -> tuple[Any, Made]:
    """The pipeline, and what makes its images."""
    pipe = load_drawings_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = diffusion_quality.prompts(IMAGES["drawings"])
    return pipe, lambda: stacks.made(pipe, prompts)[0]


def emoji() -> tuple[Any, Made]:
    pipe = load_emoji_pipeline()
    pipe.set_progress_bar_config(disable=True)
    texts = diffusion_quality.embedded(pipe, diffusion_quality.prompts(IMAGES["emoji"]))
    return pipe, lambda: diffusion_quality.latents(pipe, texts)


def measured(pipe: Any, make: Made, model: str, names: list[str]) -> dict[str, Any]:
    """Drift of schedules from the pipeline's own images, and how many times faster each is."""
    if not names:
        return {}
    plain, before = timed(make)
    runs: dict[str, dict[str, float]] = {}
    for name in tqdm(names, desc=model):
        with turbovlm.apply(pipe, DenoiseConfig(SCHEDULES[name])):
            latents, seconds = timed(make)
        drifts = diffusion_quality.relative_error(latents, plain)
        error = float(drifts.std() / len(drifts) ** 0.5)
        runs[name] = {"drift": float(drifts.mean()), "standard_error": error, "seconds": seconds}
        tqdm.write(f"{model}, {name}: {runs[name]}")
    own = (before + timed(make)[1]) / 2
    for run in runs.values():
        run["speedup"] = own / run["seconds"]
    return runs


def timed(make: Made) -> tuple[Tensor, float]:
    """What is made, and the CPU seconds it took."""
    begun = time.process_time()
    made = make()
    return made, time.process_time() - begun


def mean_keep(keep: Any, steps: int) -> float:
    """What is kept on average over the steps."""
    shares: list[Any] = [keep_at(DenoiseConfig(keep).keep, step / steps) for step in range(steps)]
    return sum(shares) / steps


def report(results: dict[str, Any]) -> str:
    lines = ["# What is kept over the steps", "", described(results["machine"])]
    for model, found in results["models"].items():
        lines += ["", f"## {model}", "", f"{found['images']} images in {found['steps']} steps.", ""]
        lines += ["| | keep | mean keep | drift | speed-up |", "|---|---|--:|--:|--:|"]
        for name, keep in SCHEDULES.items():
            run = found["runs"][name]
            drift = f"{run['drift']:.4f} ± {run['standard_error']:.4f}"
            shown = written(DenoiseConfig(keep).keep)
            mean = mean_keep(keep, found["steps"])
            lines.append(f"| {name.split(',')[0]} | {shown} | {mean:.2f} | {drift} | {run['speedup']:.2f}× |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
