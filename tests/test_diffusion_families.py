"""A family of denoisers is one entry, and those of other packages are found like turbovlm's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import turbovlm
from denoisers import DENOISERS, noise
from families import _livelier as livelier
from test_diffusion import run
from turbovlm.diffusion import families
from turbovlm.errors import ConfigError, UnsupportedModelError
from turbovlm.ops import host
from turbovlm.registry import unregister

diffusers = pytest.importorskip("diffusers")
CONSISID = "diffusers.models.transformers.consisid_transformer_3d.ConsisID"
VIDEO = (2, 3, 4, 16, 16)


def consisid(**settings):
    size = {"in_channels": 4, "out_channels": 4, "num_layers": 4, "sample_width": 16, "sample_height": 16}
    size |= {"attention_head_dim": 16, "num_attention_heads": 2, "text_embed_dim": 32, "max_text_seq_length": 7}
    torch.manual_seed(0)
    return livelier(diffusers.ConsisIDTransformer3DModel(**size, **settings, sample_frames=9, time_embed_dim=8))


def consisid_inputs():
    words, steps = noise(1, 2, 7, 32), torch.full((2,), 500)
    return {"hidden_states": noise(0, *VIDEO), "encoder_hidden_states": words, "timestep": steps}


def entry():
    """A copy of CogVideoX's, whose blocks are spelled alike."""
    return replace(
        families.COGVIDEOX,
        family="ConsisID",
        holders=(f"{CONSISID}Transformer3DModel",),
        blocks=(replace(families.COGVIDEOX.blocks[0], path=f"{CONSISID}Block"),),
        between=("id_vit_hidden",),
    )


@pytest.fixture
def registered():
    added = entry()
    turbovlm.register(added)
    yield added
    unregister(added)


def test_an_entry_is_enough(registered):
    model, inputs = consisid(), consisid_inputs()
    original = run(model, inputs)
    with turbovlm.apply(model, keep=1.0):
        assert torch.equal(run(model, inputs), original)
    with turbovlm.apply(model, keep=0.5) as handle:
        merged = run(model, inputs)
        assert "ConsisID: 50% of the tokens in stacks" in repr(handle) and "192 → 96 tokens" in repr(handle)
    assert 1e-4 * original.std() < (merged - original).abs().mean() < original.std()
    assert torch.equal(run(model, inputs), original)


def test_what_an_entry_says_of_arguments_between_blocks(registered):
    """A face is added behind every second block, to all tokens."""
    face = {"LFE_id_dim": 8, "LFE_vit_dim": 8, "LFE_depth": 5, "LFE_output_dim": 21, "LFE_num_id_token": 1}
    face |= {"LFE_num_heads": 2, "LFE_dim_head": 8, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2}
    model, inputs = consisid(is_train_face=True, **face), consisid_inputs()
    faces = {"id_cond": noise(2, 2, 8), "id_vit_hidden": [noise(3 + i, 2, 9, 8) for i in range(5)]}
    found = []
    for given in ({"scope": "block"}, {"scope": "stack", "span": 4}):
        with turbovlm.apply(model, keep=0.5, **given):
            found.append(run(model, {**inputs, **faces}))
    torch.testing.assert_close(*found, rtol=0, atol=0.05 * float(found[0].std()))


def test_parts_of_a_family_like_flux(monkeypatch):
    calls, own = [], host.attend
    monkeypatch.setattr(host, "attend", lambda *args: (calls.append(1), own(*args))[1])
    size = {"patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    size |= {"num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}
    torch.manual_seed(0)
    model, inputs = livelier(diffusers.BriaTransformer2DModel(**size)), DENOISERS["flux"].inputs(2, 32, 32)
    del inputs["pooled_projections"]
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
    with pytest.raises((ConfigError, UnsupportedModelError)):
        turbovlm.apply(consisid(), keep=0.5)


def test_an_entry_is_registered_once(registered):
    with pytest.raises(ConfigError, match="ConsisIDBlock is registered already, as ConsisID"):
        turbovlm.register(entry())
