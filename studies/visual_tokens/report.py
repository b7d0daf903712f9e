"""The table and the plot of what evaluate.py asked: shares of right answers by sort of question, with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turbovlm_lab.evaluate.statistics import Interval, difference, mean, over_seeds
from turbovlm_lab.zoo.small_vlm import TOKENS

WHOLE, CONTROL, RANDOM = "all tokens", "smaller image", "random"
ROUNDS, GREEDY = ("information", "attention", "redundancy"), ("coverage", "dpp", "mmr", "diversity")
ALONE = (RANDOM, "uniform")
"""Those that always drop the rest."""
ORDER = (WHOLE, CONTROL, *ALONE, "pooling", *ROUNDS, *GREEDY)
SORTS = ("what", "place", "color", "number", "presence", "digits", "word", "new word", "list")
TEXT = ("digits", "word")
"""Sorts that ask for what is written, with words of the training."""
MEANING = {
    "what": "what stands at a place",
    "place": "where something stands",
    "color": "its colour",
    "number": "how many there are",
    "presence": "whether there is one",
    "digits": "the number that is written",
    "word": "the word that is written",
    "new word": "the same, of words that no training image had",
    "list": "a list of all there is, F1 of its items",
}


@dataclass(frozen=True)
class Row:
    """One way to read: scores of all questions, the mean over seeds."""

    select: str
    keep: float
    reduce: str
    question: float
    alpha: float | None
    scores: np.ndarray
    by_seed: tuple[float, ...]

    @property
    def name(self) -> str:
        parts = [self.select, self.reduce if self.select not in (WHOLE, CONTROL, RANDOM) else ""]
        parts += [f"question={self.question:g}"] if self.question else []
        parts += [] if self.alpha is None else [f"alpha={self.alpha:g}"]
        return ", ".join(filter(None, parts))

    @property
    def plain(self) -> bool:
        """Whether nothing but the selection was set."""
        return not self.question and self.alpha is None


def write_report(found: dict[str, Any], file: Path) -> None:
    """`file` with other suffixes: `.md`, and `.png` where there is more than one share of the tokens."""
    rows = rows_of(found)
    file.with_suffix(".md").write_text(table(found, rows))
    if len({row.keep for row in rows}) > 1:
        plot(found, rows, file.with_suffix(".png"))


def rows_of(found: dict[str, Any]) -> list[Row]:
    """Settings that differ in their seed alone are one row. First those of defaults, in the order of `ORDER`."""
    groups: dict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
    for entry in found["scores"].values():
        key = entry["select"], entry["keep"], entry["reduce"], entry["question"], entry.get("alpha")
        groups[key].append(entry["right"])
    rows = [
        Row(*key, np.mean(seeds, axis=0), tuple(float(np.mean(scores)) for scores in seeds))
        for key, seeds in groups.items()
    ]

    def place(row: Row) -> tuple[bool, bool, int, float]:
        dropped = row.reduce == "prune" and row.select not in ALONE
        return not row.plain, dropped, ORDER.index(row.select), row.alpha or 0

    return sorted(rows, key=place)


def of_sort(found: dict[str, Any], row: Row, sort: str | None) -> Interval:
    """The mean score of a sort of questions, of all if None; images are drawn for the interval."""
    return mean([float(row.scores[i]) for i in places(found, sort)], images_of(found, sort))


def places(found: dict[str, Any], *sorts: str | None) -> list[int]:
    """The questions of some sorts, of all if None."""
    return [i for i, (_, asks) in enumerate(found["asked"]) if asks in sorts or None in sorts]


def sorts_in(found: dict[str, Any]) -> list[str]:
    """The sorts of questions that were asked."""
    return [sort for sort in SORTS if places(found, sort)]


def table(found: dict[str, Any], rows: Sequence[Row]) -> str:
    count = {sort: len(places(found, sort)) for sort in sorts_in(found)}
    lines = [
        "# The small VLM, reading fewer visual tokens",
        "",
        f"{found['images']} crowded scenes that it has never seen, {len(found['asked'])} questions. Shares of right",
        "answers; all: the mean over all questions, with its 95 % bootstrap interval over images. Where something is",
        "drawn, it is the mean over seeds, ± Student's 95 % of them. The last column is how much higher that mean is",
        "than that of random tokens, over the same questions.",
        f"Weights: sha256 {found['weights'][:16]}….",
        "",
        *(f"- {sort}: {MEANING[sort]} ({number} questions)" for sort, number in count.items()),
        "",
    ]
    whole = [row for row in rows if row.select == WHOLE]
    for keep in sorted({row.keep for row in rows if row.select != WHOLE}, reverse=True):
        some = [*whole, *(row for row in rows if row.keep == keep and row.select != WHOLE)]
        random = next((row for row in some if row.select == RANDOM), None)
        lines += [
            f"## {keep:g} of the tokens: {round(keep * TOKENS)} of {TOKENS}",
            "",
            f"| read | {' | '.join(count)} | all | above random |",
            "|---|" + "--:|" * (len(count) + 1) + "---|",
        ]
        lines += [line(found, row, random) for row in some]
        merged = [row for row in some if row.plain and row.reduce == "merge"]
        lines += ["", *pairs(found, merged), *settings(found, some), *to_be_read(found, [*whole, *merged])]
    return "\n".join(lines)


def pairs(found: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """How much higher a choice over all pairs comes than one in rounds, over the same questions."""
    others = [row for row in rows if row.select in ROUNDS]
    greedy = [row for row in rows if row.select in GREEDY]
    if not (others and greedy):
        return []
    lines = [f"| above | {' | '.join(row.name for row in others)} |", "|---|" + "---|" * len(others)]
    for row in greedy:
        gaps = [difference(row.scores.tolist(), other.scores.tolist(), images_of(found, None)) for other in others]
        lines.append(f"| {row.name} | {' | '.join(map(said, gaps))} |")
    return [*lines, ""]


def settings(found: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """What merging is worth beside dropping, and the question beside none, over the same questions."""
    lines = []
    for select in GREEDY:
        of = {(row.reduce, row.question): row for row in rows if row.select == select and row.alpha is None}
        for better, worse in ((("merge", 0.0), ("prune", 0.0)), (("merge", 1.0), ("merge", 0.0))):
            if better in of and worse in of:
                gap = difference(of[better].scores.tolist(), of[worse].scores.tolist(), images_of(found, None))
                lines.append(f"- {of[better].name}, above {of[worse].name}: {said(gap)}")
    return [*lines, ""] if lines else []


def to_be_read(found: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """How many fewer of the numbers and words in the image are right than with all tokens, the first of `rows`."""
    lines = []
    for row in rows[1:]:
        gaps = []
        for sorts in (TEXT, *((sort,) for sort in TEXT)):
            own, whole = ([float(each.scores[i]) for i in places(found, *sorts)] for each in (row, rows[0]))
            gaps.append(said(difference(own, whole, images_of(found, *sorts))))
        lines.append(f"| {row.name} | {' | '.join(gaps)} |")
    if not lines:
        return []
    head = f"| above all tokens, of what is to be read | {' and '.join(TEXT)} | {' | '.join(TEXT)} |"
    return [head, "|---|---|---|---|", *lines, ""]


def images_of(found: dict[str, Any], *sorts: str | None) -> list[int]:
    """The image of every question of some sorts, of all if None."""
    return [found["asked"][i][0] for i in places(found, *sorts)]


def said(gap: Interval) -> str:
    return f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def line(found: dict[str, Any], row: Row, random: Row | None) -> str:
    cells = [f"{of_sort(found, row, sort).value:.2f}" for sort in sorts_in(found)]
    every = of_sort(found, row, None)
    seeds = over_seeds(row.by_seed)
    drawn = f" ± {seeds.high - seeds.value:.3f}" if len(row.by_seed) > 1 else ""
    above = ""
    if random is not None and row is not random:
        above = said(difference(row.scores.tolist(), random.scores.tolist(), images_of(found, None)))
    cells += [f"{every.value:.3f} [{every.low:.3f}, {every.high:.3f}]{drawn}", above]
    return f"| {row.name} | {' | '.join(cells)} |"


def plot(found: dict[str, Any], rows: Sequence[Row], file: Path) -> None:
    """A panel for each sort of questions: scores against tokens read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.plain and (row.reduce != "prune" or row.select in ALONE)]
    names = list(dict.fromkeys(row.name for row in shown if row.select != WHOLE))
    figure, panels = plt.subplots(2, 5, figsize=(17, 7), sharex=True)
    counts = sorted({round(row.keep * TOKENS) for row in shown if row.select != WHOLE})
    for panel in panels.flat[1 + len(sorts_in(found)) :]:
        panel.set_visible(False)
    colours = [colour for colour in plt.get_cmap("tab10").colors if len({*colour}) > 1]  # type: ignore[attr-defined]
    for panel, sort in zip(panels.flat, (None, *sorts_in(found))):
        panel.set_prop_cycle(color=[*colours, "navy"])
        for whole in (row for row in rows if row.select == WHOLE):
            at = of_sort(found, whole, sort)
            panel.axhline(at.value, color="black", linewidth=1)
            panel.axhspan(at.low, at.high, color="black", alpha=0.08)
        for number, name in enumerate(names):
            line_of = sorted((row for row in shown if row.name == name), key=lambda row: row.keep)
            points = [of_sort(found, row, sort) for row in line_of]
            values = [p.value for p in points]
            reach = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
            tokens = [row.keep * TOKENS * 2 ** (0.02 * (number - len(names) / 2)) for row in line_of]
            style = {"color": "black" if name == RANDOM else "grey"} if name in (RANDOM, CONTROL) else {}
            dashed = "--" if style else "-"
            panel.errorbar(tokens, values, reach, label=name, linestyle=dashed, marker="o", markersize=3, **style)
        panel.set_title("all questions" if sort is None else sort)
        panel.set_xscale("log")
        panel.set_xticks(counts, labels=map(str, counts))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel(f"visual tokens of {TOKENS}")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=6)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)
