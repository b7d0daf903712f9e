"""The built-in tasks with a compressed encoder: what benchmarks/compression.py asks beside photographs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import astuple
from typing import Any

import torch.nn as nn
from compressed import BATCH, SEED

from turbovlm import TurboConfig
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.evaluate.builtin_models import MODELS, zoo_predictor
from turbovlm_lab.evaluate.data import Data
from turbovlm_lab.evaluate.run import Predictor, Setting, arranged
from turbovlm_lab.evaluate.scoring import Score, scores
from turbovlm_lab.evaluate.statistics import kept

TASKS = ("classification", "retrieval", "captioning", "vqa", "nlvr2")
"""Besides saliency, which is asked of the photographs' model; all see with its first ten blocks."""


def ask_tasks(
    variants: dict[str, Any],
    turbo: TurboConfig,
    images: int,
    advance: Callable[[int], object],
    tasks: tuple[str, ...] = TASKS,
) -> dict[str, list[dict[str, Any]]]:
    """Of each task the score kept with every variant's blocks, merged and unmerged; the first is the model itself.

    Args:
        variants: compressed copies of the encoder by name, the model itself first.
        turbo: how tokens are merged.
        images: of each task.
        advance: called with 1 after each score.
    """
    found = {}
    for task in tasks:
        predictor, data = zoo_predictor(task, MODELS[task].partition(":")[2]), DATA[task](images)
        prepared = [predictor.prepare(sample, None) for sample in data.samples]
        encoder = next(each for each in predictor.model.modules() if type(each).__name__ == "Dinov2Model")
        rows: list[dict[str, Any]] = []
        scored: dict[tuple[str, bool], Score] = {}
        for name, variant in variants.items():
            for config in (None, turbo):
                with standing_in(encoder, variant):
                    score = scored[name, config is not None] = asked(
                        task, predictor, data, prepared, Setting(name, () if config is None else (config,))
                    )
                own = scored["none", False]
                row = {"variant": name, "turbo": config is not None, "metric": score.name}
                row["kept"] = astuple(kept(score.parts, own.parts, score.groups, seed=SEED))
                if config is not None:
                    alone, merged = scored[name, False], scored["none", True]
                    row["beyond"] = beyond_sum(score.parts, alone.parts, merged.parts, own.parts, score.groups)
                rows.append(row)
                advance(1)
        found[task] = rows
    return found


def asked(task: str, predictor: Predictor, data: Data, prepared: Sequence[Any], setting: Setting) -> Score:
    """The task's first score with one setting."""
    answers: list[Any] = []
    with arranged(predictor, setting):
        for start in range(0, len(prepared), BATCH):
            answers += predictor.predict(prepared[start : start + BATCH])
    return scores(task, data, answers)[0]


def beyond_sum(
    both: Sequence[float],
    alone: Sequence[float],
    merged: Sequence[float],
    own: Sequence[float],
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float, float]:
    """What compressed and merged lose together beyond the sum of what each loses, with its 95 % bootstrap interval.

    Args:
        both, alone, merged, own: scores of the same samples: of the compressed model with tokens merged, without, of
            the model itself with tokens merged, and without.
        groups: samples that are drawn together.

    Returns:
        A share of the model's own score; below 0 where they lose less than the sum.
    """
    left = [a + m - b for a, m, b in zip(alone, merged, both, strict=True)]
    value, low, high = astuple(kept(left, own, groups, seed=SEED))
    return value - 1, low - 1, high - 1


@contextlib.contextmanager
def standing_in(encoder: Any, variant: Any) -> Iterator[None]:
    """The encoder with the first of the variant's blocks instead of its own."""
    own = encoder.encoder.layer
    encoder.encoder.layer = nn.ModuleList(list(variant.encoder.layer)[: len(own)])
    try:
        yield
    finally:
        encoder.encoder.layer = own


def task_lines(found: dict[str, list[dict[str, Any]]], over: Callable[[float, float], str], goal: float) -> list[str]:
    """As a table in Markdown; `over` writes the ratio of a loss to the sum of two."""
    lines = [
        "",
        "## The other built-in tasks",
        "",
        "*Alone* and *with Turbo*: the score as a share of that of the model that is neither compressed nor merged,",
        "with 95 % bootstrap intervals over images. *Loss*: what both lose together, over the sum of what each loses",
        f"alone; the goal is at most {goal}. *Beyond the sum*: in points; below 0, they lose less.",
        "",
    ]
    lines += ["| task | compression | alone | with Turbo | Turbo alone | loss | beyond the sum |", "|---" * 7 + "|"]
    for task, rows in found.items():
        at = {(row["variant"], row["turbo"]): row["kept"] for row in rows}
        merged = at["none", True]
        for name in dict.fromkeys(row["variant"] for row in rows):
            if name != "none":
                alone, both = at[name, False], at[name, True]
                ratio = over(1 - both[0], 2 - alone[0] - merged[0])
                cells = [f"{task}: {rows[0]['metric']}", name, *map(_interval, (alone, both, merged)), ratio]
                cells.append(points(next(row["beyond"] for row in rows if row["variant"] == name and row["turbo"])))
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def points(share: tuple[float, float, float]) -> str:
    """In points, with its interval."""
    value, low, high = (100 * each for each in share)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _interval(share: tuple[float, float, float]) -> str:
    return f"{share[0]:.1%} [{share[1]:.1%}, {share[2]:.1%}]"
