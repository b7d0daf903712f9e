"""The panel for Forge, in a stand-in for its interface; in Forge itself: test_webui_itself.py."""

from __future__ import annotations

import copy
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

import turbovlm
from turbovlm.errors import UnsupportedModelError

pytest.importorskip("diffusers")
pytest.importorskip("gradio")

import gradio
from standing_in import left_on, loaded, standins

from denoisers import DENOISERS, noise, words


@pytest.fixture(scope="module", autouse=True)
def module():
    with standins("backend", "modules"):
        yield loaded("integrations/webui/scripts/turbovlm_script.py", "turbovlm_script")
        del sys.modules["turbovlm_script"]


@pytest.fixture
def script(module):
    return module.TurboScript()


class Model(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.diffusion_model = unet

    def apply_model(self, x, t, c_crossattn=None, transformer_options=None):
        return self.diffusion_model(x, timesteps=t, context=c_crossattn, transformer_options=transformer_options)


class Unet:
    """A model with what extensions have put around it; clones share the model."""

    def __init__(self, model, options=None):
        self.model, self.model_options = model, options or {}

    def clone(self):
        return Unet(self.model, copy.deepcopy(self.model_options))

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper

    @torch.no_grad()
    def __call__(self):
        text = {"c_crossattn": words(2), "transformer_options": {}}
        given = {"input": noise(0, 1, 4, 16, 24).repeat(2, 1, 1, 1), "timestep": torch.full((2,), 500.0), "c": text}
        run = self.model_options.get("model_function_wrapper")
        if run is None:
            return self.model.apply_model(given["input"], given["timestep"], **text)
        return run(self.model.apply_model, given)


def own():
    return DENOISERS["sd15"]().eval()


@torch.no_grad()
def of_diffusers(unet):
    return unet(noise(0, 1, 4, 16, 24).repeat(2, 1, 1, 1), torch.full((2,), 500.0), words(2)).sample


@pytest.fixture
def image():
    """What is known of an image that is made."""
    from backend.nn.unet import IntegratedUNet2DConditionModel

    unet = Unet(Model(IntegratedUNet2DConditionModel(own()).eval()))
    objects = SimpleNamespace(unet=unet)
    return SimpleNamespace(sd_model=SimpleNamespace(forge_objects=objects), extra_generation_params={}, enable_hr=False)


@pytest.mark.parametrize("proportional", [True, False])
def test_what_it_gives_is_what_diffusers_unet_of_the_same_weights_gives(script, image, proportional):
    before, unet = image.sd_model.forge_objects.unet, own()
    whole = before()
    script.process_before_every_sampling(image, True, 0.5, 0.4, proportional)
    out = image.sd_model.forge_objects.unet()
    with turbovlm.apply(unet, keep=0.5, proportional=proportional):
        assert torch.allclose(out, of_diffusers(unet), atol=1e-5)
    assert torch.equal(before(), whole) and not left_on(before.model)
    assert image.extra_generation_params == {"Turbo keep": 0.5, "Turbo proportional": proportional}


def test_the_pass_of_hires_fix_has_a_share_of_its_own(script, image):
    objects, first = image.sd_model.forge_objects, image.sd_model.forge_objects.unet
    image.enable_hr = True
    outs = []
    for image.is_hr_pass in (False, True):
        objects.unet = first
        script.process_before_every_sampling(image, True, 0.5, 1.0, True)
        outs.append(objects.unet())
    assert not torch.equal(*outs) and torch.equal(outs[1], first())
    assert image.extra_generation_params["Turbo keep in hires. fix"] == 1.0


def test_off_is_the_model_itself(script, image):
    first = image.sd_model.forge_objects.unet
    script.process_before_every_sampling(image, False, 0.5, 0.5, True)
    assert image.sd_model.forge_objects.unet is first and image.extra_generation_params == {}


def around(apply_model, given):
    return 2 * apply_model(given["input"], given["timestep"], **given["c"])


def test_what_another_extension_has_put_around_the_model_still_runs(script, image):
    objects = image.sd_model.forge_objects
    script.process_before_every_sampling(image, True, 0.5, 0.5, True)
    once = objects.unet()
    objects.unet = Unet(objects.unet.model, {"model_function_wrapper": around})
    script.process_before_every_sampling(image, True, 0.5, 0.5, True)
    assert torch.equal(objects.unet.clone()(), 2 * once)


def test_other_programs_and_models_are_refused(script, image):
    image.sd_model.forge_objects.unet.model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"Linear .* no block that turbovlm knows"):
        script.process_before_every_sampling(image, True, 0.5, 0.5, True)
    image.sd_model = object()
    with pytest.raises(UnsupportedModelError, match=r"no forge_objects: .* Forge, and in ComfyUI"):
        script.process_before_every_sampling(image, True, 0.5, 0.5, True)


def test_what_the_panel_asks_for_is_what_its_method_takes(script):
    with gradio.Blocks():
        controls = script.ui(False)
    taken = [*inspect.signature(script.process_before_every_sampling).parameters][1:-1]
    assert len(controls) == len(taken) and [field for field, _ in script.infotext_fields] == list(controls)
    assert [control.value for control in controls] == [False, 0.5, 0.5, True]
