"""Execute the notebooks and write them beside their sources, with what they give:  python notebooks/build.py [NAME …]

A notebook's source is NAME.py, in jupytext's percent format; NAME.ipynb is made of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NAMES = ("classifier", "vlm", "generation")
KEPT = ("kernelspec", "language_info")
"""What is written of a notebook's metadata: no time, and no version of this machine."""


def made(name: str) -> nbformat.NotebookNode:
    """A notebook of its source, not executed."""
    book = jupytext.read(FOLDER / f"{name}.py")
    book.metadata = {key: value for key, value in book.metadata.items() if key in KEPT}
    for number, cell in enumerate(book.cells):
        cell.id = f"{name}-{number}"
    return book


def executed(name: str, timeout: int = 600) -> nbformat.NotebookNode:
    """The same with what its cells give, but for stderr, where libraries complain of others that are not there.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has failed, as by one of its asserts.
    """
    book = made(name)
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(book, timeout=timeout, resources=where, record_timing=False, coalesce_streams=True).execute()
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [_shown(each) for each in cell.outputs if each.get("name") != "stderr"]
    book.metadata = {key: value for key, value in book.metadata.items() if key in KEPT}
    book.metadata.language_info = {"name": "python"}
    return book


def _shown(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An output with its image once, in few bytes."""
    if "image/jpeg" in output.get("data", {}):
        output.data.pop("image/png", None)
    return output


def main(names: Sequence[str]) -> None:
    """Write those notebooks, or all."""
    for name in names or NAMES:
        nbformat.write(executed(name), FOLDER / f"{name}.ipynb")
        print(f"notebooks/{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
