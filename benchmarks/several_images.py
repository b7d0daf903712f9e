"""Which of several images in one sequence should give how many tokens: drift of what is denoised beside a reference.

    python benchmarks/several_images.py                # writes benchmarks/results/several_images.{json,md}; minutes
    python benchmarks/several_images.py --images 2 --keeps 0.5 --out tried

On the small text-to-image transformer of FLUX's kind (turbovlm_lab.zoo.drawings), whose 1,024 tokens of latent have the
1,024 of a finished image behind them, placed as FLUX Kontext places its reference. It was not trained with references,
but attends to them: the second table says how much they matter to it. Drift is the relative error of one forward's
output for the latent against the unmerged forward, over latents from three steps of twelve; fp32, one thread. The
reference is the same image or another. Which image gives how many tokens is set by a degree that ranks as said.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from cases import RESULTS, described, machine, save
from torch import Tensor
from tqdm import tqdm

import turbovlm
from turbovlm_lab.zoo.drawings import load_drawings_pipeline
from turbovlm_lab.zoo.emoji import emoji_prompts

STEPS, SEEN, SIDE = 12, (1, 5, 9), 64
TOKENS, CANDIDATES = 1024, 768
"""Of each image: its tokens, and those that are no destination."""


def alike(redundancy: Tensor, semantic: Tensor, block: int) -> Tensor:
    """As large a share of each image: by the place in its own ranking."""
    places = [each.argsort(dim=1).argsort(dim=1) for each in redundancy.split(CANDIDATES, dim=1)]
    return torch.cat(places, dim=1).to(redundancy)


def reference_first(redundancy: Tensor, semantic: Tensor, block: int) -> Tensor:
    """All that can go of the reference before any of the latent."""
    return redundancy - 3 * (torch.arange(redundancy.shape[1]) < CANDIDATES)


def latent_first(redundancy: Tensor, semantic: Tensor, block: int) -> Tensor:
    """All that can go of the latent before any of the reference."""
    return redundancy + 3 * (torch.arange(redundancy.shape[1]) < CANDIDATES)


VERSIONS: dict[str, str | Callable[[Tensor, Tensor, int], Tensor]] = {
    "one ranking": "redundancy",
    "as large a share of each": alike,
    "the reference first": reference_first,
    "the latent first": latent_first,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3, metavar="N", help="prompts, a seed each (default 3)")
    parser.add_argument("--keeps", type=float, nargs="+", default=(0.8, 0.7, 0.5), metavar="SHARE")
    parser.add_argument("--out", default="several_images", metavar="NAME", help="of the files under results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_drawings_pipeline()
    pipe.set_progress_bar_config(disable=True)
    every = emoji_prompts()
    prompts = [every[i * len(every) // args.images] for i in range(args.images)]
    given, finals = seen(pipe, prompts)
    model, runs = pipe.transformer, []
    matters = {}
    for name, turn in {"the same image": 0, "another image": 1}.items():
        inputs = [beside(each, finals[(i // len(SEEN) + turn) % len(finals)]) for i, each in enumerate(given)]
        plain = outputs(model, inputs)
        matters[name] = spread(drifts(outputs(model, given), plain))
        for keep in args.keeps:
            for version, degree in tqdm(VERSIONS.items(), desc=f"{name}, keep={keep:g}"):
                with turbovlm.apply(model, keep=keep, degree=degree) as handle:
                    drift = spread(drifts(outputs(model, inputs), plain))
                    choice = next(iter((handle.features[0].last or {}).values()))
                left = choice.left_of_first()[0][1]
                runs.append({"reference": name, "keep": keep, "version": version, "drift": drift, "left": left})
    results = {"machine": machine(), "images": args.images, "matters": matters, "runs": runs}
    save(RESULTS / f"{args.out}.json", results)
    (RESULTS / f"{args.out}.md").write_text(report(results))
    print(report(results))


def seen(pipe: Any, prompts: list[str]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """What the denoiser is given in the steps `SEEN` of each image, and the images, `[1, tokens, channels]`."""
    model, given, finals = pipe.transformer, [], []
    own, calls = model.forward, list[dict[str, Any]]()
    model.forward = lambda **inputs: (calls.append(inputs), own(**inputs))[1]
    for seed, prompt in enumerate(tqdm(prompts, desc="images")):
        calls.clear()
        size = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "guidance_scale": 3.0}
        out = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **size)
        finals.append(out.images)
        given += [calls[step] for step in SEEN]
    del model.forward
    return given, finals


def beside(given: dict[str, Any], reference: Tensor) -> dict[str, Any]:
    """The same with a reference behind the latent, at its own positions of another image."""
    places = given["img_ids"].clone()
    places[:, 0] = 1
    tokens = torch.cat((given["hidden_states"], reference.to(given["hidden_states"])), dim=1)
    return {**given, "hidden_states": tokens, "img_ids": torch.cat((given["img_ids"], places))}


@torch.no_grad()
def outputs(model: Any, inputs: list[dict[str, Any]]) -> list[Tensor]:
    """What each forward gives for the latent."""
    return [model(**{**each, "return_dict": False})[0][:, :TOKENS] for each in inputs]


def drifts(found: list[Tensor], plain: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, plain)]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    each = torch.tensor(values)
    return float(each.mean()), float(each.std() / len(values) ** 0.5)


def report(results: dict[str, Any]) -> str:
    lines = ["# Several images in one sequence", "", described(results["machine"]), ""]
    lines += [f"Drift of the latent of {results['images']} images, in three steps each, mean ± standard error.", ""]
    lines += [
        "| reference | keep | which give tokens | tokens left of the latent | drift |",
        "|---|--:|---|--:|--:|",
    ]
    for run in results["runs"]:
        mean, error = run["drift"]
        row = run["reference"], f"{run['keep']:g}", run["version"], str(run["left"]), f"{mean:.4f} ± {error:.4f}"
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "| reference | drift where it is taken away |", "|---|--:|"]
    lines += [f"| {name} | {mean:.3f} ± {error:.3f} |" for name, (mean, error) in results["matters"].items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
