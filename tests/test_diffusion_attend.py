"""Attention of merged tokens: sizes count in whatever processor attends, and positions are those that are left."""

from __future__ import annotations

import pytest
import torch

import turbovlm
from denoisers import DENOISERS, noise, unet_inputs
from test_diffusion import run
from turbovlm.errors import StateError
from turbovlm.ops import host

pytest.importorskip("diffusers")


@pytest.fixture
def attended(monkeypatch):
    """The biases of the calls that turbovlm's operators got."""
    biases, own = [], host.attend

    def noted(q, k, v, bias, scale):
        biases.append(bias)
        return own(q, k, v, bias, scale)

    monkeypatch.setattr(host, "attend", noted)
    return biases


CALLS = {"sd15": 6, "sdxl": 30, "pixart": 3, "dit": 3, "sd3": 3, "sd35": 5, "flux": 5}


@pytest.mark.parametrize("name", CALLS)
def test_sizes_count_in_every_self_attention(name, attended):
    """By turbovlm's operators, which add a bias; and nothing is added where it is switched off."""
    model, inputs = DENOISERS[name](), DENOISERS[name].inputs(2, 32, 32)
    with turbovlm.apply(model, keep=0.5):
        run(model, inputs)
    assert len(attended) == CALLS[name] and all(bias.shape[:3] == (2, 1, 1) for bias in attended)
    with turbovlm.apply(model, keep=0.5, proportional=False):
        run(model, inputs)
    assert len(attended) == CALLS[name]


@pytest.mark.parametrize("scope", ["part", "block"])
def test_processors_that_attend_otherwise_take_the_sizes_as_a_mask(scope, attended):
    from diffusers.models.attention_processor import AttnProcessor

    model, inputs = DENOISERS["sd15"](), unet_inputs(2, 32, 32)
    with turbovlm.apply(model, keep=0.5, scope=scope):
        ours, calls = run(model, inputs), len(attended)
        model.set_attn_processor(AttnProcessor())
        theirs = run(model, inputs)
    assert len(attended) == calls > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_a_processor_that_attends_by_something_else_is_refused(monkeypatch):
    from diffusers.models.attention_processor import AttnProcessor2_0

    model, inputs = DENOISERS["sd15"](), unet_inputs(2, 32, 32)
    monkeypatch.setattr(AttnProcessor2_0, "__call__", lambda self, attn, x, *rest, **more: x)
    monkeypatch.setattr("turbovlm.diffusion.whole._is_of", lambda *of_a_class: True)
    with turbovlm.apply(model, keep=0.5), pytest.raises(StateError, match="AttnProcessor2_0 does not attend by"):
        run(model, inputs)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_fused_projections_are_known_too(name, attended):
    model, inputs = DENOISERS[name](), DENOISERS[name].inputs(1, 32, 32)
    with turbovlm.apply(model, keep=0.5):
        apart = run(model, inputs)
        calls = len(attended)
        model.fuse_qkv_projections()
        torch.testing.assert_close(run(model, inputs), apart, rtol=0, atol=1e-5 * float(apart.abs().max()))
    assert len(attended) == 2 * calls > 0


def test_a_forward_of_another_library_is_called(attended):
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, 32, 32)
    block, calls = model.down_blocks[0].attentions[0].transformer_blocks[0], []
    own = block.attn1.forward
    block.attn1.forward = lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]
    with turbovlm.apply(model, keep=0.5):
        run(model, inputs)
    assert calls == [1] and len(attended) == 5


def test_an_argument_that_is_not_known_reaches_the_processor(attended):
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, 32, 32)
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
        calls = len(attended)
        other = run(model, {**inputs, "cross_attention_kwargs": {"temb": noise(1, 1, 8)}})
    torch.testing.assert_close(other, merged, rtol=0, atol=1e-5)
    assert len(attended) == 2 * calls > 0


def test_backends_of_attention():
    from diffusers.models.attention_dispatch import attention_backend

    model, inputs = DENOISERS["flux"](), DENOISERS["flux"].inputs(2, 32, 32)
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
        with attention_backend("_native_math"):
            torch.testing.assert_close(run(model, inputs), merged, rtol=0, atol=1e-4)
        refused = pytest.raises(StateError, match=r"backend '_native_flash' takes no mask.*give proportional=False")
        with attention_backend("_native_flash"), refused:
            run(model, inputs)
        model.transformer_blocks[1].attn.processor._attention_backend = "_native_flash"
        with pytest.raises(StateError, match="backend '_native_flash' takes no mask"):
            run(model, inputs)


@torch.no_grad()
def test_rotary_positions_are_those_of_the_tokens_that_merged_ones_went_into(monkeypatch):
    """Each image of a batch with its own angles, by the library's own processor."""
    from diffusers.models.transformers import transformer_flux

    angles, turn = [], transformer_flux.apply_rotary_emb
    seen = lambda x, rotary, **how: (angles.append((len(x), rotary[0])), turn(x, rotary, **how))[1]  # noqa: E731
    model, inputs = DENOISERS["flux"](), DENOISERS["flux"].inputs(2, 32, 32)
    with turbovlm.apply(model, keep=0.5, scope="part") as handle:
        run(model, inputs)
        monkeypatch.setattr(transformer_flux, "apply_rotary_emb", seen)
        run(model, inputs)
        merge = handle.features[0].last["single_transformer_blocks:0"].merge
    every = model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))[0]
    assert [batch for batch, _ in angles] == [2] * 10  # queries and keys of five blocks
    for cos in [cos for _, cos in angles[-6:]]:
        for kept, own in zip(merge.kept, cos.angles[:, :, 0]):
            assert torch.equal(own[:7], every[:7]) and torch.equal(own[7:], every[7:][kept])
