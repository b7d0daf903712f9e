"""The built-in tasks with a compressed encoder: what benchmarks/compression.py asks beside photographs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any

import torch.nn as nn
from compressed import BATCH, SEED

from turbovlm import TurboConfig
from turbovlm.evaluate.builtin_data import DATA
from turbovlm.evaluate.builtin_models import MODELS, zoo_predictor
from turbovlm.evaluate.run import Setting, arranged
from turbovlm.evaluate.scoring import Score, scores
from turbovlm.evaluate.statistics import kept

TASKS = ("classification", "retrieval", "captioning", "vqa", "nlvr2")
"""Besides saliency, which is asked of the photographs' model; all see with its first ten blocks."""


def ask_tasks(
    variants: dict[str, Any],
    turbo: TurboConfig,
    pictures: int,
    advance: Callable[[int], object],
    tasks: tuple[str, ...] = TASKS,
) -> dict[str, list[dict[str, Any]]]:
    """Of each task the score kept with every variant's blocks, merged and unmerged; the first is the model itself.

    Args:
        variants: compressed copies of the encoder by name, the model itself first.
        turbo: how tokens are merged.
        pictures: of each task.
        advance: called with 1 after each score.
    """
    found = {}
    for task in tasks:
        predictor, data = zoo_predictor(task, MODELS[task].partition(":")[2]), DATA[task](pictures)
        prepared = [predictor.prepare(sample, None) for sample in data.samples]
        encoder = next(each for each in predictor.model.modules() if type(each).__name__ == "Dinov2Model")
        rows: list[dict[str, Any]] = []
        own: Score | None = None
        for name, variant in variants.items():
            for config in (None, turbo):
                with standing_in(encoder, variant), arranged(predictor, Setting(name, config)):
                    answers = []
                    for start in range(0, len(prepared), BATCH):
                        answers += predictor.predict(prepared[start : start + BATCH])
                score = scores(task, data, answers)[0]
                own = own or score
                share = astuple(kept(score.parts, own.parts, score.groups, seed=SEED))
                rows.append({"variant": name, "turbo": config is not None, "metric": score.name, "kept": share})
                advance(1)
        found[task] = rows
    return found


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
        "Score kept of the model that is neither compressed nor merged, with",
    ]
    lines += [
        "95 % bootstrap intervals over pictures. Loss: of both together, over the sum of the two alone; the goal is"
    ]
    lines += [f"at most {goal}.", ""]
    lines += ["| task | compression | alone | with Turbo | Turbo alone | loss |", "|---" * 6 + "|"]
    for task, rows in found.items():
        at = {(row["variant"], row["turbo"]): row["kept"] for row in rows}
        merged = at["none", True]
        for name in dict.fromkeys(row["variant"] for row in rows):
            if name != "none":
                alone, both = at[name, False], at[name, True]
                ratio = over(1 - both[0], 2 - alone[0] - merged[0])
                cells = [f"{task}: {rows[0]['metric']}", name, *map(_interval, (alone, both, merged)), ratio]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _interval(share: tuple[float, float, float]) -> str:
    return f"{share[0]:.1%} [{share[1]:.1%}, {share[2]:.1%}]"
