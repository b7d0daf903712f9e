"""The ComfyUI node, in a stand-in for ComfyUI's interface; in ComfyUI itself: test_comfyui_itself.py."""

from __future__ import annotations

import inspect
import sys
import warnings

import pytest
import torch

import turbovlm
from turbovlm.errors import ConfigError, TurboError, UnsupportedModelError

pytest.importorskip("diffusers")

from standing_in import left_on, loaded, standins

from denoisers import DENOISERS, noise, words


@pytest.fixture(scope="module", autouse=True)
def node():
    with standins("comfy"):
        yield loaded("integrations/comfyui", "turbovlm_node").NODE_CLASS_MAPPINGS["TurboMerge"]
        del sys.modules["turbovlm_node"], sys.modules["turbovlm_node.node"]


class Sampling:
    def percent_to_sigma(self, percent):
        return {0.0: 999999999.9, 1.0: 0.0}.get(percent, 10 * (1 - percent))


class Base(torch.nn.Module):
    """A model, as ComfyUI's are: its UNet, in a call that wrappers stand around."""

    def __init__(self, unet):
        super().__init__()
        self.diffusion_model, self.model_sampling = unet, Sampling()

    def step(self, x, sigma, c_crossattn=None, transformer_options=None):
        return self.diffusion_model(
            x, timesteps=100 * sigma, context=c_crossattn, transformer_options=transformer_options
        )


class Model:
    """A model with what nodes have put around it; clones share the model."""

    def __init__(self, base, wrappers=None, options=None):
        self.model, self.wrappers, self.options = base, wrappers or {}, options or {}

    def clone(self):
        wrappers = {kind: {key: [*each] for key, each in keys.items()} for kind, keys in self.wrappers.items()}
        return Model(self.model, wrappers, dict(self.options))

    def get_model_object(self, name):
        return getattr(self.model, name)

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    @torch.no_grad()
    def __call__(self, sigma=5.0, batch=2, rows=16, columns=24):
        from comfy.patcher_extension import Executor

        x, text = noise(0, 1, 4, rows, columns).repeat(batch, 1, 1, 1), words(batch)
        around = [wrapper for each in self.wrappers.get("apply_model", {}).values() for wrapper in each]
        run = Executor(self.model.step, self.model, around)
        return run(x, torch.full((batch,), sigma), c_crossattn=text, transformer_options=dict(self.options))


def own():
    return DENOISERS["sd15"]().eval()


@pytest.fixture
def model():
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return Model(Base(UNetModel(own()).eval()))


@torch.no_grad()
def of_diffusers(unet, sigma=5.0):
    given = noise(0, 1, 4, 16, 24).repeat(2, 1, 1, 1), torch.full((2,), 100 * sigma), words(2)
    return unet(*given).sample


SETTINGS = {"keep": {"keep": 0.5}, "less": {"keep": 0.3}, "alone": {"keep": 0.5, "span": 1}}
SETTINGS |= {"mean": {"keep": 0.5, "proportional": False}, "large": {"keep": 0.5, "min_tokens": 300}}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_it_gives_is_what_diffusers_unet_of_the_same_weights_gives(node, model, settings):
    unet = own()
    whole = model()
    assert torch.allclose(whole, of_diffusers(unet), atol=1e-5)
    (merging,) = node().merge(model, **settings)
    out = merging()
    with turbovlm.apply(unet, **settings):
        assert torch.allclose(out, of_diffusers(unet), atol=1e-5)
    assert not torch.allclose(out, whole, atol=1e-3)
    assert torch.equal(model(), whole) and not left_on(model.model)


def test_what_a_node_asks_for_is_what_its_method_takes(node):
    inputs = node.INPUT_TYPES()
    taken = inspect.signature(node().merge).parameters
    assert [*inputs["required"], *inputs["optional"]] == list(taken)
    for name, (_, given) in inputs["optional"].items():
        assert taken[name].default == given["default"]


def test_all_tokens_are_the_model_itself(node, model):
    (whole,) = node().merge(model, keep=1.0)
    assert torch.equal(whole(), model()) and not whole.wrappers.get("apply_model")


@pytest.mark.parametrize("start, end, sigma, merged", [(0, 0.4, 5, False), (0, 0.4, 8, True), (0.4, 1, 8, False)])
def test_steps_outside_of_the_range_are_whole(node, model, start, end, sigma, merged):
    (merging,) = node().merge(model, keep=0.5, start_percent=start, end_percent=end)
    assert torch.equal(merging(sigma), model(sigma)) is not merged


def test_of_two_nodes_the_later_counts(node, model):
    (first,) = node().merge(model, keep=0.3)
    (second,) = node().merge(first, keep=0.5)
    (alone,) = node().merge(model, keep=0.5)
    assert torch.equal(second(), alone()) and not torch.equal(first(), alone())


def turned(q, k, v, options):
    """What depends on where a token stands."""
    return q * torch.linspace(0, 1, q.shape[1])[:, None], k, v


def test_blocks_with_functions_of_other_extensions_are_whole_and_it_says_so(node, model):
    model.options = {"patches": {"attn1_patch": [turned]}}
    (merging,) = node().merge(model, keep=0.5)
    with pytest.warns(UserWarning, match="leaves all blocks whole: .* attn1_patch"):
        assert torch.equal(merging(), model())


def test_one_replaced_attention_leaves_one_block_whole(node, model):
    seen = []

    def attend(q, k, v, options):
        seen.append(q.shape[1])
        return turned(v, k, v, options)[0]

    model.options = {"patches_replace": {"attn1": {("input", 1, 0): attend}}}
    (merging,) = node().merge(model, keep=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(merging(), model())
    assert seen == [16 * 24] * 2


def test_what_is_not_known_is_refused_with_what_is(node, model):
    model.model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"Linear .* no block that turbovlm knows; .* UNets of ComfyUI"):
        node().merge(model, keep=0.5)


def test_settings_are_checked_where_they_are_made(node, model):
    with pytest.raises(ConfigError, match=r"start_percent=0\.5: must be less than end_percent, which is 0\.5"):
        node().merge(model, keep=0.5, start_percent=0.5, end_percent=0.5)
    with pytest.raises(ConfigError, match="span=0"):
        node().merge(model, keep=0.5, span=0)


def test_nothing_is_left_behind_an_exception(node, model):
    def fail(q, k, v, options):
        raise RuntimeError("out of memory")

    whole = model()
    (merging,) = node().merge(model, keep=0.5)
    merging.options = {"patches": {"attn1_patch": [fail]}}
    with pytest.raises(RuntimeError, match="out of memory"):
        merging()
    assert not left_on(model.model) and torch.equal(model(), whole)


def test_a_model_that_is_accelerated_is_refused(node, model):
    (merging,) = node().merge(model, keep=0.5)
    with turbovlm.apply(model.model.diffusion_model, keep=0.3), pytest.raises(TurboError, match="accelerated already"):
        merging()


def test_self_attention_that_reads_the_text_leaves_its_block_whole(node, model):
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "disable_self_attn"):
            module.disable_self_attn = True
    (merging,) = node().merge(model, keep=0.5)
    with pytest.warns(UserWarning, match="its disable_self_attn is set"):
        assert torch.equal(merging(), model())
