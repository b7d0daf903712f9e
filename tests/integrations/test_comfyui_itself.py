"""The node in ComfyUI itself, on a CPU: `TURBOVLM_TEST_COMFYUI=/path/to/ComfyUI pytest` of this file."""
# ruff: noqa: E402

from __future__ import annotations

import os
import sys

import pytest

PATH = os.environ.get("TURBOVLM_TEST_COMFYUI")
if PATH is None:
    pytest.skip("TURBOVLM_TEST_COMFYUI does not say where ComfyUI is", allow_module_level=True)

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from standing_in import left_on, loaded

import turbovlm
from denoisers import livelier, noise, words
from turbovlm.diffusion.scoped import Scoped

sys.path.insert(0, PATH)

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.supported_models
import comfy.utils
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

TurboMerge = loaded("integrations/comfyui", "turbovlm_node").NODE_CLASS_MAPPINGS["TurboMerge"]

KINDS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SHAPE = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2], "channel_mult": (1, 2)}
SHAPE |= {"num_heads": 4, "use_spatial_transformer": True, "context_dim": 32, "legacy": False, "image_size": 16}
SHAPE |= {"transformer_depth": [1, 1, 2, 2], "transformer_depth_output": [1, 1, 1, 2, 2, 2]}
SHAPE |= {"transformer_depth_middle": 2, "use_linear_in_transformer": False}


def both():
    """A UNet of diffusers, and one of ComfyUI with the same weights, as nodes are given it."""
    torch.manual_seed(0)
    size = {"block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 32, "attention_head_dim": 4}
    size |= {"down_block_types": KINDS[:1] * 2, "up_block_types": KINDS[1:] * 2, "transformer_layers_per_block": (1, 2)}
    own = livelier(UNet2DConditionModel(sample_size=16, **size)).eval()
    config = comfy.supported_models.SD15({**SHAPE, "disable_unet_model_creation": True})
    model = comfy.model_base.BaseModel(config)
    model.diffusion_model = UNetModel(**SHAPE, device="cpu", operations=comfy.ops.disable_weight_init).eval()
    names, given, wanted = comfy.utils.unet_to_diffusers(SHAPE), own.state_dict(), model.diffusion_model.state_dict()
    weights = {there: given[here].reshape(wanted[there].shape) for here, there in names.items() if here in given}
    model.diffusion_model.load_state_dict(weights)
    device = torch.device("cpu")
    return own, comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def sampled(model, cfg=4.0):
    """Latents that KSampler makes in four steps."""
    text = [[[words(1), {}]], [[words(1).flip(1), {}]]]
    latent = torch.zeros(1, 4, 16, 24)
    given = {"positive": text[0], "negative": text[1], "latent_image": latent, "disable_pbar": True, "seed": 0}
    return comfy.sample.sample(model, noise(0, 1, 4, 16, 24), 4, cfg, "euler", "normal", **given)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"keep": 0.5}, {"keep": 0.4, "span": 1}, {"keep": 0.5, "proportional": False}])
def test_a_step_is_that_of_diffusers(settings):
    own, model = both()
    (merging,) = TurboMerge().merge(model, **settings)
    x, t, text = noise(0, 1, 4, 16, 24).repeat(2, 1, 1, 1), torch.full((2,), 500.0), words(2)
    with merging.get_wrappers("apply_model", "turbovlm")[0].scoped.on(model.model.diffusion_model):
        out = model.model.diffusion_model(x, t, context=text, transformer_options={})
    with turbovlm.apply(own, **settings):
        assert torch.allclose(out, own(x, t, text).sample, atol=1e-5)


def test_merged_in_the_sampler_and_nowhere_else():
    _, model = both()
    whole = sampled(model)
    (merging,) = TurboMerge().merge(model, keep=0.5)
    merged = sampled(merging)
    assert torch.isfinite(merged).all() and not torch.allclose(merged, whole, atol=1e-3)
    assert torch.equal(sampled(merging), merged)
    assert torch.equal(sampled(model), whole) and not left_on(model.model)
    (same,) = TurboMerge().merge(merging, keep=1.0)
    assert torch.equal(sampled(same), whole)


def test_steps_outside_of_the_range_are_whole():
    _, model = both()
    (late,) = TurboMerge().merge(model, keep=0.5, start_percent=0.9)
    (never,) = TurboMerge().merge(model, keep=0.5, start_percent=0.4, end_percent=0.6)  # steps are at 0, ⅓, ⅔ and 1
    assert not torch.equal(sampled(late), sampled(model))
    assert torch.equal(sampled(never), sampled(model))


def test_beside_comfyuis_own_token_merging_blocks_are_whole():
    _, model = both()
    seen = []
    model = model.clone()
    model.set_model_attn1_patch(lambda q, k, v, options: (seen.append(q.shape[1]), q, k, v)[1:])
    (merging,) = TurboMerge().merge(model, keep=0.5)
    with pytest.warns(UserWarning, match="attn1_patch"):
        out = sampled(merging)
    assert torch.equal(out, sampled(model)) and 16 * 24 in seen


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"keep": 0.5}, {"keep": 0.4, "span": 1}, {"keep": 0.5, "proportional": False}])
def test_flux_is_that_of_diffusers(settings):
    torch.manual_seed(0)
    size = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2}
    size |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    own = livelier(FluxTransformer2DModel(patch_size=1, in_channels=16, **size)).eval()
    size = {"in_channels": 4, "out_channels": 4, "vec_in_dim": 32, "context_in_dim": 32, "hidden_size": 32}
    size |= {"mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3, "axes_dim": [4, 4, 8]}
    size |= {"theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False}
    flux = Flux(**size, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init).eval()
    given, state = own.state_dict(), flux.state_dict()
    for here, there in comfy.utils.flux_to_diffusers(size).items():
        if here in given:
            name, place, *change = (there, None) if isinstance(there, str) else there
            value = change[0](given[here]) if change else given[here]
            (state[name] if place is None else state[name].narrow(*place)).copy_(value)
    flux.load_state_dict(state)
    x, t, text, pooled = noise(0, 2, 4, 32, 48), torch.full((2,), 0.5), words(2), noise(2, 2, 32)
    packed = x.view(2, 4, 16, 2, 24, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16 * 24, 16)
    places = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(16.0), torch.arange(24.0), indexing="ij"), dim=-1)
    ids = {"img_ids": places.view(-1, 3), "txt_ids": torch.zeros(7, 3)}
    with Scoped(turbovlm.DenoiseConfig(**settings)).on(flux), turbovlm.apply(own, **settings):
        out = flux(x, t, text, y=pooled, transformer_options={})
        expected = own(packed, text, pooled, t, **ids).sample.view(2, 16, 24, 4, 2, 2)
    torch.testing.assert_close(out, expected.permute(0, 3, 1, 4, 2, 5).reshape(x.shape), rtol=0, atol=2e-5)
    assert not left_on(flux)
