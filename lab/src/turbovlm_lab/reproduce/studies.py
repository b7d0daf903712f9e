"""All studies by their keys, and how each is run: comparisons, Table 11's search, Figures 3 and 6."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from turbovlm.errors import ConfigError
from turbovlm_lab.evaluate.study import file_name
from turbovlm_lab.reproduce import plots
from turbovlm_lab.reproduce.declared import FIGURES, SEARCHED, TITLES, Declared, comparisons
from turbovlm_lab.reproduce.published import printed_in
from turbovlm_lab.reproduce.report import Found, Sheet, blocks_sheet, plain, savings_sheet, sheet_of
from turbovlm_lab.reproduce.running import Progress, Source, compare, largest_savings
from turbovlm_lab.reproduce.sources import Sources
from turbovlm_lab.reproduce.tracing import by_block, merged_images

SEARCH_METHODS = {"turbovlm": "", "paper": "turbo", "ToMe": "redundancy", "semantics": "semantics"}
"""Of Table 11, with their printed names."""
PRINTED_TASKS = {"nlvr2": "nlvr", "vqa": "vqa", "captioning": "caption", "retrieval": "retrieval"}
TRACED_TASK, TRACED = "retrieval", 64
"""Of Figures 3 and 6: whose encoder is looked into, and with how many images."""


def every_study() -> tuple[Declared, ...]:
    """In the order of the paper, tasks first. Those that are no comparisons have no lines."""
    others = [Declared(f"table11/{task}", f"Table 11: {TITLES[11]}, {task}", task, ()) for task in SEARCHED]
    others += [Declared(f"figure{n}", f"Figure {n}: {FIGURES[n]}", TRACED_TASK, ()) for n in (3, 6)]
    return tuple(sorted((*comparisons(), *others), key=_order))


def chosen(names: Sequence[str]) -> list[Declared]:
    """By keys, or beginnings of keys that end before a slash; `all`, `tasks`, `tables`, `figures`.

    Raises:
        ConfigError: a name that is none of these.
    """
    every, found = every_study(), []
    for name in names:
        some = [s for s in every if name in ("all", s.key, f"{s.name.rstrip('0123456789')}s", s.name)]
        some += [s for s in every if s.key.startswith(f"{name}/") and s not in some]
        if not some:
            tables = ", ".join(dict.fromkeys(study.name for study in every))
            raise ConfigError(f"{name!r}: must be all, tables, figures, {tables}, or a key of --list")
        found += some
    return list(dict.fromkeys(found))


def run_studies(studies: Sequence[Declared], sources: Sources, folder: Path) -> Iterator[Found]:
    """One after the other, those of one model together, so that each is loaded once; plots go into the folder.

    Raises:
        TurboError: see `Sources.load` and `run_study`.
    """
    from turbovlm.cli.measuring import progress_bar

    savings: dict[str, dict[str, float]] = {}
    for study in sorted(studies, key=lambda study: (str(sources.named(study)), study.task, study.strength or 0)):
        name = sources.named(study)
        assert name is not None
        source = sources.load(name, study.task, study.strength)
        with progress_bar(_steps(study, source), study.key) as advance:
            if study.name == "table11":
                savings[study.task] = _savings(source, advance)
            else:
                yield Found(study.key, *_run(study, source, folder, advance))
    if savings:
        ordered = {task: savings[task] for task in SEARCHED if task in savings}
        plots.save_savings(ordered, folder / "table11")
        sheet = savings_sheet(ordered, printed_in(11), {**SEARCH_METHODS, **PRINTED_TASKS}, "table11")
        yield Found("table11", sheet, ordered)


def _run(study: Declared, source: Source, folder: Path, advance: Progress) -> tuple[Sheet, Any]:
    about, plot = f"{source.name}, {source.data.name}", file_name(study.key.replace("/", "-").replace(".", "-"))
    if study.name == "figure3":
        blocks = by_block(source, TRACED, advance)
        plots.save_blocks(blocks, folder / plot)
        return blocks_sheet(blocks, about, plot), dataclasses.asdict(blocks)
    if study.name == "figure6":
        sheet, names = merged_images(source, advance)
        plots.save_images(sheet, names, folder / plot)
        return Sheet(f"{study.title} ({about})", (), (), plot), list(names)
    finished = compare(study, source, advance)
    draw: Callable[..., None] = plots.save_curves if study.axis else plots.save_table
    draw(finished, folder / plot)
    return sheet_of(finished, plot), plain(finished)


def _savings(source: Source, advance: Progress) -> dict[str, float]:
    found = largest_savings(source, tuple(SEARCH_METHODS), advance)
    return {method: 1.0 if row is None else 1 / row.ratio for method, row in found.items()}


def _steps(study: Declared, source: Source) -> int:
    """Samples that a study goes through, about."""
    samples = len(source.data.samples)
    if study.name == "table11":
        return samples * len(SEARCH_METHODS) * 8
    return samples * sum(line.runs for line in study.lines) or min(samples, TRACED)


def _order(study: Declared) -> tuple[int, int]:
    kind = study.name.rstrip("0123456789")
    return ("tasks", "table", "figure").index(kind), int(study.name.removeprefix(kind) or 0)
