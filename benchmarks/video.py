"""Drift and time of merging in a small video transformer, by the blocks that are left whole and by where it merges.

    python benchmarks/video.py                # writes benchmarks/results/video.{json,md}; fifteen minutes
    python benchmarks/video.py --videos 2 --keeps 0.5 --out tried

On the small text-to-video transformer of Wan's kind (turbovlm_lab.zoo.moving): 12 blocks, 15 frames of 32×32 pixels,
2,048 tokens, 10 steps, guidance 3, fp32, one thread. Drift is the relative error of the last latent against the
unmerged run of the same seed, per video; its mean and standard error. Time is process CPU time of the run that made
them, as a ratio to the mean of two unmerged ones, before and behind; multiply-accumulates are those of a step.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from cases import RESULTS, described, machine, save
from torch import Tensor
from tqdm import tqdm

import turbovlm
from turbovlm import DenoiseConfig
from turbovlm.profile.macs import counting
from turbovlm_lab.zoo.moving import load_moving_pipeline, moving_prompts

STEPS, WHOLE = 10, 4
VERSIONS: dict[str, dict[str, Any]] = {f"first {count} blocks whole": {"whole_first": count} for count in (0, 1, 2, 4)}
OTHERS: dict[str, dict[str, Any]] = {
    "stacks of 2": {"span": 2},
    "stacks of 1": {"span": 1},
    "blocks": {"scope": "block"},
    "copies": {"restore": "copy"},
    "sizes not counted": {"proportional": False},
    "reduce=keep_norm": {"reduce": "keep_norm"},
}
"""With so many first blocks whole as `WHOLE` says, and at the middle share alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=4, metavar="N", help="prompts, a seed each (default 4)")
    parser.add_argument("--keeps", type=float, nargs="+", default=(0.7, 0.5, 0.3), metavar="SHARE")
    parser.add_argument("--out", default="video", metavar="NAME", help="of the files under results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_moving_pipeline()
    pipe.set_progress_bar_config(disable=True)
    every = moving_prompts()
    prompts = [every[i * len(every) // args.videos + i] for i in range(args.videos)]  # moving in different ways
    versions = {
        f"{name}, keep={keep:g}": DenoiseConfig(keep, **given)
        for keep in args.keeps
        for name, given in VERSIONS.items()
    }
    middle = args.keeps[len(args.keeps) // 2]
    versions |= {
        f"{name}, keep={middle:g}": DenoiseConfig(middle, whole_first=WHOLE, **given) for name, given in OTHERS.items()
    }
    whole = macs(pipe, prompts)
    plain, before = made(pipe, prompts)
    runs: dict[str, Any] = {}
    for name, config in tqdm(versions.items()):
        with turbovlm.apply(pipe, config):
            latents, seconds = made(pipe, prompts)
            share = macs(pipe, prompts) / whole
        errors = (latents - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        error = float(errors.std() / len(errors) ** 0.5)
        runs[name] = {"drift": float(errors.mean()), "standard_error": error, "seconds": seconds, "macs": share}
    own = (before + made(pipe, prompts)[1]) / 2
    results = {
        "machine": machine(),
        "videos": args.videos,
        "steps": STEPS,
        "prompts": prompts,
        "seconds": own,
        "runs": runs,
    }
    save(RESULTS / f"{args.out}.json", results)
    (RESULTS / f"{args.out}.md").write_text(report(results))
    print(report(results))


@torch.no_grad()
def made(pipe: Any, prompts: list[str], steps: int = STEPS) -> tuple[Tensor, float]:
    """The last latents, and the CPU seconds they took."""
    begun = time.process_time()
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    latents: Tensor = pipe(prompts, num_inference_steps=steps, generator=generators, output_type="latent").frames
    return latents, time.process_time() - begun


def macs(pipe: Any, prompts: list[str]) -> int:
    """Multiply-accumulates of a step on one video."""
    with counting() as so_far:
        made(pipe, prompts[:1], steps=1)
        return so_far()


def report(results: dict[str, Any]) -> str:
    lines = ["# Merging in a small video transformer", "", described(results["machine"]), ""]
    lines += [
        f"Drift of {results['videos']} videos, mean ± standard error; ratio of multiply-accumulates; speed-up.",
        "",
    ]
    lines += ["| | drift | arithmetic | speed-up |", "|---|--:|--:|--:|"]
    for name, run in results["runs"].items():
        drift = f"{run['drift']:.4f} ± {run['standard_error']:.4f}"
        lines.append(f"| {name} | {drift} | {1 / run['macs']:.2f}× | {results['seconds'] / run['seconds']:.2f}× |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
