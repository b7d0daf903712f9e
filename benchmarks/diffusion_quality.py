"""What merging costs in pictures: drift from the unmerged run of the same seed, and Fréchet distance, beside tomesd.

    python benchmarks/diffusion_quality.py                       # drift and time of all settings
    python benchmarks/diffusion_quality.py --frechet 2000        # and Fréchet distances, hours

On the small text-to-image model trained on emoji (turbovlm.zoo.emoji), 64×64 pixels, 12 steps, guidance 3, fp32. Drift
is the relative error of the last latent, per picture; its mean and standard error. Time is process CPU time of whole
calls without the text encoder, settings in turn, as a ratio to the pipeline's own; medians. The Fréchet distance is
between features of a ViT-S/14 (CLS after block 9, of pictures scaled to 112 pixels) of the pictures made and of as many
drawn ones.
tomesd (pip install --no-deps tomesd) merges in all components, by its deterministic partition.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import RESULTS, machine, save
from torch import Tensor
from tqdm import tqdm

import turbovlm
from turbovlm.zoo.emoji import emoji_prompts, load_emoji_pipeline

KEEPS = (0.9, 0.8, 0.7, 0.5, 0.3)
STEPS, GUIDANCE, BATCH = 12, 3.0, 16
Within = Callable[[Any], contextlib.AbstractContextManager[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96, metavar="N", help="for drift (default 96)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of timing (default 5); 0 for none")
    parser.add_argument("--only", metavar="TEXT", help="settings whose name contains it")
    parser.add_argument("--out", default="diffusion_quality", metavar="NAME", help="of the files under results")
    args = parser.parse_args()
    if importlib.util.find_spec("tomesd") is None:
        parser.error("tomesd is compared with: pip install --no-deps tomesd")
    pipe = load_emoji_pipeline()
    pipe.set_progress_bar_config(disable=True)
    chosen = {name: within for name, within in settings().items() if not args.only or args.only in name}
    file = RESULTS / f"{args.out}.json"
    results: dict[str, Any] = {"machine": machine(), "pictures": args.pictures, "settings": {}}
    texts = embedded(pipe, prompts(args.pictures))
    plain = latents(pipe, texts)
    for name, within in tqdm(chosen.items(), unit=" settings"):
        with within(pipe):
            drifts = relative_error(latents(pipe, texts), plain)
        results["settings"][name] = {
            "drift": float(drifts.mean()),
            "standard_error": float(drifts.std() / len(drifts) ** 0.5),
        }
        print(name, f"{drifts.mean():.4f} ± {drifts.std() / len(drifts) ** 0.5:.4f}", file=sys.stderr, flush=True)
    for name, ratio in times(pipe, texts, chosen, args.rounds).items():
        results["settings"][name]["speedup"] = ratio
    save(file, results)


def settings() -> dict[str, Within]:
    """All that is compared, by name."""
    found: dict[str, Within] = {}
    for keep in KEEPS:
        found[f"turbovlm, keep={keep:g}"] = merged(keep=keep)
        found[f"turbovlm, refresh=3, keep={keep:g}"] = merged(keep=keep, refresh=3)
        found[f"tomesd, keep={keep:g}"] = by_tomesd(keep, 1)
        found[f"tomesd, two resolutions, keep={keep:g}"] = by_tomesd(keep, 2)
    for refresh in (2, 4, 6, 12):
        found[f"turbovlm, refresh={refresh}, keep=0.5"] = merged(keep=0.5, refresh=refresh)
    found["turbovlm, halves apart, keep=0.5"] = merged(keep=0.5, share_guidance=False)
    for degree in ("redundancy", "random"):
        found[f"turbovlm, {degree}, keep=0.5"] = merged(keep=0.5, degree=degree)
    for alpha in (20, 200, 2000):
        found[f"turbovlm, alpha={alpha}, keep=0.5"] = merged(keep=0.5, alpha=alpha)
    for component in ("attention", "cross_attention", "ffn"):
        found[f"turbovlm, {component} only, keep=0.5"] = merged(keep=0.5, components=[component])
    return found


def merged(**given: Any) -> Within:
    return lambda pipe: turbovlm.apply(pipe, **given)


def by_tomesd(keep: float, downsampling: int) -> Within:
    """tomesd, deterministic, in resolutions down to that one."""

    @contextlib.contextmanager
    def within(pipe: Any) -> Iterator[None]:
        import tomesd

        where = {"max_downsample": downsampling, "merge_attn": True, "merge_crossattn": True, "merge_mlp": True}
        tomesd.apply_patch(pipe, ratio=1 - keep, use_rand=False, **where)
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
    """Per picture."""
    return (made - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)


def times(pipe: Any, texts: tuple[Tensor, Tensor], chosen: dict[str, Within], rounds: int) -> dict[str, float]:
    """How many times faster than the pipeline itself each setting makes a picture: medians over rounds."""
    every: dict[str, Within] = {"plain": lambda pipe: contextlib.nullcontext(), **chosen}
    spent: dict[str, list[float]] = {name: [] for name in every}
    one = (texts[0][:1], texts[1][:1])
    for number in tqdm(range(rounds + 1), unit=" rounds", disable=not rounds):
        for name in every if number % 2 else reversed(every):
            with every[name](pipe):
                begun = time.process_time()
                latents(pipe, one)
                spent[name].append(time.process_time() - begun)
    if not rounds:
        return {}
    ratios = {name: [a / b for a, b in zip(spent["plain"][1:], spent[name][1:])] for name in chosen}
    return {name: statistics.median(values) for name, values in ratios.items()}


if __name__ == "__main__":
    main()
