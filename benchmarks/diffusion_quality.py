"""What merging costs in images: drift from the unmerged run of the same seed, and Fréchet distance, beside tomesd.

    python benchmarks/diffusion_quality.py                   # drift and time of all settings, and their plot
    python benchmarks/diffusion_quality.py --frechet 2000    # Fréchet distances, hours; goes on where it was stopped
    python benchmarks/diffusion_quality.py --frechet 500 --only itself stacks parts    # by scope

On the small text-to-image model trained on emoji (turbovlm_lab.zoo.emoji), 64×64 pixels, 10 steps, guidance 3, fp32.
Drift is the relative error of the last latent, per image; its mean and standard error. Time is process CPU time of
calls for 16 images without the text encoder, settings in turn, as a ratio to the pipeline's own; medians. The Fréchet
distance is between features of a ViT-S/14 (CLS after block 9, of images scaled to 112 pixels) of the images made
and of as many drawn ones, which studies/emoji/prepare.py fetches; smaller is better.
tomesd (pip install --no-deps tomesd) merges by its own defaults, which are self-attention in the largest resolution and
partitions drawn at random, and in all parts of two resolutions.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import RESULTS, described, load, machine, save
from torch import Tensor
from tqdm import tqdm

import turbovlm
from turbovlm_lab.evaluate.metrics import frechet_distance
from turbovlm_lab.zoo import load_saliency_vit
from turbovlm_lab.zoo.emoji import emoji_prompts, load_emoji_pipeline

KEEPS = (0.9, 0.7, 0.5, 0.3)
STEPS, GUIDANCE, BATCH = 10, 3.0, 16
TIMED_STEPS, LARGEST = 6, 1024
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Within = Callable[[Any], contextlib.AbstractContextManager[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", "--pictures", type=int, default=96, metavar="N", help="for drift (default 96)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of timing (default 5); 0 for none")
    parser.add_argument("--frechet", type=int, metavar="N", help="images per setting, instead of drift and time")
    parser.add_argument("--only", metavar="TEXT", nargs="+", help="settings whose name contains one of them")
    parser.add_argument("--out", default="diffusion_quality", metavar="NAME", help="of the files under results")
    args = parser.parse_args()
    if importlib.util.find_spec("tomesd") is None:
        parser.error("tomesd is compared with: pip install --no-deps tomesd")
    pipe = load_emoji_pipeline()
    pipe.set_progress_bar_config(disable=True)
    file = RESULTS / f"{args.out}.json"
    results = load(file)
    if args.frechet:
        measure_frechet(pipe, args.frechet, args.only, results, file)
    else:
        measure_drift(pipe, args.images, args.rounds, args.only, results)
        save(file, results)
        plot(results["settings"], file.with_suffix(".png"))
    (RESULTS / f"{args.out}.md").write_text(report(results))
    print(report(results))


def measure_drift(pipe: Any, images: int, rounds: int, only: list[str] | None, results: dict[str, Any]) -> None:
    chosen = {name: within for name, within in settings().items() if not only or any(text in name for text in only)}
    results |= {"machine": machine(), "pictures": images, "settings": {}}
    texts = embedded(pipe, prompts(images))
    plain = latents(pipe, texts)
    for name, within in tqdm(chosen.items(), unit=" settings"):
        with within(pipe):
            drifts = relative_error(latents(pipe, texts), plain)
        found = {"drift": float(drifts.mean()), "standard_error": float(drifts.std() / len(drifts) ** 0.5)}
        results["settings"][name] = found
        tqdm.write(f"{name}: {found['drift']:.4f} ± {found['standard_error']:.4f}", file=sys.stderr)
    for name, ratio in times(pipe, texts, chosen, rounds).items():
        results["settings"][name]["speedup"] = ratio


def measure_frechet(pipe: Any, count: int, only: list[str] | None, results: dict[str, Any], file: Path) -> None:
    """Of the model's own images, and of each share kept."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "studies" / "emoji"))
    from prepare import DATA
    from scenes import load_emoji, scenes

    emoji = load_emoji(DATA)
    index = torch.arange(count) * len(emoji.prompts) // count
    vit = load_saliency_vit().backbone
    drawn = features(vit, scenes(emoji, index, torch.Generator().manual_seed(1)))
    versions: dict[str, Within] = {"the model itself": lambda pipe: contextlib.nullcontext()}
    for keep in KEEPS[:-1]:
        versions |= {
            f"stacks, keep={keep:g}": merged(keep=keep),
            f"parts, keep={keep:g}": merged(keep=keep, scope="part"),
            f"tomesd, keep={keep:g}": by_tomesd(keep),
        }
    done = results.setdefault("frechet", {}).setdefault(str(count), {})
    machines = results.setdefault("frechet_machines", {}).setdefault(str(count), {})
    texts = embedded(pipe, [emoji.prompts[i] for i in index])
    for name, within in tqdm(versions.items(), unit=" settings"):
        if name in done or (only and not any(text in name for text in only)):
            continue
        with within(pipe):
            made = latents(pipe, texts)
        done[name] = frechet_distance(features(vit, pipe.vae.decode(made)[0].clamp(-1, 1)), drawn)
        machines[name] = machine()
        save(file, results)


@torch.inference_mode()
def features(vit: Any, images: Tensor) -> Tensor:
    """CLS after block 9 of a ViT-S/14, `[images, 384]`, of images in [−1, 1]."""
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    found = []
    for some in torch.split(images, 64):
        larger = F.interpolate((some + 1) / 2, size=(112, 112), mode="bicubic", align_corners=False)
        out = vit(pixel_values=(larger - mean) / deviation, output_hidden_states=True)
        found.append(out.hidden_states[10][:, 0])
    return torch.cat(found)


def settings() -> dict[str, Within]:
    """All that is compared, by name."""
    found: dict[str, Within] = {}
    for keep in KEEPS:
        found |= {f"{method}, keep={keep:g}": merged(keep=keep, **given) for method, given in METHODS.items()}
        found |= {f"{method}, keep={keep:g}": by_tomesd(keep, **given) for method, given in TOMESD.items()}
    for name, given in ONE_OFF.items():
        found[f"turbovlm, {name}, keep=0.5"] = merged(keep=0.5, **given)
    return found


METHODS: dict[str, dict[str, Any]] = {
    "parts": {"scope": "part"},
    "parts, copies": {"scope": "part", "restore": "copy"},
    "attention": {"scope": "part", "components": ["attention"]},
    "queries": {"scope": "part", "components": ["attention"], "queries_only": True},
    "queries and other parts": {"scope": "part", "queries_only": True},
    "stacks": {},
    "stacks, copies": {"restore": "copy"},
    "stacks, largest resolution": {"min_tokens": LARGEST},
}
"""turbovlm's, each at all shares kept. In this UNet each stack is one block."""

TOMESD: dict[str, dict[str, Any]] = {
    "tomesd": {},
    "tomesd, all parts, two resolutions": {"max_downsample": 2, "merge_crossattn": True, "merge_mlp": True},
}
"""By its own defaults, and in as many places as parts of turbovlm's."""

ONE_OFF: dict[str, dict[str, Any]] = {
    **{f"refresh={refresh}": {"refresh": refresh} for refresh in (2, 3, 4, 6)},
    "proportional=False": {"proportional": False},
    "reduce=prune": {"reduce": "prune"},
    "reduce=keep_norm": {"reduce": "keep_norm"},
    **{f"degree={degree}": {"degree": degree} for degree in ("weighted_difference", "semantics", "random")},
    **{f"alpha={alpha}": {"degree": "weighted_difference", "alpha": alpha} for alpha in (20, 200)},
}
"""Changes of the default."""


def merged(**given: Any) -> Within:
    return lambda pipe: turbovlm.apply(pipe, **given)


def by_tomesd(keep: float, **given: Any) -> Within:
    """tomesd, of which every run draws the same partitions."""

    @contextlib.contextmanager
    def within(pipe: Any) -> Iterator[None]:
        import tomesd

        torch.manual_seed(0)
        tomesd.apply_patch(pipe, ratio=1 - keep, **given)
        try:
            yield
        finally:
            tomesd.remove_patch(pipe)

    return within


def prompts(count: int) -> list[str]:
    """Half on white and half on photographs, spread over emoji and styles."""
    every = emoji_prompts()
    return [every[i * len(every) // count] for i in range(count)]


@torch.no_grad()
def embedded(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = pipe.encode_prompt(texts, "cpu", 1, True)
    return made


def latents(pipe: Any, texts: tuple[Tensor, Tensor], batch: int = BATCH, steps: int = STEPS, first: int = 0) -> Tensor:
    """The last latents, of seeds counted from `first`."""
    made = []
    for start in range(0, len(texts[0]), batch):
        words, nothing = (text[start : start + batch] for text in texts)
        seeds = [torch.Generator().manual_seed(first + start + i) for i in range(len(words))]
        out = pipe(
            prompt_embeds=words,
            negative_prompt_embeds=nothing,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=seeds,
            output_type="latent",
        )
        made.append(out.images)
    return torch.cat(made)


def relative_error(made: Tensor, plain: Tensor) -> Tensor:
    """Per image."""
    return (made - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)


def times(pipe: Any, texts: tuple[Tensor, Tensor], chosen: dict[str, Within], rounds: int) -> dict[str, float]:
    """How many times faster than the pipeline itself each setting makes an image: medians over rounds."""
    every: dict[str, Within] = {"plain": lambda pipe: contextlib.nullcontext(), **chosen}
    spent: dict[str, list[float]] = {name: [] for name in every}
    few = (texts[0][:BATCH], texts[1][:BATCH])
    for number in tqdm(range(rounds + 1), unit=" rounds", disable=not rounds):
        for name in every if number % 2 else reversed(every):
            with every[name](pipe):
                begun = time.process_time()
                latents(pipe, few, steps=TIMED_STEPS)
                spent[name].append(time.process_time() - begun)
    if not rounds:
        return {}
    ratios = {name: [a / b for a, b in zip(spent["plain"][1:], spent[name][1:])] for name in chosen}
    return {name: statistics.median(values) for name, values in ratios.items()}


def plot(found: dict[str, Any], file: Path) -> None:
    """Drift against speed-up, a curve per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    curves = (*METHODS, *TOMESD)
    for method in curves:
        points = [found[name] for keep in KEEPS if (name := f"{method}, keep={keep:g}") in found]
        if points and all("speedup" in point for point in points):
            drawn = sorted((point["speedup"], point["drift"]) for point in points)
            axes.plot(*zip(*drawn), marker="o", linestyle="--" if "tomesd" in method else "-", label=method)
    rest = {name: p for name, p in found.items() if name.rsplit(", ", 1)[0] not in curves and "speedup" in p}
    axes.plot(
        [p["speedup"] for p in rest.values()], [p["drift"] for p in rest.values()], "k.", label="turbovlm, others"
    )
    axes.set(xlabel="speed-up of an image", ylabel="drift of the latent")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")


def report(results: dict[str, Any]) -> str:
    lines = ["# What merging costs in images", ""]
    lines += ["The small model trained on emoji, 64×64 pixels, 10 steps, guidance 3, fp32.", ""]
    if "settings" in results:
        lines += [described(results["machine"]), ""]
        lines += [f"Drift of {results['pictures']} images, mean ± standard error; speed-up of a whole image.", ""]
        lines += ["| | drift | speed-up |", "|---|--:|--:|"]
        for name, found in results["settings"].items():
            speedup = f"{found['speedup']:.2f}×" if "speedup" in found else ""
            lines.append(f"| {name} | {found['drift']:.4f} ± {found['standard_error']:.4f} | {speedup} |")
    for count, distances in results.get("frechet", {}).items():
        lines += ["", f"Fréchet distance of {count} images to as many drawn ones.", "", "| | |", "|---|--:|"]
        lines += [f"| {name} | {distance:.2f} |" for name, distance in distances.items()]
        for name in distances:
            lines += ["", f"{name}: {described(results['frechet_machines'][count][name])}"]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
