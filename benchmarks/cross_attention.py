"""What it is worth that cross-attention counts merged tokens by size: captions and answers of the scene reader.

    python benchmarks/cross_attention.py                  # writes benchmarks/results/cross_attention.{json,md}
    python benchmarks/cross_attention.py --eyes clip      # CLIP looks, not the ViT-S/14; the files have both
    python benchmarks/cross_attention.py --quick --out /tmp    # few images and seeds, to see that it runs

The decoder reads merged tokens all alike, or by their sizes, or every position, restored. Tokens are merged in the
encoder, to 60 % of its multiply-accumulates, or behind it by `visual_keep`. What is asked, of how many images, and the
ways of merging are those of seeds.py.

Expected before anything was measured: log s gives a token the attention that its copies would get, so that sizes keep
what copies at every position keep, about 80 % of CIDEr in halves where tokens read alike keep about 60 %. Restoring
what set tokens apart as well, as `dense=True` does by default, keeps as much or a little more. Of what `visual_keep`
merges, sizes help the more, the fewer tokens are left, as these then differ more in size.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from cases import RESULTS, described, load, machine, save
from compression_tasks import asked
from seeds import DRAWN, IMAGES, QUICK, WAYS

from turbovlm import ReadConfig
from turbovlm.cli.measuring import progress_bar
from turbovlm.config import Config
from turbovlm.encoder.cross_attention import Merged, attach
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.evaluate.builtin_models import reading
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.scoring import Score
from turbovlm_lab.evaluate.statistics import kept
from turbovlm_lab.zoo.reader import SceneReader, load_scene_reader

TASKS = ("captioning", "vqa")
EYES = {"vit": "ViT-S/14", "clip": "OpenAI's CLIP ViT-B/16"}
SEEDS = 4
KEEPS = (0.5, 0.25, 0.1)
READ = {"alike": "alike", "sizes": "by size", "restored": "every position"}
"""How merged tokens are read, and what that is called in the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eyes", choices=EYES, default="vit", help="who looks (default: %(default)s)")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"of what is drawn (default: {SEEDS})")
    parser.add_argument("--quick", action="store_true", help="few images and seeds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default: %(default)s)")
    args = parser.parse_args()
    seeds, images = QUICK if args.quick else (SEEDS, IMAGES)
    seeds = seeds if args.seeds is None else args.seeds
    if seeds < 1:
        parser.error(f"--seeds {seeds}: must be at least 1")
    name = "cross_attention_quick" if args.quick else "cross_attention"
    runs = len(TASKS) * (1 + sum(len(configs) * len(readings(configs)) for configs in settings(seeds).values()))
    reader, where = load_scene_reader(args.eyes), machine()
    with progress_bar(runs, "asking") as advance:
        tasks = {task: measured(task, reader, seeds, images, advance) for task in TASKS}
    found: dict[str, Any] = load(args.out / f"{name}.json") | {"images": images}
    found[args.eyes] = {"machine": where, "tasks": tasks}
    save(args.out / f"{name}.json", found)
    (args.out / f"{name}.md").write_text(report(found))
    print(report(found))


def settings(seeds: int) -> dict[str, list[Config]]:
    """Ways of merging by name, each with one config for every seed, or one where nothing is drawn."""
    drawn = {way: range(seeds if way in DRAWN else 1) for way in WAYS}
    found: dict[str, list[Config]] = {
        way: [replace(WAYS[way], dense=False, seed=seed) for seed in drawn[way]] for way in WAYS
    }
    return found | {f"visual_keep={keep}": [ReadConfig(keep)] for keep in KEEPS}


def readings(configs: Sequence[Config]) -> list[str]:
    """Ways of reading what these have merged; what is merged behind the encoder is not restored."""
    return [read for read in READ if read != "restored" or not isinstance(configs[0], ReadConfig)]


@torch.no_grad()
def measured(
    task: str, reader: SceneReader, seeds: int, images: int, advance: Callable[[int], object]
) -> dict[str, Any]:
    """The unmerged reader's score, and what is kept of it by way of merging and of reading."""
    data = DATA[task](images)
    whole, merged = reading(task, reader), reading(task, reader, dense=False)
    prepared = [whole.prepare(sample, None) for sample in data.samples]
    own = asked(task, whole, data, prepared, Setting("unmerged"))
    advance(1)
    rows: dict[str, Any] = {}
    for way, configs in settings(seeds).items():
        row, scored = rows.setdefault(way, {}), {}
        for read in readings(configs):
            scored[read] = []
            for config in configs:
                predictor = whole if read == "restored" else merged
                with unsized(reader) if read == "alike" else contextlib.nullcontext():
                    scored[read].append(asked(task, predictor, data, prepared, Setting(way, (config,))))
                advance(1)
            shares = [kept(score.parts, own.parts, own.groups).value for score in scored[read]]
            row[read] = {"kept": shares, "mean": astuple(kept(mean(scored[read]), own.parts, own.groups))}
        more = [a - b for a, b in zip(mean(scored["sizes"]), mean(scored["alike"]), strict=True)]
        row["more"] = astuple(kept(more, own.parts, own.groups))
    return {"metric": own.name, "own": own.value, "ways": rows}


def mean(scores: Sequence[Score]) -> list[float]:
    """Of each sample the mean over seeds."""
    return [fmean(parts) for parts in zip(*(score.parts for score in scores), strict=True)]


@contextlib.contextmanager
def unsized(reader: SceneReader) -> Iterator[None]:
    """The reader, whose decoder is told nothing of sizes."""
    reader.look = lambda pixels: attach(SceneReader.look(reader, pixels), Merged())  # type: ignore[method-assign]
    try:
        yield
    finally:
        del reader.look


def report(found: dict[str, Any]) -> str:
    lines = ["# Cross-attention to merged tokens", ""]
    lines += [
        f"What the scene reader keeps of its unmerged score, {found['images']} images, with 95 % bootstrap intervals",
        "over images; where something is drawn, the mean over as many seeds as stand behind the ×, ± their standard",
        "deviation. Its decoder reads merged tokens alike, by size (log s is added to the scores), or every position,",
        "restored; *more* is what sizes keep beyond reading alike, in points. With 60 % of the encoder's",
        "multiply-accumulates, or all of them and `visual_keep` behind it.",
        "",
    ]
    for eyes, who in EYES.items():
        for task, entry in found.get(eyes, {"tasks": {}})["tasks"].items():
            lines += [f"## {task}, {who}: {entry['metric']}, {entry['own']:.3f} unmerged", ""]
            lines += [f"| merged | {' | '.join(READ.values())} | more |", "|---" * (2 + len(READ)) + "|"]
            for way, row in entry["ways"].items():
                cells = [cell(row[read]) if read in row else "" for read in READ]
                lines.append(f"| {way} | {' | '.join(cells)} | {points(row['more'])} |")
            lines.append("")
    where = [f"- {EYES[eyes]}: {described(found[eyes]['machine'])}." for eyes in EYES if eyes in found]
    return "\n".join([*lines, *where]) + "\n"


def cell(row: dict[str, Any]) -> str:
    value, low, high = row["mean"]
    apart = f" ± {stdev(row['kept']):.1%} ×{len(row['kept'])}" if len(row["kept"]) > 1 else ""
    return f"{value:.1%}{apart} [{low:.1%}, {high:.1%}]"


def points(interval: Sequence[float]) -> str:
    value, low, high = (100 * each for each in interval)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()
