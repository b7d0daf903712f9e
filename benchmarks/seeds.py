"""The built-in tasks with 60 % of the encoder's multiply-accumulates, over seeds of everything that draws at random.

    python benchmarks/seeds.py                      # writes benchmarks/results/seeds.{json,md}; half an hour
    python benchmarks/seeds.py --tasks captioning   # that task; what the files have is not asked again
    python benchmarks/seeds.py --ways default ToMe --again    # those anew
    python benchmarks/seeds.py --tasks captioning --quantize int8-dynamic nf4   # on top of quantised weights as well
    python benchmarks/seeds.py --eyes clip --seeds 2          # OpenAI's CLIP looks, not the ViT-S/14; fewer seeds
    python benchmarks/seeds.py --quick --out /tmp   # few images and two seeds, to see that it runs

One seed is one draw of many: halves of the tokens, and tokens merged at random, are others with another seed, and as
good. Their row has the mean over seeds, its interval over images, and how far the seeds lie apart. The default, ToMe
and the paper's setting draw nothing.
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

from turbovlm import TurboConfig
from turbovlm.cli.measuring import progress_bar
from turbovlm.profile.quantize import QUANTIZATIONS
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.evaluate.builtin_models import MODELS, zoo_predictor
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.scoring import Score
from turbovlm_lab.evaluate.settings import by_method
from turbovlm_lab.evaluate.statistics import kept

TASKS = ("saliency", "retrieval", "nlvr2", "classification", "vqa", "captioning")
WAYS: dict[str, TurboConfig] = {
    "default": TURBO,
    "halves": replace(TURBO, blocks="every", partition="random"),
    "ToMe": by_method(TURBO, "ToMe"),
    "paper": by_method(TURBO, "paper"),
    "random": by_method(TURBO, "random"),
}
EYES = {
    "vit": {task: MODELS[task] for task in TASKS},
    "clip": {"retrieval": "zoo:clip", **dict.fromkeys(("captioning", "vqa", "nlvr2"), "zoo:clip-scenes")},
}
"""The model of each task, by the encoder that is merged."""
DRAWN = ("halves", "random")
"""Those that a seed decides something of."""
SEEDS, IMAGES = 8, 200
QUICK = 2, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="(default: all that the eyes look for)")
    parser.add_argument("--eyes", choices=EYES, default="vit", help="whose tokens are merged (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=tuple(WAYS), help="of merging (default: all)")
    parser.add_argument("--quantize", nargs="+", choices=QUANTIZATIONS, default=(), help="(default: none)")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"of what is drawn (default: {SEEDS})")
    parser.add_argument("--again", action="store_true", help="ask what the files have, too")
    parser.add_argument("--quick", action="store_true", help="few images and seeds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default: %(default)s)")
    args = parser.parse_args()
    models = EYES[args.eyes]
    if unknown := [task for task in args.tasks or () if task not in models]:
        parser.error(f"--eyes {args.eyes} looks for {', '.join(models)}, not for {', '.join(unknown)}")
    seeds, images = QUICK if args.quick else (SEEDS, IMAGES)
    seeds = seeds if args.seeds is None else args.seeds
    if seeds < 1:
        parser.error(f"--seeds {seeds}: must be at least 1")
    name = "seeds_quick" if args.quick else "seeds"
    found: dict[str, Any] = {"tasks": {}} | load(args.out / f"{name}.json")
    found["pictures"] = images
    where = machine()
    todo: dict[tuple[str, str | None], list[str]] = {}
    for kind in args.quantize or (None,):
        for task in args.tasks or models:
            known = found["tasks"].setdefault(key(task, kind, args.eyes), {"ways": {}})["ways"]
            todo[task, kind] = [way for way in args.ways if args.again or way not in known]
    runs = sum(bool(ways) + sum(len(settings(way, seeds)) for way in ways) for ways in todo.values())
    with progress_bar(runs, "asking") as advance:
        for (task, kind), ways in todo.items():
            if ways:
                entry = found["tasks"][key(task, kind, args.eyes)]
                own, rows = ask(task, models[task], ways, seeds, images, advance, kind)
                rows = {way: row | {"machine": where} for way, row in rows.items()}
                entry |= {"metric": own.name, "own": own.value, "ways": entry["ways"] | rows}
                save(args.out / f"{name}.json", found)
    (args.out / f"{name}.md").write_text(report(found))
    print(report(found))


def key(task: str, quantize: str | None, eyes: str) -> str:
    return ", ".join([task, *(["CLIP"] if eyes == "clip" else []), *([quantize] if quantize else [])])


def settings(way: str, seeds: int, quantize: str | None = None) -> list[Setting]:
    """One for each seed, or one where nothing is drawn."""
    drawn = range(seeds if way in DRAWN else 1)
    return [Setting(f"{way}, seed {s}", (replace(WAYS[way], seed=s),), quantize=quantize) for s in drawn]


@torch.no_grad()
def ask(
    task: str, model: str, ways: list[str], seeds: int, images: int, advance: Any, quantize: str | None = None
) -> tuple[Score, dict[str, Any]]:
    """The unmerged model's score; of each way what is kept by seed, and by the mean of seeds with its interval.

    With `quantize`, that of the merged model in few bits, as a share of the unmerged model's in fp32.
    """
    predictor, data = zoo_predictor(task, model.partition(":")[2]), DATA[task](images)
    prepared = [predictor.prepare(sample, None) for sample in data.samples]
    own = asked(task, predictor, data, prepared, Setting("unmerged"))
    advance(1)
    rows = {}
    for way in ways:
        scores = []
        for setting in settings(way, seeds, quantize):
            scores.append(asked(task, predictor, data, prepared, setting))
            advance(1)
        mean = [fmean(parts) for parts in zip(*(score.parts for score in scores), strict=True)]
        shares = [kept(score.parts, own.parts, own.groups).value for score in scores]
        rows[way] = {"kept": shares, "mean": astuple(kept(mean, own.parts, own.groups))}
    return own, rows


def report(found: dict[str, Any]) -> str:
    lines = ["# The built-in tasks, over seeds", ""]
    lines += [
        f"Score kept with {TURBO.flops:.0%} of the encoder's multiply-accumulates, {found['pictures']} images, with",
        "its 95 % bootstrap interval over images. Of halves and random it is the mean over as many seeds as",
        "stand behind the ×, ± their standard deviation. Halves: every block, one random half into the other.",
        "CLIP: OpenAI's ViT-B/16 looks, instead of the ViT-S/14.",
        "",
    ]
    lines += [f"| task | unmerged | {' | '.join(WAYS)} |", "|---|---|" + "---|" * len(WAYS)]
    for task, entry in found["tasks"].items():
        cells = [cell(entry["ways"][way]) if way in entry["ways"] else "" for way in WAYS]
        own = f"{entry['own']:.3f}" if "own" in entry else ""
        lines.append(f"| {task}: {entry['metric']} | {own} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *measured_on(found)]) + "\n"


def measured_on(found: dict[str, Any]) -> list[str]:
    """Machines, versions and dates, each with the ways and the tasks that were measured there."""
    here: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for task, entry in found["tasks"].items():
        for way, row in entry["ways"].items():
            ways, tasks = here.setdefault(described(row["machine"]), ({}, {}))
            ways[way] = tasks[task] = None
    return [f"- {', '.join(ways)} ({'; '.join(tasks)}): {where}." for where, (ways, tasks) in here.items()]


def cell(row: dict[str, Any]) -> str:
    value, low, high = row["mean"]
    count = len(row["kept"])
    apart = f" ± {stdev(row['kept']):.1%} ×{count}" if count > 1 else ""
    return f"{value:.1%}{apart} [{low:.1%}, {high:.1%}]"


if __name__ == "__main__":
    main()
