"""The benchmark that needs a GPU runs, on a tiny model and the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


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
