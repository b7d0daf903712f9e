"""Comparisons run: one model and its data for all that is asked of a task, every setting once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from turbovlm.config import Config, TurboConfig
from turbovlm_lab.evaluate.data import Data
from turbovlm_lab.evaluate.run import Predictor, Setting
from turbovlm_lab.evaluate.settings import (
    MATCHED,
    OWN,
    SMALLER,
    by_method,
    encoder_macs,
    named,
    nearest_size,
    size_costs,
)
from turbovlm_lab.evaluate.study import Row, Scoring, run_study
from turbovlm_lab.reproduce.declared import Declared, Line
from turbovlm_lab.reproduce.published import Printed

LESS_IS_BETTER = ("fid",)
DROP = 0.05
"""Of Table 11: what may be lost of the score."""
SEARCH = tuple(round(0.95 - 0.05 * i, 2) for i in range(15))
"""Shares of multiply-accumulates that Table 11 searches, from most to least."""
Progress = Callable[[int], object]


@dataclass
class Source:
    """A model and what it is asked; what came of a setting is kept, so that no two studies ask for it twice.

    Attributes:
        name: of the model; `builtin`: whether it is one of turbovlm's own.
        folder: where its predictions are kept.
        scoring: instead of the task's own metrics.
        rows: what settings came to, by name.
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
    rows: dict[str, Row] = field(default_factory=dict, repr=False)

    def ask(self, settings: Sequence[Setting], on_progress: Progress) -> dict[str, Row]:
        """What each setting comes to, by name, and the model itself as `OWN`."""
        missing = [setting for setting in settings if setting.name not in self.rows and setting.name != OWN]
        on_progress(len(self.data.samples) * (len(settings) - len(missing)))
        if missing or not self.rows:
            study = run_study(
                self.task,
                self.name,
                self.predictor,
                self.data,
                [Setting(OWN), *missing],
                self.folder,
                batch=self.batch,
                workers=self.workers,
                scoring=self.scoring,
                on_progress=lambda setting, done: on_progress(done if setting != OWN else 0),
            )
            self.rows.update({row.setting: row for row in study.rows})
        return {name: self.rows[name] for name in (OWN, *(setting.name for setting in settings))}

    @functools.cached_property
    def size_costs(self) -> dict[int, int]:
        """See `settings.size_costs`, of the first sample."""
        return size_costs(self.predictor, self.data.samples[0])


@dataclass(frozen=True)
class Finished:
    """A comparison and what came of it.

    Attributes:
        model, data, samples: what was asked, and about how many samples.
        own: the model itself.
        rows: one for each line that runs here, None for the others.
    """

    declared: Declared
    model: str
    data: str
    samples: int
    own: Row
    rows: tuple[tuple[Line, Row | None], ...]

    @property
    def printed_own(self) -> Printed | None:
        """The printed row of the model itself."""
        return self.declared.lines[0].printed

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
        if line.runs and line.name not in (SMALLER, MATCHED):
            found[line.name] = _setting(line.builtin if source.builtin else line.config, line.quantize)
    costs = source.size_costs if any(line.name == SMALLER for line in declared.lines) else {}
    if costs:
        first = next(setting for setting in found.values() if setting.configs)
        macs = encoder_macs(source.predictor, source.data.samples[0], first)
        size = nearest_size(costs, macs)
        found[SMALLER] = Setting(f"{SMALLER}, {size} pixels", image_size=size)
        if any(line.name == MATCHED for line in declared.lines):
            whole = encoder_macs(source.predictor, source.data.samples[0], Setting(OWN))
            config = TurboConfig(flops=round(costs[size] / whole, 3))
            found[MATCHED] = _setting(config)
    return found


def _setting(config: Config | None, quantize: str | None = None) -> Setting:
    parts = [*([quantize] if quantize else []), *([named(config)] if config is not None else [])]
    return Setting(", ".join(parts) or OWN, () if config is None else (config,), quantize=quantize)


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
    found = source.ask(list({setting.name: setting for setting in settings.values()}.values()), on_progress)
    rows = [(line, found[settings[line.name].name] if line.name in settings else None) for line in declared.lines]
    data = source.data
    return Finished(declared, source.name, data.name, len(data.samples), found[OWN], tuple(rows))


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
            setting = _setting(by_method(TurboConfig(flops=SEARCH[middle]), method))
            row = source.ask([setting], on_progress)[setting.name]
            kept = row.metrics[0].kept
            if kept is not None and kept.value >= 1 - DROP:
                best, low = row, middle + 1
            else:
                high = middle
        found[method] = best
    return found
