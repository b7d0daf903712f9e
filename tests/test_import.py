"""`import turbovlm` brings little; a feature is imported when a model needs it. Modules are counted, not seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.fsdp", "triton", "sympy", "numpy.f2py")


def new_modules(code: str) -> list[str]:
    """Modules that `code` brings after `import torch`, in a process of its own."""
    found = "print(json.dumps(sorted(set(sys.modules) - before)))"
    script = f"import json, sys, torch\nbefore = set(sys.modules)\n{code}\n{found}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def within(modules: list[str], package: str) -> list[str]:
    return [name for name in modules if name == package or name.startswith(package + ".")]


def test_import_brings_turbovlm_alone():
    modules = new_modules("import turbovlm")
    assert [name for name in modules if not within([name], "turbovlm")] == []
    assert len(modules) <= 26
    for package in ("encoder", "vlm", "diffusion", "profile", "cli", "loading", "ops.kernels"):
        assert within(modules, f"turbovlm.{package}") == []


ENCODER = """
import turbovlm
from torchvision.models import VisionTransformer
before = set(sys.modules)  # what torchvision brings does not count
turbovlm.apply(VisionTransformer(32, 8, 2, 2, 16, 32).eval(), r=2)
"""


def test_an_encoder_brings_no_other_feature():
    pytest.importorskip("torchvision")
    modules = new_modules(ENCODER)
    assert within(modules, "turbovlm.encoder.block") and not within(modules, "turbovlm.diffusion")
    assert not {"turbovlm.vlm.install", "turbovlm.vlm.reading", "turbovlm.vlm.cross"} & set(modules)
    assert [name for package in HEAVY for name in within(modules, package)] == []


def test_names_that_are_imported_when_used():
    code = "import turbovlm\nfor name in turbovlm.__all__: getattr(turbovlm, name)"
    assert within(new_modules(code), "turbovlm.calibration.calibrate")
