"""Every cell of the table in docs/models.md: it works, or is refused for the reason that stands there."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")
pytest.importorskip("open_clip")
pytest.importorskip("peft")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("transformers")

import matrix
from matrix import Fails, Neither, Refused, Works
from matrix_cases import CASES, Case
from matrix_checks import CHECKS, Flat, close, gradients
from turbovlm import TurboError

ROOT = pathlib.Path(__file__).parents[1]
CORE = ("vit", "timm_eva02", "torchvision", "bert", "llava", "sd15")
"""Families whose cells are core tests: one a structure."""
LONG = ("compile_", "export", "onnx")
"""Checks that take seconds for any family."""


def parameters() -> list[Any]:
    found = []
    for check, case in matrix.cells():
        core = case.name in CORE and check.run.__name__ not in LONG
        marks = () if core else pytest.mark.slow
        found.append(pytest.param(check, case, id=f"{check.run.__name__}-{case.name}", marks=marks))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("check", "case"), parameters())
def test_cell(check, case):
    outcome = matrix.expected(check, case)
    if isinstance(outcome, Works):
        check.run(case)
        return
    if isinstance(outcome, Refused):
        with pytest.raises(TurboError) as refused:
            check.run(case)
        assert outcome.fragment in str(refused.value)
        return
    with pytest.raises(Exception) as failed:
        check.run(case.alone if isinstance(outcome, Neither) else case)
    assert isinstance(outcome, Fails) or not isinstance(failed.value, TurboError)
    assert outcome.fragment in f"{type(failed.value).__name__}: {failed.value}"


def test_the_expected_outcomes_are_of_cells_that_are_run():
    functions = {check.run.__name__: check for check in CHECKS.values()}
    for function, said in matrix.EXPECTED.items():
        for name in said:
            cases = [case for case in CASES.values() if name in (case.name, case.group)]
            assert any(matrix.is_run(functions[function], case) for case in cases), (function, name)


def test_every_family_is_in_it():
    from denoisers import DENOISERS
    from families import FAMILIES
    from vlms import VLMS

    assert {*FAMILIES, *VLMS, *DENOISERS} <= CASES.keys()


def test_the_table_is_what_the_data_say():
    tool = ROOT / "tools" / "matrix.py"
    spec = importlib.util.spec_from_file_location("write_matrix", tool)
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    page = (ROOT / "docs" / "models.md").read_text()
    assert writer.written(page) == page, "run python tools/matrix.py --write"


TWO = ("vit", "timm_eva02", "torchvision", "open_clip", "bert", "llava", "sd15")


@pytest.mark.slow
def test_two_processes_get_the_mean_of_their_gradients(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path / "store"), TWO), nprocs=2)


def one_of_two(rank: int, store: str, names: tuple[str, ...]) -> None:
    """Each process has images of its own, and gets the gradients of both."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name in names:
        check_mean_of_two(CASES[name], rank)
    torch.distributed.destroy_process_group()


def check_mean_of_two(case: Case, rank: int) -> None:
    model = case.make()
    flat = Flat(case, model)
    with case.apply(model):
        alone = [gradients(model, lambda seed=seed: flat(*flat.tensors(seed))) for seed in (0, 1)]
        wrapped = torch.nn.parallel.DistributedDataParallel(flat, find_unused_parameters=True)
        found = gradients(model, lambda: wrapped(*flat.tensors(rank)))
    assert alone[0].keys() <= found.keys()
    assert any((alone[0][each] - alone[1][each]).abs().max() > 1e-3 for each in alone[0])
    for each, gradient in alone[0].items():
        close(found[each], (gradient + alone[1][each]) / 2)
