"""The benchmark that needs a GPU runs on a tiny model and the CPU; others count and report what they should."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turbovlm.ops import size_bias

pytestmark = pytest.mark.slow


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["channel", "flex"])
def test_other_ways_to_attend_lead_to_the_same_result(name, dtype, monkeypatch):
    for library in ("timm", "rich"):
        pytest.importorskip(library)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    attend = importlib.import_module("gpu").ROUTES[name]
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
def test_everything_but_the_models(dtype):
    for library in ("timm", "triton", "rich"):
        pytest.importorskip(library)
    parts = ("--parts", "checks", "routes", "kernels")
    done = run("--device", "cpu", "--small", "--rounds", "1", "--dtypes", dtype, *parts)
    assert done.returncode == 0, done.stderr
    for name in ("masked", "channel", "flex", "similarity, plain", "merge, plain"):
        assert name in done.stdout
    listed = done.stdout.partition("## Largest differences")[2].splitlines()
    differences = [float(line.rpartition(":")[2]) for line in listed if line.startswith("- ")]
    assert differences and max(differences) < 0.05


def test_models_beside_tome():
    for library in ("timm", "rich"):
        pytest.importorskip(library)
    done = run(
        "--device", "cpu", "--small", "--rounds", "1", "--parts", "models", "--modes", "eager", "--dtypes", "bf16"
    )
    assert done.returncode == 0, done.stderr
    for name in ("eager chosen", "eager masked", "published", "SDPA"):
        assert name in done.stdout


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run()
    assert done.returncode == 2 and "no CUDA device" in done.stderr


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
