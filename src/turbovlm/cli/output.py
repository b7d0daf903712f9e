"""What commands print: results on standard output, in 80 columns or as one JSON document; all else elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from turbovlm.cli.measuring import check_file, written
from turbovlm.errors import TurboError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STDOUT = "-"
"""What `--json` without a file means, as a file's name."""
JSON_HELP = "the numbers as one JSON document to standard output, without tables; or to FILE.json, beside them"
GAP = 2
"""Columns between two columns of a table."""
NAME, CELL = 24, 28
"""The first column of a table that does not fit is folded to the first of these, any other one to the second."""

_DOCUMENT: ContextVar[TextIO | None] = ContextVar("turbovlm_document", default=None)
"""Standard output, where it is kept for a JSON document."""


def add_json_option(parser: Any) -> None:
    """Add `--json [FILE.json]`."""
    parser.add_argument("--json", nargs="?", const=STDOUT, type=_json_name, metavar="FILE.json", help=JSON_HELP)


def _json_name(name: str) -> str:
    """A file's name; the model of `--json MODEL` is none."""
    if name != STDOUT and not name.endswith(".json"):
        raise argparse.ArgumentTypeError(
            f"{name!r} does not end in .json; to print the document put --json last, or write --json {STDOUT}"
        )
    return name


def check_json(args: argparse.Namespace) -> None:
    """Refuse a file of `--json` that could not be written: `check_file`.

    Raises:
        ConfigError: naming what is wrong with it.
    """
    if args.json != STDOUT:
        check_file("--json", args.json)


@contextlib.contextmanager
def kept_for_json(args: argparse.Namespace) -> Iterator[None]:
    """Keep standard output for the document where `--json` names no file: what libraries print goes beside it."""
    if getattr(args, "json", None) != STDOUT:
        yield
        return
    before = _DOCUMENT.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _DOCUMENT.reset(before)


def console() -> Console:
    """Where results are printed: standard output, as wide as the terminal, 80 columns where it is none; nowhere where
    a JSON document has them."""
    from rich.console import Console

    class Output(Console):  # type: ignore[misc]
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError at hand, which `turbovlm.cli.main` ends with; rich would exit with 1

    return Output(quiet=_DOCUMENT.get() is not None, highlight=False, markup=False, emoji=False)


def print_table(
    out: Console,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    names: int = 1,
    sections: Sequence[int] = (),
) -> None:
    """Print a table, and what does not fit beside its first columns as another one below.

    Args:
        out: of `console`.
        title: in the line above; none if empty.
        header: of each column, in one line or two; empty where there is a title alone, as of a figure.
        rows: a cell for each column.
        names: how many of the columns name a row; the others are numbers.
        sections: numbers of the rows that a line is drawn above.
    """
    from rich.text import Text

    if title:
        out.print(Text(title, style="bold"))
    for table in tables(header, rows, out.width, names, sections):
        out.print(table)


def tables(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int, names: int = 1, sections: Sequence[int] = ()
) -> list[Table]:
    """The columns in as many tables as they need, each with those that name a row; see `print_table`."""
    if not header:
        return []
    header = _split(header, rows)
    whole = [_width(header, rows, i) for i in range(len(header))]
    widths = whole
    if sum(whole) + GAP * (len(header) - 1) > width:
        widths = [min(wide, CELL) for wide in whole]
        widths[0] = min(whole[0], max(width - sum(GAP + wide for wide in widths[1:]), min(widths[0], NAME)))
    named = sum(widths[:names]) + GAP * (names - 1)
    made: list[list[int]] = [[]]
    for i in range(names, len(header)):
        if made[-1] and named + sum(GAP + widths[j] for j in (*made[-1], i)) > width:
            made.append([])
        made[-1].append(i)
    return [_table([*range(names), *some], header, rows, widths, names, sections) for some in made]


def _table(
    places: Sequence[int],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    names: int,
    sections: Sequence[int],
) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True, padding=(0, 1))
    for i in places:
        how: Any = {
            "justify": "left" if i < names else "right",
            "vertical": "top" if names == len(header) else "bottom",
            "overflow": "fold",
        }
        table.add_column(Text(header[i]), max_width=widths[i], **how)
    for number, row in enumerate(rows):
        if number in sections:
            table.add_section()
        table.add_row(*(Text(row[i]) for i in places))
    return table


def _split(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Headings, of which those that are wider than what is below take two lines."""
    below = [max((len(row[i]) for row in rows), default=0) for i in range(len(header))]
    return [name.replace(" ", "\n", 1) if len(name) > wide else name for name, wide in zip(header, below)]


def _width(header: Sequence[str], rows: Sequence[Sequence[str]], column: int) -> int:
    lines = [line for row in (header, *rows) for line in row[column].splitlines()]
    return max(map(len, lines), default=0)


def write_json(name: str, content: Any) -> None:
    """Write what `--json` asked for.

    Args:
        name: of the file, or `STDOUT`.
        content: of plain values. Numbers that are not finite become null, as JSON has none.

    Raises:
        TurboError: the file cannot be written.
    """
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    if name == STDOUT:
        document = _DOCUMENT.get() or sys.stdout
        document.write(text)
        document.flush()
        return
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise TurboError(f"--json {name}: {error.strerror}") from error
    written.append(name)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
