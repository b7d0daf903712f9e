"""`turbovlm` with nothing but PyTorch beside it, as in a fresh environment: what works, and what it says is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

ALONE = """
import importlib.metadata
import sys

# PyTorch, and what it depends on itself
ALLOWED = {
    "torch", "torchgen", "functorch", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "fsspec", "filelock", "setuptools", "pkg_resources", "_distutils_hack",
    "turbovlm", "own_vit",
} | sys.stdlib_module_names

class Absent:
    \"\"\"Finds nothing that a fresh environment would not have.\"\"\"

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED and not name.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
importlib.util.find_spec = lambda name, found=importlib.util.find_spec: found(name) if name in ALLOWED else None
importlib.metadata.entry_points = lambda **_: ()  # those of turbovlm-lab
"""

OWN_VIT = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

class ViT(nn.Module):
    def __init__(self, depth=3, side=32, patch=4, width=32):
        super().__init__()
        self.count = (side // patch) ** 2
        self.stem = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, images):
        patches = self.stem(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(images), -1, -1), patches), dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]
"""


def alone(code, tmp_path):
    (tmp_path / "own_vit.py").write_text(OWN_VIT)
    path = os.pathsep.join((str(tmp_path), *sys.path))
    done = subprocess.run(
        [sys.executable, "-c", ALONE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    return done


def test_a_model_of_ones_own(tmp_path):
    """It is refused by name; once registered, it is merged and restored, with nothing but PyTorch."""
    code = """
    import torch
    import turbovlm
    from own_vit import ViT
    from turbovlm.encoder import Layout
    from turbovlm.registry import register

    torch.manual_seed(0)
    model, images = ViT().eval(), torch.randn(2, 3, 32, 32)
    plain = model(images)
    try:
        turbovlm.apply(model, r=8)
    except turbovlm.UnsupportedModelError as error:
        print(error)
    register(Layout(
        family="a ViT of one's own",
        block="own_vit.Block",
        towers=("own_vit.ViT",),
        norm1="norm1",
        project=("q", "k", "v"),
        heads="heads",
        after_attention=("out",),
        mlp=("norm2", "mlp"),
        patch="stem",
        patches=lambda tower: tower.count,
        inputs=lambda tower: {"images": torch.empty(1, 3, 32, 32, device="meta")},
        arguments=(),
    ))
    handle = turbovlm.apply(model, r=8, trace=True)
    merged = model(images)
    print(handle.schedules[0].tokens, tuple(merged.shape), bool(torch.equal(merged, plain)))
    print([tuple(block.sizes.sum(1).tolist()) for block in handle.trace])
    handle.remove()
    print(bool(torch.equal(model(images), plain)))
    """
    done = alone(code, tmp_path)
    assert done.returncode == 0, done.stderr
    refused, shapes, sizes, restored = done.stdout.splitlines()
    assert refused.startswith("ViT has no block that turbovlm can accelerate: its blocks (Block) look like a ViT's")
    assert shapes == "(65, 53, 53, 41) (2, 32) False"
    assert sizes == str([(65.0, 65.0)] * 3)
    assert restored == "True"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "saliency"], "evaluate comes with the package turbovlm-lab: pip install turbovlm-lab"),
        (["inspect", "timm:vit_tiny_patch16_224"], "the command line needs rich: pip install 'turbovlm[cli]'"),
    ],
)
def test_commands_say_what_to_install(argv, message, tmp_path):
    done = alone(f"from turbovlm.cli import main; sys.exit(main({argv!r}))", tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.splitlines()[-1] == f"turbovlm: {message}"


def test_models_by_name_say_what_to_install(tmp_path):
    code = """
    from turbovlm.loading import ModelSpec
    from turbovlm.loading.models import load_model
    for spec in ("timm:vit_tiny_patch16_224", "a/model", "zoo:pairs"):
        try:
            load_model(ModelSpec(spec))
        except ValueError as error:
            print(error)
    """
    done = alone(code, tmp_path)
    assert done.stdout.splitlines() == [
        "timm:vit_tiny_patch16_224 needs timm: pip install 'turbovlm[timm]'",
        "a/model needs transformers: pip install 'turbovlm[transformers]'",
        "zoo:pairs is a model of the package turbovlm-lab: pip install turbovlm-lab",
    ], done.stderr


def test_measuring_needs_nothing_else(tmp_path):
    code = """
    import torch
    import turbovlm
    from own_vit import ViT
    model, images = ViT().eval(), torch.randn(2, 3, 32, 32)
    print(turbovlm.profile.macs(model, images))
    print(turbovlm.profile.compare(model, images, {"again": lambda m: None}, rounds=1, warmup=0).macs_ratio("again"))
    """
    done = alone(code, tmp_path)
    assert done.returncode == 0, done.stderr
    macs, ratio = done.stdout.splitlines()
    linear, attention = 65 * (4 * 32 * 32 + 2 * 32 * 64), 2 * 65 * 65 * 32
    assert int(macs) == 2 * (64 * 48 * 32 + 3 * (linear + attention)) and ratio == "1.0"
