"""Where tokens stay merged, in a deep transformer: drift and time by parts, blocks, and stacks of several lengths.

    python benchmarks/stacks.py                # writes benchmarks/results/stacks.{json,md}; forty minutes
    python benchmarks/stacks.py --images 4 --keeps 0.5 --out tried

On the small text-to-image transformer of FLUX's kind (turbovlm_lab.zoo.drawings): 4 double and 8 single blocks, 64×64
pixels, 1,024 tokens, 12 steps, guidance 3, fp32, one thread. Drift is the relative error of the last latent against the
unmerged run of the same seed, per image; its mean and standard error. Time is process CPU time of the run that made
them, as a ratio to the mean of two unmerged ones, before and behind.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from cases import RESULTS, described, machine, save
from torch import Tensor
from tqdm import tqdm

import turbovlm
from turbovlm import DenoiseConfig
from turbovlm_lab.zoo.drawings import load_drawings_pipeline
from turbovlm_lab.zoo.emoji import emoji_prompts

STEPS, GUIDANCE = 12, 3.0
VERSIONS: dict[str, dict[str, Any]] = {
    "parts": {"scope": "part"},
    "parts, copies": {"scope": "part", "restore": "copy"},
    "blocks": {"scope": "block"},
    "stacks of 2": {"span": 2},
    "stacks, the default": {},
    "stacks of 8": {"span": 8},
    **{f"stacks, first {count} blocks whole": {"whole_first": count} for count in (0, 2, 3, 5, 6, 8)},
    "stacks, copies": {"restore": "copy"},
    "stacks, sizes not counted": {"proportional": False},
    "stacks, pruned": {"reduce": "prune"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6, metavar="N", help="prompts, a seed each (default 6)")
    parser.add_argument("--keeps", type=float, nargs="+", default=(0.7, 0.5, 0.3), metavar="SHARE")
    parser.add_argument("--out", default="stacks", metavar="NAME", help="of the files under results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_drawings_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = spread_prompts(args.images)
    versions = {
        f"{name}, keep={keep:g}": functools.partial(turbovlm.apply, pipe, DenoiseConfig(keep, **given))
        for keep in args.keeps
        for name, given in VERSIONS.items()
    }
    results = {"machine": machine(), "images": args.images, **measured(pipe, prompts, versions)}
    save(RESULTS / f"{args.out}.json", results)
    (RESULTS / f"{args.out}.md").write_text(report(results))
    print(report(results))


def spread_prompts(count: int) -> list[str]:
    """So many of the drawings' prompts, evenly spaced."""
    every = emoji_prompts()
    return [every[i * len(every) // count] for i in range(count)]


def measured(
    pipe: Any, prompts: list[str], versions: Mapping[str, Callable[[], AbstractContextManager[Any]]], steps: int = STEPS
) -> dict[str, Any]:
    """Drift and CPU seconds of each version, which holds within what it gives; and the seconds without."""
    plain, before = made(pipe, prompts, steps)
    runs: dict[str, Any] = {}
    for name, version in tqdm(versions.items(), desc=f"{steps} steps"):
        with version():
            latents, seconds = made(pipe, prompts, steps)
        errors = (latents - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        runs[name] = {
            "drift": float(errors.mean()),
            "standard_error": float(errors.std() / len(errors) ** 0.5),
            "seconds": seconds,
        }
    return {"seconds": (before + made(pipe, prompts, steps)[1]) / 2, "runs": runs}


@torch.no_grad()
def made(pipe: Any, prompts: list[str], steps: int = STEPS) -> tuple[Tensor, float]:
    """The last latents, and the CPU seconds they took."""
    begun = time.process_time()
    latents: Tensor = pipe(
        prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=GUIDANCE,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="latent",
    ).images
    return latents, time.process_time() - begun


def report(results: dict[str, Any]) -> str:
    lines = ["# Stacks of blocks, blocks, parts", "", described(results["machine"]), ""]
    lines += [f"Drift of {results['images']} images, mean ± standard error; speed-up of making them.", ""]
    return "\n".join([*lines, *rows_of(results), ""])


def rows_of(results: dict[str, Any]) -> list[str]:
    """A table of what `measured` gives."""
    lines = ["| | drift | speed-up |", "|---|--:|--:|"]
    for name, run in results["runs"].items():
        drift = f"{run['drift']:.4f} ± {run['standard_error']:.4f}"
        lines.append(f"| {name} | {drift} | {results['seconds'] / run['seconds']:.2f}× |")
    return lines


if __name__ == "__main__":
    main()
