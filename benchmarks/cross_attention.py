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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from cases import RESULTS, described, load, machine, save
from compression_tasks import asked
from seeds import DRAWN, IMAGES, QUICK, WAYS
from torch import Tensor

from turbovlm import ReadConfig
from turbovlm.cli.measuring import progress_bar
from turbovlm.config import Config
from turbovlm.encoder.cross_attention import Merged, attach, merged_into
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.evaluate.builtin_models import reading
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.scoring import Score
from turbovlm_lab.evaluate.statistics import kept
from turbovlm_lab.zoo.reader import SceneReader, load_scene_reader

TASKS = ("captioning", "vqa")
EYES = {"vit": "ViT-S/14", "clip": "OpenAI's CLIP ViT-B/16"}
SEEDS = 2
KEEPS = (0.5, 0.25, 0.1)
READ = {"alike": "alike", "sizes": "by size", "restored": "every position"}
"""How merged tokens are read, and what that is called in the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eyes", choices=EYES, default="vit", help="who looks (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=settings(1), metavar="WAY", help="of merging (default: all)")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"of what is drawn (default: {SEEDS})")
    parser.add_argument("--again", action="store_true", help="ask what the files have, too")
    parser.add_argument("--quick", action="store_true", help="few images and seeds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default: %(default)s)")
    args = parser.parse_args()
    seeds, images = QUICK if args.quick else (SEEDS, IMAGES)
    seeds = seeds if args.seeds is None else args.seeds
    if seeds < 1:
        parser.error(f"--seeds {seeds}: must be at least 1")
    file = args.out / f"cross_attention{'_quick' if args.quick else ''}.json"
    entry = load(file).get(args.eyes, {"tasks": {task: {"ways": {}} for task in TASKS}})
    known = () if args.again else entry["tasks"][TASKS[0]]["ways"]
    todo = {
        way: configs for way, configs in settings(seeds).items() if way in (args.ways or [way]) and way not in known
    }
    runs = len(TASKS) * (1 + sum(len(c) * sum(map(len, readings(c))) for c in todo.values()))
    if not todo:
        file.with_suffix(".md").write_text(report(load(file)))
        return
    reader, where = load_scene_reader(args.eyes), machine()
    with progress_bar(runs, "asking") as advance:
        for task, way, row in measured(reader, todo, images, advance):
            found: dict[str, Any] = load(file) | {"images": images}
            found.setdefault(args.eyes, entry)
            if way is None:
                found[args.eyes]["tasks"][task] |= row
            else:
                found[args.eyes]["tasks"][task]["ways"][way] = row | {"machine": where}
            save(file, found)
    file.with_suffix(".md").write_text(report(load(file)))
    print(report(load(file)))


def settings(seeds: int) -> dict[str, list[Config]]:
    """Ways of merging by name, each with one config for every seed, or one where nothing is drawn."""
    drawn = {way: range(seeds if way in DRAWN else 1) for way in WAYS}
    inside = {way: [replace(WAYS[way], dense=False, seed=seed) for seed in drawn[way]] for way in WAYS}
    behind = {f"visual_keep={keep}": [ReadConfig(keep)] for keep in KEEPS}
    return {"default": [*inside.pop("default")], **behind, **inside}


def readings(configs: Sequence[Config]) -> list[tuple[str, ...]]:
    """Ways of reading what these have merged, those of one encoding together; behind the encoder it stays merged."""
    merged = ("alike", "sizes")
    return [merged] if isinstance(configs[0], ReadConfig) else [merged, ("restored",)]


@torch.no_grad()
def measured(
    reader: SceneReader, ways: Mapping[str, Sequence[Config]], images: int, advance: Callable[[int], object]
) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Of each task the unmerged reader's score, by no way; then what is kept of it by each way, by way of reading."""
    data = {task: DATA[task](images) for task in TASKS}
    prepared = {task: [reading(task, reader).prepare(each, None) for each in data[task].samples] for task in TASKS}

    def scores(name: str, configs: tuple[Config, ...], reads: Sequence[str]) -> Iterator[tuple[str, str, Score]]:
        """By task and way of reading; what is read in several ways is encoded once."""
        seen: dict[bytes, tuple[Tensor, Tensor | None]] = {}
        for task in TASKS:
            predictor = reading(task, reader, dense="restored" in reads)
            for read in reads:
                with looking(reader, seen, by_size=read == "sizes"):
                    score = asked(task, predictor, data[task], prepared[task], Setting(name, configs))
                advance(1)
                yield task, read, score

    own = {task: score for task, _, score in scores("unmerged", (), ("restored",))}
    for task, score in own.items():
        yield task, None, {"metric": score.name, "own": score.value}
    for way, configs in ways.items():
        scored: dict[str, dict[str, list[Score]]] = {task: {} for task in TASKS}
        for config in configs:
            for reads in readings(configs):
                for task, read, score in scores(way, (config,), reads):
                    scored[task].setdefault(read, []).append(score)
        for task, runs in scored.items():
            yield task, way, kept_of(own[task], runs)


def kept_of(own: Score, runs: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
    """What is kept of a score by each way of reading, by seed and on average, and what sizes keep more than none."""
    row: dict[str, Any] = {}
    for read, scores in runs.items():
        shares = [kept(score.parts, own.parts, own.groups).value for score in scores]
        row[read] = {"kept": shares, "mean": astuple(kept(mean(scores), own.parts, own.groups))}
    more = [a - b for a, b in zip(mean(runs["sizes"]), mean(runs["alike"]), strict=True)]
    return row | {"more": astuple(kept(more, own.parts, own.groups))}


def mean(scores: Sequence[Score]) -> list[float]:
    """Of each sample the mean over seeds."""
    return [fmean(parts) for parts in zip(*(score.parts for score in scores), strict=True)]


@contextlib.contextmanager
def looking(reader: SceneReader, seen: dict[bytes, tuple[Tensor, Tensor | None]], by_size: bool) -> Iterator[None]:
    """The reader, which looks at each image once, and tells its decoder the sizes of tokens or not."""

    def look(pixels: Tensor) -> Tensor:
        keys = [each.numpy().tobytes() for each in pixels]
        if new := [i for i, key in enumerate(keys) if key not in seen]:
            tokens = SceneReader.look(reader, pixels[new])
            merged = merged_into(tokens)
            for row, i in enumerate(new):
                sizes = None if merged is None or merged.sizes is None else merged.sizes[row]
                seen[keys[i]] = tokens[row], sizes
        every = [sizes for key in keys if (sizes := seen[key][1]) is not None]
        tokens = torch.stack([seen[key][0] for key in keys])
        return attach(tokens, Merged.of(torch.stack(every) if by_size else None, None, True))

    reader.look = look  # type: ignore[method-assign]
    try:
        yield
    finally:
        del reader.look


def report(found: dict[str, Any]) -> str:
    lines, here = ["# Cross-attention to merged tokens", ""], dict[str, None]()
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
            for way in [way for way in settings(1) if way in entry["ways"]]:
                row = entry["ways"][way]
                cells = [cell(row[read]) if read in row else "" for read in READ]
                lines.append(f"| {way} | {' | '.join(cells)} | {points(row['more'])} |")
            lines.append("")
            here.update({described(row["machine"]): None for row in entry["ways"].values()})
    return "\n".join([*lines, *(f"- {where}." for where in here)]) + "\n"


def cell(row: dict[str, Any]) -> str:
    value, low, high = row["mean"]
    apart = f" ± {stdev(row['kept']):.1%} ×{len(row['kept'])}" if len(row["kept"]) > 1 else ""
    return f"{value:.1%}{apart} [{low:.1%}, {high:.1%}]"


def points(interval: Sequence[float]) -> str:
    value, low, high = (100 * each for each in interval)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()
