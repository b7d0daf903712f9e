"""The numbers that the Turbo paper prints (Ju et al., ECCV 2024), a row each."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass, replace
from pathlib import Path

FILE = Path(__file__).parent / "tables.csv"
METRICS = 4


@dataclass(frozen=True)
class Printed:
    """One printed row.

    Attributes:
        table: its number; `task`, `model`, `dataset`, `plugin`: as printed.
        amount: r, or the share of tokens merged in percent; `*` behind it where it is deduced from the printed cost;
            empty where nothing is merged.
        metrics: by name, in the order of the columns.
        gmacs: 1e9 multiply-accumulates, None where they are not printed.
        speedup: over the model itself, on an RTX 3090.
    """

    table: int
    task: str
    model: str
    dataset: str
    plugin: str
    amount: str
    metrics: tuple[tuple[str, float], ...]
    gmacs: float | None
    speedup: float | None

    @property
    def r(self) -> int | None:
        """Tokens merged in every block; None where that is not how the amount is said."""
        digits = self.amount.rstrip("*")
        return int(digits) if digits.isdigit() else None


@functools.cache
def printed_rows() -> tuple[Printed, ...]:
    """All of them, in the order of the paper; Table 7's own scores, printed in each row, become rows."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found: list[Printed] = []
    for entry in csv.DictReader(lines):
        row = _row(entry)
        metrics = dict(row.metrics)
        if "base" in metrics:
            (name, _), (_, own) = row.metrics
            if not found or found[-1].model != row.model:
                found.append(replace(row, plugin="none", amount="0", metrics=((name, own),), speedup=None))
            row = replace(row, metrics=((name, metrics[name]),))
        found.append(row)
    return tuple(found)


def printed_in(table: int) -> tuple[Printed, ...]:
    """Those of one table."""
    return tuple(row for row in printed_rows() if row.table == table)


def _row(entry: dict[str, str]) -> Printed:
    pairs = ((entry[f"metric{i}"], entry[f"value{i}"]) for i in range(1, METRICS + 1))
    return Printed(
        table=int(entry["table"]),
        **{name: entry[name] for name in ("task", "model", "dataset", "plugin")},
        amount=entry["r"],
        metrics=tuple((name, float(value)) for name, value in pairs if name),
        gmacs=_number(entry["flops_g"]),
        speedup=_number(entry["speedup"]),
    )


def _number(text: str) -> float | None:
    return float(text) if text else None
