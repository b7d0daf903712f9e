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
    runs = len(TASKS) * (1 + sum(len(c) * sum(map(len, readings(c))) for c in settings(seeds).values()))
    reader, where = load_scene_reader(args.eyes), machine()
    with progress_bar(runs, "asking") as advance:
        tasks = measured(reader, seeds, images, advance)
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


def readings(configs: Sequence[Config]) -> list[tuple[str, ...]]:
    """Ways of reading what these have merged, those of one encoding together; behind the encoder it stays merged."""
    merged = ("alike", "sizes")
    return [merged] if isinstance(configs[0], ReadConfig) else [merged, ("restored",)]


@torch.no_grad()
def measured(reader: SceneReader, seeds: int, images: int, advance: Callable[[int], object]) -> dict[str, Any]:
    """Of each task the unmerged reader's score, and what is kept of it by way of merging and of reading."""
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
    found: dict[str, Any] = {task: {"metric": own[task].name, "own": own[task].value, "ways": {}} for task in TASKS}
    for way, configs in settings(seeds).items():
        scored: dict[tuple[str, str], list[Score]] = {}
        for config in configs:
            for reads in readings(configs):
                for task, read, score in scores(way, (config,), reads):
                    scored.setdefault((task, read), []).append(score)
        for (task, read), runs in scored.items():
            parts, groups = own[task].parts, own[task].groups
            row = found[task]["ways"].setdefault(way, {})
            shares = [kept(score.parts, parts, groups).value for score in runs]
            row[read] = {"kept": shares, "mean": astuple(kept(mean(runs), parts, groups))}
            if read == "sizes":
                more = [a - b for a, b in zip(mean(runs), mean(scored[task, "alike"]), strict=True)]
                row["more"] = astuple(kept(more, parts, groups))
    return found


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
