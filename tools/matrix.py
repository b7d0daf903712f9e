"""Write the table of what works with what, from the data that tests/test_matrix.py tests, into docs/models.md.

python tools/matrix.py prints it, --write puts it between the marks in the page.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
MARKS = ("<!-- written by tools/matrix.py -->\n", "<!-- end -->\n")
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]


def written(page: str) -> str:
    """The page with the table between its marks."""
    from matrix import table

    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{table()}\n\n{MARKS[1]}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    page = written(PAGE.read_text())
    if parser.parse_args().write:
        PAGE.write_text(page)
    else:
        print(page.split(MARKS[0])[1].split(MARKS[1])[0])


if __name__ == "__main__":
    main()
