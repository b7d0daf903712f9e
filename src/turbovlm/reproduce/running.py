"""Comparisons run: one model and its data for all that is asked of a task, every setting once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbovlm.config import TurboConfig
from turbovlm.evaluate.data import Data
from turbovlm.evaluate.run import Predictor, Setting
from turbovlm.evaluate.settings import METHODS, OWN, SMALLER, encoder_macs, evenly, smaller
from turbovlm.evaluate.study import Row, Scoring, Study, run_study
from turbovlm.reproduce.declared import Declared, Line
from turbovlm.reproduce.published import Printed

LESS_IS_BETTER = ("fid",)
DROP = 0.05
"""Of Table 11: what may be lost of the score."""
SEARCH = tuple(round(0.95 - 0.05 * i, 2) for i in range(15))
"""Shares of multiply-accumulates that Table 11 searches, from most to least."""
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Source:
    """A model and what it is asked.

    Attributes:
        name: of the model; `builtin`: whether it is one of turbovlm's own.
        folder: where its predictions are kept.
        scoring: instead of the task's own metrics.
    """

    task: str
    name: str
    predictor: Predictor
    data: Data
    folder: Path
    builtin: bool
    scoring: Scoring | None = None
    batch: int = 16
    workers: int = 0

    def ask(self, settings: Sequence[Setting], on_progress: Progress) -> Study:
        """Every setting, the model itself first; what is kept in the folder is not asked again."""
        return run_study(
            self.task,
            self.name,
            self.predictor,
            self.data,
            settings,
            self.folder,
            batch=self.batch,
            workers=self.workers,
            scoring=self.scoring,
            on_progress=lambda _, done: on_progress(done),
        )


@dataclass(frozen=True)
class Finished:
    """A comparison and what came of it: a row for each line that runs here, None for the others."""

    declared: Declared
    study: Study
    rows: tuple[tuple[Line, Row | None], ...]

    @property
    def own(self) -> Row:
        """The model itself."""
        return self.study.rows[0]

    @property
    def printed_own(self) -> Printed | None:
        """The same, as printed."""
        printed = (line.printed for line in self.declared.lines)
        return next((row for row in printed if row is not None and row.plugin == "none"), None)

    def printed_kept(self, line: Line) -> float | None:
        """The first printed metric as a share of the model's own; None where less is better."""
        own = self.printed_own
        if line.printed is None or own is None or line.printed is own or own.metrics[0][0] in LESS_IS_BETTER:
            return None
        return line.printed.metrics[0][1] / own.metrics[0][1]


def settings_of(declared: Declared, source: Source) -> dict[str, Setting]:
    """What each line of a comparison asks, by the line's name; lines that ask the same share a setting."""
    found = {}
    for line in declared.lines:
        if line.runs and line.name != SMALLER:
            config = line.builtin if source.builtin else line.config
            found[line.name] = Setting(OWN) if config is None else Setting(named(config), config)
    if any(line.name == SMALLER for line in declared.lines) and source.predictor.image_sizes:
        first = next(setting for setting in found.values() if setting.config is not None)
        sample = source.data.samples[0]
        made = smaller(source.predictor, sample, encoder_macs(source.predictor, sample, first))
        found[SMALLER] = dataclasses.replace(made, name=f"{SMALLER}, {made.image_size} pixels")
    return found


def compare(declared: Declared, source: Source, on_progress: Progress) -> Finished:
    """Run a comparison.

    Args:
        declared: what is compared.
        source: of the same task.
        on_progress: given how many more samples are done.

    Raises:
        TurboError: see `run_study`.
    """
    settings = settings_of(declared, source)
    study = source.ask(list({setting.name: setting for setting in settings.values()}.values()), on_progress)
    of_setting = {row.setting: row for row in study.rows}
    rows = [(line, of_setting[settings[line.name].name] if line.name in settings else None) for line in declared.lines]
    return Finished(declared, study, tuple(rows))


def largest_savings(source: Source, methods: Sequence[str], on_progress: Progress) -> dict[str, Row | None]:
    """For each method the row of least cost, of `SEARCH`, at which no more than `DROP` of the score is lost.

    Found by halving, as if less were always worse: a share that would pass below one that fails is not looked for.
    None where even the largest share fails.
    """
    found: dict[str, Row | None] = {}
    for method in methods:
        best, low, high = None, 0, len(SEARCH)
        while low < high:
            middle = (low + high) // 2
            config = dataclasses.replace(TurboConfig(flops=SEARCH[middle]), **METHODS[method])
            row = source.ask([Setting(OWN), Setting(named(config), config)], on_progress).rows[1]
            kept = row.metrics[0].kept
            if kept is not None and kept.value >= 1 - DROP:
                best, low = row, middle + 1
            else:
                high = middle
        found[method] = best
    return found


def named(config: TurboConfig) -> str:
    """Every field that is not the default's, as text: one name for one config."""
    parts = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            parts.append(f"{field.name}={_text(value)}")
    return ", ".join(parts)


def _text(value: Any) -> str:
    if value is evenly:
        return "evenly"
    return value if isinstance(value, str) else json.dumps(value)
