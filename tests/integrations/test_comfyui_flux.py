"""FLUX as ComfyUI spells it, in a stand-in: its blocks attend by themselves, with a mask among their arguments."""

from __future__ import annotations

import pytest
import torch

import turbovlm

pytest.importorskip("diffusers")

from standing_in import left_on, standins

from denoisers import DENOISERS, noise, words


@pytest.fixture(scope="module", autouse=True)
def interface():
    with standins("comfy"):
        yield


def own():
    return DENOISERS["flux"]().eval()


@pytest.fixture
def flux():
    from comfy.ldm.flux.model import Flux

    return Flux(own()).eval()


@torch.no_grad()
def of_comfyui(model, references=(), options=None):
    given = noise(0, 2, 4, 32, 48), torch.full((2,), 0.5), words(2), noise(2, 2, 32)
    return model(*given, ref_latents=list(references) or None, transformer_options=options or {})


@torch.no_grad()
def of_diffusers(model, references=()):
    from comfy.ldm.flux.model import packed, places

    images = [noise(0, 2, 4, 32, 48), *references]
    out = model(
        hidden_states=torch.cat([packed(each) for each in images], dim=1),
        timestep=torch.full((2,), 0.5),
        encoder_hidden_states=words(2),
        pooled_projections=noise(2, 2, 32),
        img_ids=torch.cat([places(each, i) for i, each in enumerate(images)]),
        txt_ids=torch.zeros(7, 3),
    ).sample[:, : 16 * 24]
    return out.unflatten(-1, (-1, 2, 2)).unflatten(1, (16, -1)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


SETTINGS = [{"keep": 0.5}, {"keep": 0.5, "proportional": False}, {"keep": 0.4, "span": 1}, {"keep": 0.5, "span": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_it_gives_is_what_diffusers_of_the_same_weights_gives(flux, settings):
    same, whole = own(), of_comfyui(flux)
    torch.testing.assert_close(whole, of_diffusers(same), rtol=0, atol=2e-5)
    with turbovlm.apply(flux, **settings), turbovlm.apply(same, **settings):
        out = of_comfyui(flux)
        torch.testing.assert_close(out, of_diffusers(same), rtol=0, atol=2e-5)
    assert not torch.allclose(out, whole, atol=1e-2)
    assert torch.equal(of_comfyui(flux), whole) and not left_on(flux)


def test_a_reference_is_an_image_of_its_own(flux):
    reference, same = [noise(5, 2, 4, 24, 20)], own()
    with turbovlm.apply(flux, keep=0.6) as handle, turbovlm.apply(same, keep=0.6):
        out = of_comfyui(flux, reference)
        torch.testing.assert_close(out, of_diffusers(same, reference), rtol=0, atol=2e-5)
        assert "tokens of 2 images" in str(handle)


def test_blocks_replaced_by_another_extension_are_whole(flux):
    options = {"patches_replace": {"dit": {("double_block", 0): print}}}
    with turbovlm.apply(flux, keep=0.5), pytest.warns(UserWarning, match="replaced blocks, in patches_replace"):
        out = of_comfyui(flux, options=options)
    assert torch.equal(out, of_comfyui(flux))
