"""Which of an image's tokens the scene reader needs: every selection of `visual_keep`, by captions and answers.

    python benchmarks/choices.py                    # writes benchmarks/results/choices.{json,md}; an hour of one core
    python benchmarks/choices.py --eyes clip        # CLIP looks, not the ViT-S/14; the files have both
    python benchmarks/choices.py --selections dpp coverage --keeps 0.1     # these; what the files have is not asked
    python benchmarks/choices.py --quick --out /tmp # few images, to see that it runs

The reader's decoder cross-attends to the tokens that are left, by their sizes; the others are merged into them, but
dropped by `"random"`. It is the second judge of selections beside `studies/visual_tokens`, whose model reads a prompt.
"""

from __future__ import annotations

import argparse
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from cases import RESULTS, described, load, machine, save
from compression_tasks import asked
from cross_attention import EYES, KEEPS, TASKS, looking, mean, points
from seeds import IMAGES, QUICK

from turbovlm import ReadConfig
from turbovlm.cli.measuring import progress_bar
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.evaluate.builtin_models import reading
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.scoring import Score
from turbovlm_lab.evaluate.statistics import kept
from turbovlm_lab.zoo.reader import SceneReader, load_scene_reader

SELECTIONS = ("information", "redundancy", "attention", "coverage", "dpp", "mmr", "diversity", "random")
DRAWN = ("information", "redundancy", "attention", "random")
"""Those that a seed decides something of."""
SEEDS = 2
AGAINST = "information"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eyes", choices=EYES, default="vit", help="who looks (default: %(default)s)")
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=SELECTIONS, metavar="NAME", help="(all)")
    parser.add_argument("--keeps", nargs="+", type=float, choices=KEEPS, default=KEEPS, help="shares of the tokens")
    parser.add_argument("--quick", action="store_true", help="few images")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default: %(default)s)")
    args = parser.parse_args()
    images, file = QUICK[1] if args.quick else IMAGES, args.out / f"choices{'_quick' if args.quick else ''}.json"
    known = load(file).get(args.eyes, {})
    ways = {f"{select}, {keep:g}": (select, keep) for keep in args.keeps for select in args.selections}
    todo = {name: way for name, way in ways.items() if name not in known.get(TASKS[0], {})}
    reader, where = load_scene_reader(args.eyes), machine()
    with progress_bar(len(TASKS) * sum(len(configs(*way)) for way in todo.values()) + 2, "asking") as advance:
        data = {task: DATA[task](images) for task in TASKS}
        prepared = {task: [reading(task, reader).prepare(each, None) for each in data[task].samples] for task in TASKS}
        for name, way in {**({} if known else {"unmerged": None}), **todo}.items():
            scored: dict[str, list[Score]] = {task: [] for task in TASKS}
            for config in [()] if way is None else [(each,) for each in configs(*way)]:
                for task, score in scores(reader, data, prepared, Setting(name, config)).items():
                    scored[task].append(score)
                    advance(1)
            found: dict[str, Any] = load(file) | {"images": images}
            for task, runs in scored.items():
                row = {"metric": runs[0].name, "parts": mean(runs), "groups": runs[0].groups, "machine": where}
                found.setdefault(args.eyes, {}).setdefault(task, {})[name] = row
            save(file, found)
    file.with_suffix(".md").write_text(report(load(file)))
    print(report(load(file)))


def configs(select: str, keep: float) -> list[ReadConfig]:
    """One for every seed."""
    return [ReadConfig(keep, visual_select=select, seed=seed) for seed in range(SEEDS if select in DRAWN else 1)]


@torch.no_grad()
def scores(reader: SceneReader, data: Any, prepared: Any, setting: Setting) -> dict[str, Score]:
    """Of each task; every image is looked at once for all of them."""
    seen: dict[bytes, Any] = {}
    found = {}
    for task in TASKS:
        with looking(reader, seen, by_size=bool(setting.configs)):
            found[task] = asked(task, reading(task, reader, dense=False), data[task], prepared[task], setting)
    return found


def report(found: dict[str, Any]) -> str:
    lines, here = ["# Which of an image's tokens the scene reader needs", ""], dict[str, None]()
    lines += [
        f"What it keeps of its score with all tokens, {found['images']} images, by which tokens are left, with 95 %",
        f"bootstrap intervals over images, mean over {SEEDS} seeds where something is drawn; and how many points more",
        f"than `visual_select={AGAINST!r}`, over the same images. The rest is merged into what is left, but dropped by",
        "`random`.",
        "",
    ]
    for eyes, who in EYES.items():
        for task, rows in found.get(eyes, {}).items():
            own = rows["unmerged"]
            lines += [f"## {task}, {who}: {own['metric']}", "", f"| left | kept | above {AGAINST} |", "|---|---|---|"]
            for name, row in sorted(rows.items(), key=order):
                here[described(row["machine"])] = None
                if name == "unmerged":
                    continue
                value, low, high = astuple(kept(row["parts"], own["parts"], groups(row)))
                other = rows.get(f"{AGAINST}, {name.rpartition(', ')[2]}")
                more = ""
                if other is not None and other is not row:
                    apart = [a - b for a, b in zip(row["parts"], other["parts"], strict=True)]
                    more = points(astuple(kept(apart, own["parts"], groups(row))))
                lines.append(f"| {name} | {value:.1%} [{low:.1%}, {high:.1%}] | {more} |")
            lines.append("")
    return "\n".join([*lines, *(f"- {where}." for where in here)]) + "\n"


def groups(row: dict[str, Any]) -> list[Any] | None:
    return (
        None if row["groups"] is None else [tuple(each) if isinstance(each, list) else each for each in row["groups"]]
    )


def order(entry: tuple[str, Any]) -> tuple[float, int]:
    select, _, keep = entry[0].partition(", ")
    return (-float(keep), SELECTIONS.index(select)) if keep else (-1.0, 0)


if __name__ == "__main__":
    main()
