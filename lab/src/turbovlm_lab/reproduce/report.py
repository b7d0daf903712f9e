"""Sheets of numbers, ours beside the printed ones, and the report that holds those of all runs into one folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbovlm.errors import DataError
from turbovlm_lab.evaluate.statistics import Interval
from turbovlm_lab.evaluate.study import Row
from turbovlm_lab.reproduce.declared import Line
from turbovlm_lab.reproduce.published import Printed
from turbovlm_lab.reproduce.running import Finished
from turbovlm_lab.reproduce.tracing import Blocks

RESULTS = "results.json"
ABOUT = "Intervals hold 95 % of the bootstrap's draws over images. MACs are those of the vision encoder."


@dataclass(frozen=True)
class Sheet:
    """A table for a terminal or a page; `plot` is the file of the plot beside it, without its ending."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    plot: str = ""

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Sheet:
        """From what JSON has of one."""
        rows = tuple(tuple(row) for row in plain["rows"])
        return cls(plain["title"], tuple(plain["header"]), rows, plain["picture"])

    def plain(self) -> dict[str, Any]:
        """For JSON, where the plot is called `picture`."""
        return {"title": self.title, "header": self.header, "rows": self.rows, "picture": self.plot}

    def markdown(self) -> str:
        """With a heading, and the plot above the table."""
        lines = [f"## {self.title}", ""]
        if self.plot:
            lines += [f"![{self.title}]({self.plot}.png)", ""]
        if self.rows:
            lines += [_joined(self.header), _joined(["---", *["--:"] * (len(self.header) - 1)])]
            lines += [_joined(row) for row in self.rows]
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Found:
    """What a study came to: its key, its sheet, and its numbers as JSON has them."""

    key: str
    sheet: Sheet
    numbers: Any

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"sheet": self.sheet.plain(), "numbers": self.numbers}


def read_entries(folder: Path) -> dict[str, Any]:
    """What earlier runs have left in a folder, by study.

    Raises:
        DataError: its results.json is not of `turbovlm reproduce`.
    """
    file = folder / RESULTS
    if not file.exists():
        return {}
    try:
        entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for entry in entries.values():
            Sheet.of(entry["sheet"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: is not of turbovlm reproduce ({error}); give another folder as --out") from error
    return entries


def write_report(folder: Path, entries: Mapping[str, Any], order: Sequence[str], overview: Sheet | None = None) -> None:
    """report.md and results.json.

    Args:
        folder: where the plots are.
        entries: by study: its sheet and numbers, and `command`, `date` and `versions` of the run that made it, and
            the `seconds` that all runs have needed for it beyond what other studies had left.
        order: of the studies.
        overview: what comes before them.
    """
    place = {key: number for number, key in enumerate(order)}
    named = sorted(
        entries, key=lambda key: min((n for k, n in place.items() if f"{k}/".startswith(f"{key}/")), default=0)
    )
    lines = ["# Turbo's tables and figures, ours beside the printed ones", "", ABOUT, ""]
    if overview is not None:
        lines += [overview.markdown()]
    for key in named:
        entry = entries[key]
        versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        took = f", {entry['seconds']:.0f} s" if "seconds" in entry else ""
        lines += [Sheet.of(entry["sheet"]).markdown(), f"`{entry['command']}`, {entry['date']}, {versions}{took}", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    content = json.dumps({key: entries[key] for key in named}, indent=1)
    (folder / RESULTS).write_text(content + "\n", encoding="utf-8")


def sheet_of(finished: Finished, plot: str = "") -> Sheet:
    """A comparison: the printed cost and metrics, and what is kept of the first; then ours."""
    lines = finished.declared.lines
    own = finished.printed_own
    metrics = [name for name, _ in own.metrics] if own else _metric_names(lines)
    costs = any(line.printed and line.printed.gmacs for line in lines)
    header = ["setting", *(["printed GMACs"] if costs else []), *(f"printed {name}" for name in metrics)]
    header += ["printed kept"] if own else []
    found = finished.own.metrics
    header += ["MACs here", *(metric.name for metric in found), f"{found[0].name} kept", "same answer"]
    rows = []
    for line, row in finished.rows:
        cells = [line.name, *([_printed_cost(line.printed)] if costs else [])]
        printed = dict(line.printed.metrics) if line.printed else {}
        cells += [f"{printed[name]:g}" if name in printed else "" for name in metrics]
        kept = finished.printed_kept(line)
        cells += ["" if kept is None else f"{kept:.1%}"] if own else []
        rows.append((*cells, *_ours(row, len(found))))
    about = f"{finished.model}, {finished.data}, {finished.samples} samples"
    return Sheet(f"{finished.declared.title} ({about})", tuple(header), tuple(rows), plot)


def savings_sheet(
    ratios: Mapping[str, Mapping[str, float]], printed: Sequence[Printed], names: Mapping[str, str], plot: str
) -> Sheet:
    """Table 11.

    Args:
        ratios: times fewer multiply-accumulates, by task and method.
        printed: its rows.
        names: the printed name of each method, and of each task.
        plot: its name.
    """
    of_plugin = {row.plugin: dict(row.metrics) for row in printed}
    header = ["method"]
    for task in ratios:
        header += [f"{task}, printed speed-up", f"{task}, MACs here"]
    rows = []
    for method in next(iter(ratios.values())):
        cells = [method]
        for task in ratios:
            value = of_plugin.get(names.get(method, ""), {}).get(names[task])
            cells += ["" if value is None else f"{value:g}×", f"{ratios[task][method]:.2f}×"]
        rows.append(tuple(cells))
    return Sheet("Table 11: largest saving within a drop of 5 %", tuple(header), tuple(rows), plot)


def blocks_sheet(blocks: Blocks, about: str, plot: str) -> Sheet:
    """Figure 3."""
    rows = []
    for number, (r, a) in enumerate(zip(blocks.redundancy, blocks.concentration), 1):
        rows.append((str(number), f"{r[0]:.3f} ± {r[1]:.3f}", f"{a[0]:.1%} ± {a[1]:.1%}"))
    title = f"Figure 3: redundancy and concentration of attention, by block ({about})"
    return Sheet(title, ("block", "mean R", "A in a tenth of the patches"), tuple(rows), plot)


def plain(finished: Finished) -> dict[str, Any]:
    """For JSON: every line, its printed row and its own."""
    lines = [
        {
            "line": line.name,
            "printed": None if line.printed is None else vars(line.printed),
            "row": None if row is None else dataclasses.asdict(row),
        }
        for line, row in finished.rows
    ]
    about = {name: getattr(finished, name) for name in ("model", "data", "samples")}
    return {"title": finished.declared.title, "task": finished.declared.task, **about, "lines": lines}


def _metric_names(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines if line.printed for name, _ in line.printed.metrics))


def _printed_cost(printed: Printed | None) -> str:
    return "" if printed is None or printed.gmacs is None else f"{printed.gmacs:g}"


def _ours(row: Row | None, metrics: int) -> tuple[str, ...]:
    if row is None:
        return ("",) * (metrics + 3)
    kept, same = row.metrics[0].kept, row.same
    shown = "" if kept is None else f"{kept.value:.1%} [{kept.low:.1%}, {kept.high:.1%}]"
    values = (_value(metric.value) for metric in row.metrics)
    return (f"{row.ratio:.0%}", *values, shown, "" if same is None else f"{same.value:.1%}")


def _value(value: Interval) -> str:
    if value.low == value.high:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |"
