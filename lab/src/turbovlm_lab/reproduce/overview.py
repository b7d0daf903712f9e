"""What all tasks at one cost come to, on one sheet and one plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbovlm_lab.evaluate.settings import OWN
from turbovlm_lab.reproduce import plots
from turbovlm_lab.reproduce.declared import DEFAULT_SHARE
from turbovlm_lab.reproduce.report import Sheet

PLOT = "overview"


def overview(entries: Mapping[str, Any], folder: Path) -> Sheet | None:
    """The share of each task's first metric that each setting keeps, and how many answers stay the same.

    Args:
        entries: of the report, by study; those of `tasks/` are read.
        folder: where the plot is put.

    Returns:
        None where fewer than two tasks have been run.
    """
    found = {key.partition("/")[2]: entry["numbers"] for key, entry in entries.items() if key.startswith("tasks/")}
    if len(found) < 2:
        return None
    rows = {task: {each["line"]: each["row"] for each in numbers["lines"]} for task, numbers in found.items()}
    names = list(dict.fromkeys(line for lines in rows.values() for line in lines if line != OWN))
    kept = {
        task: {name: lines[name]["metrics"][0]["kept"] for name in names if name in lines and _kept(lines[name])}
        for task, lines in rows.items()
    }
    plots.save_overview(kept, names, folder / PLOT)
    header = ["setting"]
    for task, lines in rows.items():
        header += [f"{task}: {lines[OWN]['metrics'][0]['name']} kept", "same answer"]
    body = [(name, *(cell for lines in rows.values() for cell in _cells(lines.get(name)))) for name in names]
    title = f"All tasks at {DEFAULT_SHARE:.0%} of the encoder's multiply-accumulates"
    return Sheet(title, tuple(header), tuple(body), PLOT)


def _kept(row: Mapping[str, Any]) -> bool:
    return row["metrics"][0]["kept"] is not None


def _cells(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None or not _kept(row):
        return "", ""
    kept, same = row["metrics"][0]["kept"], row["same"]
    shown = f"{kept['value']:.1%} [{kept['low']:.1%}, {kept['high']:.1%}]"
    return shown, "" if same is None else f"{same['value']:.1%}"
