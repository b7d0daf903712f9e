"""Merging beside a cache of `diffusers`, and both together: drift and time of images in few steps and in many.

    python benchmarks/caches.py                # writes benchmarks/results/caches.{json,md,png}; half an hour
    python benchmarks/caches.py --images 2 --steps 10 --out tried

On the small text-to-image transformer of FLUX's kind, as in `stacks.py`. The cache is `FirstBlockCacheConfig`: where
the first block changes by less than a threshold since the step before, the other blocks are left out, and what they
gave then is used again.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import RESULTS, described, machine, save
from stacks import measured, rows_of, spread_prompts

import turbovlm
from turbovlm import DenoiseConfig
from turbovlm_lab.zoo.drawings import load_drawings_pipeline

MERGED: dict[str, DenoiseConfig] = {
    "merging, keep=0.7": DenoiseConfig(0.7),
    "merging, keep=0.5": DenoiseConfig(0.5),
    "merging, keep=0.3": DenoiseConfig(0.3),
    "merging, keep=0.3, first 6 blocks whole": DenoiseConfig(0.3, whole_first=6),
}
THRESHOLDS = (0.02, 0.05, 0.1, 0.2)
BOTH = DenoiseConfig(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6, metavar="N", help="prompts, a seed each (default 6)")
    parser.add_argument("--steps", type=int, nargs="+", default=(8, 30), help="in a run (default 8 30)")
    parser.add_argument("--out", default="caches", metavar="NAME", help="of the files under results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_drawings_pipeline()
    pipe.set_progress_bar_config(disable=True)
    results: dict[str, Any] = {"machine": machine(), "images": args.images, "steps": {}}
    versions: dict[str, Any] = {name: lambda config=config: within(pipe, config) for name, config in MERGED.items()}
    for threshold in THRESHOLDS:
        versions[f"cache, threshold {threshold:g}"] = lambda size=threshold: within(pipe, None, size)
    for threshold in THRESHOLDS[1:3]:
        versions[f"both, threshold {threshold:g}"] = lambda size=threshold: within(pipe, BOTH, size)
    for steps in args.steps:
        results["steps"][str(steps)] = measured(pipe, spread_prompts(args.images), versions, steps)
        save(RESULTS / f"{args.out}.json", results)
    (RESULTS / f"{args.out}.md").write_text(report(results))
    plot(results["steps"], RESULTS / f"{args.out}.png")
    print(report(results))


@contextlib.contextmanager
def within(pipe: Any, config: DenoiseConfig | None, threshold: float | None = None) -> Iterator[None]:
    """Let a pipeline merge, or cache behind it, or both."""
    from diffusers import FirstBlockCacheConfig

    with contextlib.ExitStack() as stack:
        if config is not None:
            stack.enter_context(turbovlm.apply(pipe, config))
        if threshold is not None:
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
            stack.callback(pipe.transformer.disable_cache)
        yield


def report(results: dict[str, Any]) -> str:
    lines = ["# Merging, caching, and both", "", described(results["machine"]), ""]
    lines += [
        f"Drift of {results['images']} images, mean ± standard error; speed-up of making them. Both: merging with",
        "",
    ]
    lines[-2] += " keep=0.5 and the first 4 blocks whole."
    for steps, found in results["steps"].items():
        lines += [f"## {steps} steps", "", *rows_of(found), ""]
    return "\n".join(lines)


def plot(steps: dict[str, Any], file: Path) -> None:
    """Drift against speed-up, a panel for each number of steps; without what changes nothing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(steps), figsize=(5 * len(steps), 4), squeeze=False, layout="constrained")
    for axes, (count, found) in zip(panels[0], steps.items()):
        for kind, mark in (("merging", "o"), ("cache", "s"), ("both", "^")):
            runs = [run for name, run in found["runs"].items() if name.startswith(kind) and run["drift"] > 0]
            points = sorted((found["seconds"] / run["seconds"], run["drift"]) for run in runs)
            axes.plot(*zip(*points), marker=mark, label=kind)
        axes.set(title=f"{count} steps", xlabel="speed-up of an image", ylabel="drift of the latent", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
