"""What real CLIP (ViT-B/16's image tower) still can with merged tokens, beside a smaller image of the same cost.

    python studies/photos/prepare.py                          # 256 photographs, fetched
    python studies/clip/prepare.py --names NAMES --first 80   # 300 things on photographs, fetched and composited
    python studies/clip/fetch.py                              # clothes and textiles, fetched
    python benchmarks/clip_tasks.py --names NAMES             # some 8,000 images through CLIP
    python benchmarks/clip_tasks.py --names NAMES --settings random --seeds 8     # that row, of more draws
    python benchmarks/clip_tasks.py --names NAMES --settings turbovlm --again     # that row anew
    python benchmarks/clip_tasks.py --tasks textiles clothes --limit 900          # those of more images

NAMES are embeddings of names by CLIP ViT-B/16's text tower, see `turbovlm_lab.zoo.clip_names`; the first 80 are asked
for. Every setting is left `--flops` of the encoder's multiply-accumulates. Written are
benchmarks/results/clip_tasks.{json,md,png}. What is in the JSON is not measured again, unless the setting has come to
mean something else; embeddings are kept in studies/clip/data/embeddings.

A difference is to the unmerged model over the same images, with a 95 % bootstrap interval over images; of settings
that draw at random the mean over seeds is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import RESULTS, described, load, machine, save
from clip_asked import NAMES, STUDY, TASKS, Asked, Outcome, Task, images_of
from judges import DEGREES, solve
from rich.progress import track

import turbovlm
from turbovlm.errors import TurboError
from turbovlm_lab.evaluate import statistics
from turbovlm_lab.evaluate.data import LazyImage
from turbovlm_lab.zoo import clip
from turbovlm_lab.zoo.clip_names import ClipNames, read_names

EMBEDDINGS = STUDY / "data" / "embeddings"
BATCH, SMALLER = 20, 176
OWN, DEFAULT, DRAWN = "unmerged", "turbovlm", "random"
SETTINGS = (OWN, DEFAULT, "ToMe", "paper (α=180)", DRAWN, "smaller image")


@dataclass(frozen=True)
class Setting:
    """One way to run CLIP.

    Attributes:
        turbo: what `turbovlm.apply` is given; None for the model as it is.
        pixels: per side of the image.
        is_drawn: whether a seed decides something.
    """

    turbo: dict[str, Any] | None = None
    pixels: int = clip.IMAGE_SIZE
    is_drawn: bool = False

    def applied(self, model: Any, seed: int) -> AbstractContextManager[Any]:
        """The model runs so within."""
        if self.turbo is None:
            return nullcontext()
        return turbovlm.apply(model, **self.turbo, **({"seed": seed} if self.is_drawn else {}))


def settings_of(model: Any, flops: float) -> dict[str, Setting]:
    """Those that are compared. The published ones merge equally many tokens in every block."""
    feature: Any
    with turbovlm.apply(model, r=0, blocks="every") as handle:
        (feature,) = handle.features
    amounts, _ = solve(feature.shape, feature.native_tokens, range(feature.shape.depth), flops)
    return {
        OWN: Setting(),
        DEFAULT: Setting({"flops": flops}),
        "ToMe": Setting({"r": amounts, **DEGREES["ToMe"]}),
        "paper (α=180)": Setting({"r": amounts, **DEGREES["paper (α=180)"]}),
        DRAWN: Setting({"flops": flops, **DEGREES["random"]}, is_drawn=True),
        "smaller image": Setting(pixels=SMALLER),
    }


@dataclass(frozen=True)
class Run:
    """A setting on one model.

    Attributes:
        recipe: in words, all that embeddings depend on beside images and seed.
        tokens: before the first block, then after each.
        macs: share of the multiply-accumulates of the unmerged model at its own size.
    """

    name: str
    setting: Setting
    recipe: str
    tokens: tuple[int, ...]
    macs: float


def planned(model: Any, name: str, setting: Setting) -> Run:
    feature: Any
    with turbovlm.apply(model, **(setting.turbo or {"r": 0})) as handle:
        (feature,) = handle.features
        tokens = feature.schedule((setting.pixels // clip.PATCH_SIZE) ** 2 + 1).tokens
    macs = feature.shape.macs(tokens) / feature.shape.macs((feature.native_tokens,) * len(tokens))
    words = f"{setting.pixels} px, tokens {tokens}, {feature.config if setting.turbo else OWN}"
    return Run(name, setting, words, tokens, macs)


def embedded(model: Any, name: str, run: Run, seed: int, limit: int, again: bool) -> np.ndarray:
    """A set's first images, `[images, 512]`, of length 1; those batches that are not in the folder yet are embedded."""
    images = images_of(name).first(limit).images
    batches = {
        EMBEDDINGS / f"{name.replace(' ', '-')}-{fingerprint(batch, run, seed)}.npy": batch
        for batch in (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    }
    missing = [path for path in batches if again or not path.is_file()]
    if missing:
        EMBEDDINGS.mkdir(parents=True, exist_ok=True)
        with run.setting.applied(model, seed), torch.inference_mode():
            for path in track(missing, f"{name}, {run.name}, seed {seed}"):
                pixels = clip.preprocess([image.open() for image in batches[path]], run.setting.pixels)
                with (draft := path.with_suffix(".part")).open("wb") as file:
                    np.save(file, clip.embed(model, pixels).numpy())
                draft.replace(path)
    return np.concatenate([np.load(path) for path in batches])


def fingerprint(images: Sequence[LazyImage], run: Run, seed: int) -> str:
    known = json.dumps([[image.name for image in images], run.recipe, seed])
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def measured(
    model: Any, task: Task, run: Run, own: Run, names: ClipNames | None, seeds: int, limit: int, again: bool
) -> dict[str, Any]:
    """What a setting answers in a task, beside the model's `own` answers."""
    labels = {name: images_of(name).first(limit).labels for name in task.sets}
    whole = {name: embedded(model, name, own, 0, limit, again and run is own) for name in task.sets}
    outcomes = []
    for seed in range(seeds if run.setting.is_drawn else 1):
        vectors = {name: embedded(model, name, run, seed, limit, again) for name in task.sets}
        outcomes.append(task.ask(Asked(vectors, whole, labels, names)))
    base = task.ask(Asked(whole, whole, labels, names))
    measures = {name: compared([each[name] for each in outcomes], base[name]) for name in base}
    about = {"recipe": run.recipe, "tokens": run.tokens, "macs": run.macs, "seeds": len(outcomes), "limit": limit}
    return {**about, "images": {name: len(vectors) for name, vectors in whole.items()}, "measures": measures}


def is_known(row: dict[str, Any] | None, run: Run, seeds: int, limit: int) -> bool:
    """Whether a row of the JSON is of the setting as it is now, of those images, and of as many seeds or more."""
    wanted = {"recipe": run.recipe, "limit": limit}
    return row is not None and row | wanted == row and row["seeds"] >= (seeds if run.setting.is_drawn else 1)


def compared(own: Sequence[Outcome], whole: Outcome) -> dict[str, Any]:
    """Outcomes by seed beside the unmerged model's: score, difference with its interval, share of same answers."""
    row: dict[str, Any] = {}
    if whole.answers is not None:
        same = np.mean([each.answers == whole.answers for each in own], axis=(0, 1))
        row["same"] = list(astuple(statistics.mean(same.tolist())))
    if whole.scores is not None:
        scores = [each.scores for each in own if each.scores is not None]
        mean = np.mean(scores, axis=0)
        more = mean - whole.scores
        found = over_pairs(more) if more.ndim == 2 else statistics.mean(more.tolist())
        row["score"], row["difference"] = float(mean.mean()), list(astuple(found))
        row["by seed"] = [float(each.mean()) for each in scores]
    return row


def over_pairs(values: np.ndarray, seed: int = 0) -> statistics.Interval:
    """The mean of `[a, b]`, values of pairs, with its bootstrap interval: samples of both kinds are drawn."""
    chance = np.random.default_rng(seed)
    first, second = (chance.multinomial(n, np.full(n, 1 / n), statistics.DRAWS) / n for n in values.shape)
    edge = (1 - statistics.LEVEL) / 2
    low, high = np.quantile(((first @ values) * second).sum(axis=1), [edge, 1 - edge])
    return statistics.Interval(float(values.mean()), float(low), float(high))


def report(found: dict[str, Any]) -> str:
    lines = ["# Tasks on real CLIP", ""]
    lines += [
        f"ViT-B/16's image tower, {found['flops']:.0%} of the multiply-accumulates. {described(found['machine'])}"
    ]
    lines += ["", "Differences to the unmerged model in points, with 95 % bootstrap intervals over images; in round"]
    lines += [
        "brackets how often the answer is the unmerged model's. Of settings that draw at random means over seeds."
    ]
    lines += [
        "What photographs show is not known to the benchmark: of them there is the share of same labels alone.",
        "",
    ]
    lines += ["## At a glance", "", *table(found, {task: TASKS[task].headlines for task in tasks_in(found)})]
    for task, rows in tasks_in(found).items():
        measures = list(dict.fromkeys(name for row in rows.values() for name in row["measures"]))
        counts = " or ".join(
            {", ".join(f"{n} {name}" for name, n in row["images"].items()): 0 for row in rows.values()}
        )
        lines += ["", f"## {task}", "", f"Images: {counts}.", "", *table(found, {task: measures})]
    lines += ["", "## What was run", "", "| setting | MACs | seeds | tokens before and after each block |"]
    lines += ["|---|--:|--:|---|"]
    for name, row in settings_in(found).items():
        lines.append(f"| {name} | {row['macs']:.3f} | {row['seeds']} | {' '.join(map(str, row['tokens']))} |")
    return "\n".join([*lines, *by_seed(found)]) + "\n"


def table(found: dict[str, Any], wanted: Mapping[str, Sequence[str]]) -> list[str]:
    """A row for each task and measure, a column for each setting."""
    columns = [name for name in settings_in(found) if name != OWN]
    lines = [f"| task | {OWN} | {' | '.join(columns)} |", f"|---|--:|{'--:|' * len(columns)}"]
    for task, measures in wanted.items():
        rows = found["tasks"][task]
        for measure in measures:
            whole = rows.get(OWN, {}).get("measures", {}).get(measure, {})
            cells = [f"{whole['score']:.1%}" if "score" in whole else ""]
            cells += [cell(rows[name]["measures"][measure]) if name in rows else "" for name in columns]
            lines.append(f"| {task}: {measure} | {' | '.join(cells)} |")
    return lines


def cell(measure: dict[str, Any]) -> str:
    same = [f"({measure['same'][0]:.0%})"] if "same" in measure else []
    if "difference" not in measure:
        low, high = measure["same"][1:]
        return f"{same[0]} [{low:.0%}, {high:.0%}]"
    value, low, high = (100 * each for each in measure["difference"])
    return " ".join([f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", *same])


def by_seed(found: dict[str, Any]) -> list[str]:
    """The scores of what is drawn by seed, with Student's interval of their mean; nothing where there is one seed."""
    rows = []
    for task, measured_rows in tasks_in(found).items():
        for name, measure in measured_rows.get(DRAWN, {"measures": {}})["measures"].items():
            if len(measure.get("by seed", ())) > 1:
                value, low, high = astuple(statistics.over_seeds(measure["by seed"]))
                listed = ", ".join(f"{100 * each:.1f}" for each in measure["by seed"])
                rows.append(f"| {task}: {name} | {listed} | {value:.1%} [{low:.1%}, {high:.1%}] |")
    if not rows:
        return []
    told = f"The scores of {DRAWN}; their mean with Student's 95 % interval over seeds."
    return ["", "## By seed", "", told, "", "| task | by seed | mean |", "|---|---|--:|", *rows]


def tasks_in(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of each task that was measured, in the order of `TASKS`."""
    return {name: found["tasks"][name] for name in TASKS if found["tasks"].get(name)}


def settings_in(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that were measured, each with a row of its."""
    rows = {name: row for task in tasks_in(found).values() for name, row in task.items()}
    return {name: rows[name] for name in SETTINGS if name in rows}


def plot(found: dict[str, Any], path: Path) -> None:
    """What is lost at a glance: differences in points, with intervals; of photographs, the share of other answers."""
    from matplotlib.figure import Figure

    wanted = [(task, measure) for task in tasks_in(found) for measure in TASKS[task].headlines]
    names = [name for name in settings_in(found) if name != OWN]
    figure = Figure(figsize=(11, 1.2 + 2.2 * -(-len(wanted) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(wanted) // 4), 4, sharey=True, squeeze=False).ravel()
    for axis, (task, measure) in zip(axes, wanted):
        rows = found["tasks"][task]
        for place, name in enumerate(names):
            if name not in rows:
                continue
            row = rows[name]["measures"][measure]
            value, low, high = (100 * e for e in row.get("difference", [share - 1 for share in row.get("same", ())]))
            style = {"marker": "o", "capsize": 3, "color": "#0b6e99" if name == DEFAULT else "0.45"}
            axis.errorbar(value, place, xerr=[[value - low], [high - value]], **style)
        score = rows.get(OWN, {}).get("measures", {}).get(measure, {}).get("score")
        told = "other label than unmerged" if score is None else f"{measure}: {score:.0%} unmerged"
        axis.set_title(f"{task}\n{told}", fontsize=7.5, loc="left")
        axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=5)
    for axis in axes[len(wanted) :]:
        axis.set_visible(False)
    figure.axes[0].set_yticks(range(len(names)), names)
    figure.axes[0].invert_yaxis()
    figure.supxlabel(f"points lost or won at {found['flops']:.0%} of the multiply-accumulates", fontsize=9)
    figure.savefig(path, dpi=150)


def first_names(source: str) -> ClipNames:
    found = read_names(source)
    return ClipNames(found.names[:NAMES], found.vectors[:NAMES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", metavar="PATH", help="embeddings of names, a folder or a .npy")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="(default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="of what is drawn at random (default: %(default)s)")
    parser.add_argument("--flops", type=float, default=0.6, help="share of the cost left (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=256, help="images of each set at most (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure those rows anew")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default: %(default)s)")
    args = parser.parse_args()
    path = args.out / "clip_tasks.json"
    found: dict[str, Any] = {"flops": args.flops, "tasks": {}} | load(path)
    if found["flops"] != args.flops:
        parser.error(f"--flops {args.flops}: {path} was measured at {found['flops']}; remove it first")
    if args.names is None and any(TASKS[task].needs_names for task in args.tasks):
        parser.error("--names: embeddings of names are needed, see --help; or leave out photographs and stamps")
    try:
        names = None if args.names is None else first_names(args.names)
        content = None if names is None else hashlib.sha256(names.vectors.numpy().tobytes()).hexdigest()[:16]
        if content is not None and found.setdefault("names", content) != content:
            parser.error(f"--names {args.names}: {path} was measured with others; remove it first")
        model = clip.load_clip()
        runs = {name: planned(model, name, setting) for name, setting in settings_of(model, args.flops).items()}
        for task in args.tasks:
            rows = found["tasks"].setdefault(task, {})
            for run in (runs[name] for name in args.settings):
                if args.again or not is_known(rows.get(run.name), run, args.seeds, args.limit):
                    rows[run.name] = measured(
                        model, TASKS[task], run, runs[OWN], names, args.seeds, args.limit, args.again
                    )
                    save(path, found | {"machine": machine()})
    except TurboError as error:
        parser.error(str(error))
    found = load(path)
    path.with_suffix(".md").write_text(report(found))
    plot(found, path.with_suffix(".png"))
    print(report(found))


if __name__ == "__main__":
    main()
