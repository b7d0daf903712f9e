"""What the draw of the random halves is worth: the built-in tasks with 60 % of the multiply-accumulates, by seed.

    python benchmarks/seeds.py                      # writes benchmarks/results/seeds.{json,md}; a quarter of an hour
    python benchmarks/seeds.py --tasks captioning   # that task anew; the files keep the others
    python benchmarks/seeds.py --tasks captioning --quantize int8-dynamic nf4   # on top of quantised weights as well
    python benchmarks/seeds.py --quick --out /tmp   # few images and two seeds, to see that it runs

Who may be merged into whom is drawn by `TurboConfig.seed`, 0 unless told otherwise. Another seed is another draw, and
as good: it sends tokens elsewhere and changes some answers. One seed's score is therefore one sample of many; this
tells how far they lie apart.
"""

from __future__ import annotations

import argparse
from dataclasses import astuple, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from cases import RESULTS, described, load, machine, save
from compression import TURBO
from compression_tasks import asked

from turbovlm.cli.measuring import progress_bar
from turbovlm.profile.quantize import QUANTIZATIONS
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.evaluate.builtin_models import MODELS, zoo_predictor
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.statistics import kept

TASKS = ("saliency", "retrieval", "nlvr2", "classification", "vqa", "captioning")
SEEDS, IMAGES = 8, 200
QUICK = {"seeds": 2, "pictures": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="(default: all)")
    parser.add_argument("--quantize", nargs="+", choices=QUANTIZATIONS, default=(), help="(default: none)")
    parser.add_argument("--quick", action="store_true", help="few images and seeds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default: %(default)s)")
    args = parser.parse_args()
    sizes = QUICK if args.quick else {"seeds": SEEDS, "pictures": IMAGES}
    name = "seeds_quick" if args.quick else "seeds"
    found: dict[str, Any] = {"tasks": {}} | load(args.out / f"{name}.json")
    found |= {"machine": machine(), **sizes}
    todo = [(task, kind) for kind in args.quantize or (None,) for task in args.tasks]
    with progress_bar(len(todo) * (1 + sizes["seeds"]), "asking") as advance:
        for task, kind in todo:
            key = task if kind is None else f"{task}, {kind}"
            found["tasks"][key] = by_seed(task, sizes["seeds"], sizes["pictures"], advance, kind)
            save(args.out / f"{name}.json", found)
    (args.out / f"{name}.md").write_text(report(found))
    print(report(found))


@torch.no_grad()
def by_seed(task: str, seeds: int, images: int, advance: Any, quantize: str | None = None) -> dict[str, Any]:
    """The score kept by each seed, and by their mean, with its interval over images.

    With `quantize`, that of the merged model in few bits, as a share of the unmerged model's in fp32.
    """
    predictor, data = zoo_predictor(task, MODELS[task].partition(":")[2]), DATA[task](images)
    prepared = [predictor.prepare(sample, None) for sample in data.samples]

    settings = [Setting("unmerged")]
    settings += [Setting(f"seed {s}", (replace(TURBO, seed=s),), quantize=quantize) for s in range(seeds)]
    found = []
    for setting in settings:
        found.append(asked(task, predictor, data, prepared, setting))
        advance(1)
    own, *merged = found
    mean = [fmean(parts) for parts in zip(*(score.parts for score in merged), strict=True)]
    shares = [kept(score.parts, own.parts, own.groups).value for score in merged]
    return {"metric": own.name, "kept": shares, "mean": astuple(kept(mean, own.parts, own.groups))}


def report(found: dict[str, Any]) -> str:
    lines = ["# The draw of the random halves", "", f"{described(found['machine'])}.", ""]
    lines += [f"Score kept with {TURBO.flops:.0%} of the encoder's multiply-accumulates, {found['pictures']} images,"]
    lines += [f"by seeds 0 to {found['seeds'] - 1}; the mean with its 95 % bootstrap interval over images.", ""]
    lines += ["| task | by seed | mean | standard deviation over seeds |", "|---|---|---|--:|"]
    for task, rows in found["tasks"].items():
        shares = ", ".join(f"{share:.1%}" for share in rows["kept"])
        value, low, high = rows["mean"]
        lines.append(
            f"| {task}: {rows['metric']} | {shares} | {value:.1%} [{low:.1%}, {high:.1%}] | {stdev(rows['kept']):.1%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
