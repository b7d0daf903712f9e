"""The panel with Forge's own UNet and patcher, on a CPU: `TURBOVLM_TEST_FORGE=/path/to/forge pytest` of this file."""
# ruff: noqa: E402

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

PATH = os.environ.get("TURBOVLM_TEST_FORGE")
if PATH is None:
    pytest.skip("TURBOVLM_TEST_FORGE does not say where Forge is", allow_module_level=True)

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from standing_in import left_on, loaded, standins

import turbovlm
from denoisers import livelier, noise, words

sys.path.insert(0, PATH)
sys.argv = ["forge", "--always-cpu"]  # which it reads when it is imported

from backend.nn.unet import IntegratedUNet2DConditionModel
from backend.patcher.unet import UnetPatcher
from backend.sampling.condition import compile_conditions
from backend.sampling.sampling_function import calc_cond_uncond_batch
from packages_3rdparty.comfyui_lora_collection.utils import unet_to_diffusers

with standins("modules"):
    TurboScript = loaded("integrations/webui/scripts/turbovlm_script.py", "turbovlm_script").TurboScript

SHAPE = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2], "channel_mult": (1, 2)}
SHAPE |= {"num_heads": 4, "use_spatial_transformer": True, "context_dim": 32, "transformer_depth": [1, 1, 1, 1]}
SHAPE |= {"transformer_depth_output": [1] * 6, "transformer_depth_middle": 1, "use_linear_in_transformer": False}


def both():
    """A UNet of diffusers, and one of Forge with the same weights, as extensions are given it."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    size = {"block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 32, "attention_head_dim": 4}
    own = livelier(UNet2DConditionModel(sample_size=16, **size, **kinds)).eval()
    unet = IntegratedUNet2DConditionModel(**SHAPE).eval()
    names, given, wanted = unet_to_diffusers(SHAPE), own.state_dict(), unet.state_dict()
    unet.load_state_dict(
        {there: given[here].reshape(wanted[there].shape) for here, there in names.items() if here in given}
    )
    device = torch.device("cpu")
    unet.storage_dtype = unet.computation_dtype = torch.float32
    unet.load_device = unet.offload_device = unet.initial_device = device
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return own, UnetPatcher.from_model(unet, EulerDiscreteScheduler(**betas), config=None)


@torch.no_grad()
def step(unet):
    """What the sampler makes of noise, for two prompts."""
    prompts = [compile_conditions(words(1)), compile_conditions(words(1).flip(1))]
    sigma = torch.full((1,), 5.0)
    return calc_cond_uncond_batch(unet.model, *prompts, noise(0, 1, 4, 16, 24), sigma, unet.model_options)


def image_of(unet):
    objects = SimpleNamespace(unet=unet)
    return SimpleNamespace(sd_model=SimpleNamespace(forge_objects=objects), extra_generation_params={}, enable_hr=False)


@torch.no_grad()
@pytest.mark.parametrize("proportional", [True, False])
def test_a_step_is_that_of_diffusers(proportional):
    own, unet = both()
    image = image_of(unet)
    TurboScript().process_before_every_sampling(image, True, 0.5, 0.5, proportional)
    x, t, text = noise(0, 1, 4, 16, 24).repeat(2, 1, 1, 1), torch.full((2,), 500.0), words(2)
    merging = image.sd_model.forge_objects.unet.model_options["model_function_wrapper"]
    with merging.scoped.on(unet.model.diffusion_model):
        out = unet.model.diffusion_model(x, t, context=text, transformer_options={})
    with turbovlm.apply(own, keep=0.5, proportional=proportional):
        assert torch.allclose(out, own(x, t, text).sample, atol=1e-5)


def test_merged_in_the_sampler_and_nowhere_else():
    _, unet = both()
    whole, image = step(unet), image_of(unet)
    TurboScript().process_before_every_sampling(image, True, 0.5, 0.5, True)
    merging = image.sd_model.forge_objects.unet
    for each, before in zip(step(merging), whole):
        assert torch.isfinite(each).all() and not torch.allclose(each, before, atol=1e-3)
    assert all(map(torch.equal, step(merging.clone()), step(merging)))
    assert all(map(torch.equal, step(unet), whole)) and not left_on(unet.model)
