"""The benchmark that needs a GPU runs on a tiny model and the CPU; others count and report what they should."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turbovlm.ops import size_bias

pytestmark = pytest.mark.slow


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    for library in ("timm", "triton", "rich"):
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("gpu")


@pytest.fixture
def small(gpu, tmp_path, capsys):
    """Runs it on the CPU with a tiny model: its exit status, what it says at its end, and the cells so far."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            gpu.main(["--device", "cpu", "--small", "--rounds", "1", "--results", str(tmp_path), *arguments])
        cells = json.loads((tmp_path / "gpu_small.json").read_text())["cells"]
        return ended.value.code, capsys.readouterr().out, cells

    return run


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["channel", "flex"])
def test_other_ways_to_attend_lead_to_the_same_result(name, dtype, gpu):
    attend = importlib.import_module("gpu_attention").ROUTES[name]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 50, 16, generator=generator).to(dtype) for _ in range(3))
    sizes = torch.randint(1, 9, (2, 50), generator=generator).float()
    sizes[1, -7:] = 0  # padding
    for bias in (size_bias(sizes, dtype), None):
        exact = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), attn_mask=None if bias is None else bias.double(), scale=0.3
        )
        found = attend(q, k, v, bias, 0.3)
        assert found.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 4e-2}[dtype]
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)
    if dtype == torch.float32:
        bias = size_bias(sizes, dtype)[1:]
        padded, cut = attend(q[1:], k[1:], v[1:], bias, 0.25), [t[1:, :, :-7] for t in (k, v)]
        torch.testing.assert_close(padded, attend(q[1:], *cut, bias[..., :-7], 0.25))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_everything_but_the_encoders(dtype, small, tmp_path):
    status, said, cells = small("--parts", *(f"{name}/{dtype}" for name in ("checks", "routes", "kernels")))
    assert status == 0 and "nothing left" in said
    here = {key: cell for key, cell in cells.items() if "not_here" not in cell}
    checks = {key.split("/")[2]: cell for key, cell in here.items() if key.startswith("checks")}
    assert {"attention, flex", "similarity, any two patches", "degree and choice, random halves"} <= checks.keys()
    assert all(cell["difference"] <= cell["limit"] < 0.05 for cell in checks.values())
    assert {key.rpartition("/")[2] for key in here if "routes" in key} == {"no bias", "SDPA", "flex", "channel"}
    assert sum("kernels" in key for key in here) == 3 * 5
    assert cells[f"routes/{dtype}/16/65/cuDNN"] == cells[f"checks/{dtype}/CUDA graph"] == {"not_here": "not on cpu"}
    table = (tmp_path / "gpu_small.md").read_text()
    assert all(section in table for section in ("## Attention", "## Steps", "## Largest")) and "failed" not in table


def test_a_wrong_result_is_a_failure(small, monkeypatch):
    attention = importlib.import_module("gpu_attention")
    monkeypatch.setitem(attention.ROUTES, "channel", lambda q, k, v, bias, scale: v)
    status, said, cells = small("--parts", "checks/bf16")
    assert status == 1 and "more than rounding" in cells["checks/bf16/attention, channel"]["failed"]
    assert "failed: checks/bf16/attention, channel: ArithmeticError: differs by" in said
    assert "failed" not in cells["checks/bf16/merge, random halves"]


def test_all_versions_of_an_encoder_do_the_same_arithmetic(small, tmp_path):
    status, _, cells = small("--parts", "small/bf16/eager/1", "small/bf16/graph", "small/bf16/reduce-overhead/2")
    assert status == 0
    measured = {key.rpartition("/")[2]: cell for key, cell in cells.items() if "/eager/" in key}
    assert [*measured] == ["model", "default", "paper", "redundancy", "published", "SDPA"]
    model, default, *others = measured.values()
    assert model["macs_ratio"] == 1 and all(cell["macs_ratio"] == pytest.approx(1.225, abs=0.005) for cell in others)
    assert default["macs_ratio"] == pytest.approx(1.225, abs=0.02)
    assert [cell["merges"] for cell in measured.values()] == [0, 2, 4, 4, 4, 4]
    assert all(cell["ms"] > 0 and cell["peak_bytes"] > 0 and cell["blocks"] == 4 for cell in measured.values())
    assert all(cell["host"]["operators"] > model["host"]["operators"] for cell in (default, *others))
    elsewhere = [cell for key, cell in cells.items() if "/eager/" not in key]
    assert len(elsewhere) == 3 * 6 and all(cell == {"not_here": "not on cpu"} for cell in elsewhere)
    row = next(line for line in (tmp_path / "gpu_small.md").read_text().splitlines() if "eager | 1" in line)
    assert row.count("operators") == 6 and f"**{model['ms']:.2f} ms**" in row


@pytest.mark.parametrize(
    "name", ["vit-l-384", "clip-l-336", "siglip-so400m-384", "dinov2-l-518", "clip-b-224", "eva-g-448"]
)
def test_and_so_they_do_in_the_encoders_of_the_table(name, gpu):
    encoders = importlib.import_module("gpu_encoders")
    case = encoders.ENCODERS[name]
    model, plan = encoders._built(case, "bf16", "meta")
    image = torch.empty(1, 3, case.pixels, case.pixels, dtype=torch.bfloat16, device="meta")
    costs = []
    for version in encoders.VERSIONS[1:]:
        merged, merges = encoders._prepared(version, case, model, plan)
        costs.append(encoders.macs(merged, image) / encoders.macs(model, image))
        assert 0 < merges <= plan.depth
    assert plan.share == pytest.approx(costs[1], rel=0.01) and plan.share < 0.7
    assert costs == pytest.approx([costs[1]] * len(costs), rel=0.01)


def test_it_goes_on_where_it_stopped(small):
    part = ("--parts", "small/fp16/eager/2")
    status, said, first = small(*part, "--minutes", "0")
    assert status == 0 and [*first] == ["small/fp16/eager/2/model"]
    assert "left: 5 cells in 1 parts, the next one small/fp16/eager/2" in said
    status, said, cells = small(*part)
    assert status == 0 and "nothing left" in said
    assert len(cells) == 6 and cells["small/fp16/eager/2/model"] == first["small/fp16/eager/2/model"]
    assert small(*part)[2] == cells
    again = small(*part, "--versions", "SDPA", "--again")[2]
    assert again.keys() == cells.keys() and [key for key in cells if again[key] != cells[key]] == [
        "small/fp16/eager/2/SDPA"
    ]


def test_a_version_that_fails_says_so_and_the_others_go_on(gpu, small, monkeypatch, tmp_path, capsys):
    def broken(r):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate more")

    monkeypatch.setattr(importlib.import_module("gpu_encoders"), "published", broken)
    part = ("--parts", "small/bf16/eager/2")
    status, said, cells = small(*part)
    assert status == 1 and "failed: small/bf16/eager/2/published: OutOfMemoryError: CUDA out of memory." in said
    assert cells["small/bf16/eager/2/published"] == {"failed": "OutOfMemoryError: CUDA out of memory."}
    assert all("ms" in cells[f"small/bf16/eager/2/{version}"] for version in ("model", "default", "SDPA"))
    assert "| failed: OutOfMemoryError |" in (tmp_path / "gpu_small.md").read_text()
    assert small(*part)[0] == 1  # still
    gpu.main(["--small", "--list", *part, "--results", str(tmp_path)])
    assert capsys.readouterr().out.startswith("small/bf16/eager/2: 6 of 6, 1 failed, ")


def test_a_model_that_fails_leaves_nothing_to_compare_with(small, monkeypatch):
    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(importlib.import_module("gpu_encoders"), "images", broken)
    status, _, cells = small("--parts", "small/bf16/eager/2")
    assert status == 1 and [*cells.values()] == [{"failed": "the model itself: RuntimeError: no"}] * 6


def test_what_was_measured_before_the_gpu_was_lost_is_kept(gpu, monkeypatch):
    def measure(bench, keys):
        yield keys[0], {"ms": 1.0}
        yield keys[1], {"failed": "AcceleratorError: illegal memory access"}
        raise AssertionError("nothing else may run in this process")

    kept = []
    part = importlib.import_module("gpu_part").part("routes/bf16/64", ["577/SDPA", "577/kernel", "577/flex"], measure)
    results = {"cells": {}, "seconds": {}}
    monkeypatch.setattr(gpu, "is_lost", lambda bench: True)
    with pytest.raises(SystemExit, match="the GPU does not answer any more after routes/bf16/64/577/kernel"):
        gpu.fill([part], results, None, float("inf"), lambda: kept.append(dict(results["cells"])))
    assert [*kept[-1]] == ["routes/bf16/64/577/SDPA", "routes/bf16/64/577/kernel"]


def test_compiled(small):
    status, _, cells = small("--parts", "small/bf16/compiled/1", "--versions", "model")
    (model,) = cells.values()
    assert status == 0 and model["compile_s"] > 10 * model["ms"] / 1e3 and model["base_compile_s"] == model["compile_s"]


def test_the_tables_numbers(gpu):
    common = {"base_ms": 30.0, "blocks": 24, "code": "0123abcd", "peak_bytes": 2**20}
    model = {**common, "ms": 30.0, "macs_ratio": 1.0, "merges": 0}
    default = {**common, "ms": 20.0, "macs_ratio": 1.6, "merges": 12}
    eager, compiled = {"images": 1}, {"images": 8, "compile_s": 40.0, "base_compile_s": 40.0}
    host = {"ms": 9.6, "base_ms": 9.6, "kernels": 240, "base_kernels": 240}
    cells = {
        "vit-l-384/fp16/compiled/8/model": model | compiled,
        "vit-l-384/fp16/compiled/8/default": default | compiled | {"compile_s": 60.0, "code": "4567cdef"},
        "vit-l-384/bf16/eager/1/model": model | eager | {"host": host},
        "vit-l-384/bf16/eager/1/default": default | eager | {"host": host | {"ms": 12.0, "kernels": 300}},
        "routes/bf16/88/1025/kernel": {"ms": 3.0, "base_ms": 1.5},
    }
    table = importlib.import_module("gpu_report").report({"machine": {"gpu": "x"}, "cells": cells})
    rows = [line for line in table.splitlines() if line.startswith("| ViT-L")]
    assert rows[0].startswith(
        "| ViT-L/16-384, r=16 | bf16 | eager | 1 | **30.00 ms**<br>33 images/s<br>1 MiB<br>a block: "
    )
    assert "a block: 0.400 ms of host, 10.0 kernels" in rows[0] and "a merge: 0.200 ms of host, 5.0 kernels" in rows[0]
    assert "**1.500×**<br>MACs 1.600×, eff. 0.94<br>1 MiB<br>compiled in 60 s, 1.5× | – |" in rows[1]
    assert "0123abcd (3 cells), 4567cdef (1 cells)" in table
    assert "| bf16 | 88 | 1025 | – | – | – | – | – | – | 3.000 (2.00×) |" in table


def test_results_of_another_machine_are_left_alone(gpu, tmp_path, capsys):
    (tmp_path / "gpu_small.json").write_text('{"machine": {"gpu": "NVIDIA H200", "torch": "2.11.0"}}')
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--small", "--results", str(tmp_path)])
    assert ended.value.code == 2 and "measured on gpu NVIDIA H200, this is none (cpu)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parts", "nowhere"], "no part is called so; --list names them"),
        (["--device", "cpu"], "give --small"),
        pytest.param(
            ["--minutes", "1"],
            "no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_it_refuses(arguments, message, gpu, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main([*arguments, "--results", str(tmp_path)])
    assert ended.value.code == 2 and message in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_calls_are_those_of_named_functions(monkeypatch):
    from turbovlm.ops.degree import default_alpha, needs_semantic

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import structure

    with structure.recording() as calls:
        [default_alpha(name) for name in ("damped", "semantics")]
        needs_semantic("random")
    assert [file for file, _ in calls] == ["ops/degree.py"] * 3
    assert [name for _, name in calls] == ["default_alpha", "default_alpha", "needs_semantic"]
    others = [("a.py", "f"), ("b.py", "g"), ("b.py", "g"), ("a.py", "f")]
    assert structure.counts(others) == {"calls": 4, "functions": 2, "files": 2, "switches": 2}


def test_two_checkouts_are_compared_by_medians(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import against

    def process(plain, turbo):
        return {"plain": plain, "turbo": turbo, "macs_ratio": 2.0}

    checkouts = {
        "there": [process([3.0, 4.0], [2.0, 2.0]), process([4.0, 4.0], [2.0, 4.0])],
        "here": [process([3.0, 3.0], [1.0, 1.0]), process([3.0, 3.0], [1.5, 1.5])],
    }
    found = {"machine": {"cpu": "x"}, "case": "vit-b-384", "dtype": "fp32", "batch": 8, "rounds": 2}
    report = against.report({**found, "checkouts": checkouts})
    assert "| there | 2.00 | 1.750× | 1.125–2.000 | 2.000× | 0.875 |" in report
    assert "| here | 1.25 | 2.500× | 2.000–3.000 | 2.000× | 1.250 |" in report
    assert "0.625 of the medians; pairs of processes 0.500 to 0.500" in report


def test_a_checkout_without_the_package_is_refused():
    script = SCRIPT.with_name("against.py")
    done = subprocess.run([sys.executable, script, "--source", SCRIPT.parent], capture_output=True, text=True)
    assert done.returncode == 2 and "has no src/turbovlm" in done.stderr
