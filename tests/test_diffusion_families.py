"""A family of denoisers is one entry, and those of other packages are found like turbovlm's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import turbovlm
from denoisers import DENOISERS
from families import _livelier as livelier
from test_diffusion import run
from turbovlm.diffusion import families
from turbovlm.errors import ConfigError, UnsupportedModelError
from turbovlm.ops import host
from turbovlm.registry import unregister

diffusers = pytest.importorskip("diffusers")
BRIA = "diffusers.models.transformers.transformer_bria.Bria"


def bria():
    size = {"patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    size |= {"num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}
    torch.manual_seed(0)
    return livelier(diffusers.BriaTransformer2DModel(**size))


def entry():
    """A copy of FLUX's, whose blocks are spelled alike."""
    return replace(
        families.FLUX,
        family="Bria",
        holders=(f"{BRIA}Transformer2DModel",),
        blocks=(
            replace(families.FLUX_DOUBLE, path=f"{BRIA}TransformerBlock"),
            replace(families.FLUX_SINGLE, path=f"{BRIA}SingleTransformerBlock"),
        ),
    )


@pytest.fixture
def registered():
    added = entry()
    turbovlm.register(added)
    yield added
    unregister(added)


def test_an_entry_is_enough(registered, monkeypatch):
    if not hasattr(diffusers, "BriaTransformer2DModel"):
        pytest.skip("this release of diffusers has no Bria")
    calls, own = [], host.attend
    monkeypatch.setattr(host, "attend", lambda *args: (calls.append(1), own(*args))[1])
    model, inputs = bria(), DENOISERS["flux"].inputs(2, 32, 32)
    inputs = {name: value for name, value in inputs.items() if name != "pooled_projections"}
    original = run(model, inputs)
    with turbovlm.apply(model, keep=1.0, scope="part"):
        assert torch.equal(run(model, inputs), original)
    with turbovlm.apply(model, keep=0.5, scope="part") as handle:
        merged = run(model, inputs)
        assert "Bria: 50% of the tokens in attention, ffn" in repr(handle) and "256 → 128 tokens" in repr(handle)
    assert len(calls) == 4
    assert 1e-4 * original.std() < (merged - original).abs().mean() < original.std()
    assert torch.equal(run(model, inputs), original)


def test_without_an_entry_it_is_refused():
    if not hasattr(diffusers, "BriaTransformer2DModel"):
        pytest.skip("this release of diffusers has no Bria")
    with pytest.raises((ConfigError, UnsupportedModelError)):
        turbovlm.apply(bria(), keep=0.5)


def test_an_entry_is_registered_once(registered):
    with pytest.raises(ConfigError, match="BriaTransformerBlock is registered already, as Bria"):
        turbovlm.register(entry())
