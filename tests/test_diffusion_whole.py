"""Parts that are left whole: inside of them stands something that may look at positions."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import turbovlm
from denoisers import DENOISERS, unet_inputs
from prompted_pipelines import PIPES
from test_diffusion import run

diffusers = pytest.importorskip("diffusers")
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture
def unet():
    return DENOISERS["sd15"]()


@pytest.fixture
def inputs():
    return unet_inputs(1, 32, 32)


def merged_in(unet, inputs, **settings):
    with turbovlm.apply(unet, keep=0.5, **settings):
        return run(unet, inputs)


def own_processor(read):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Reading(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            read.append(hidden_states.shape[1])
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    return Reading()


def put_processor(attention, read):
    attention.set_processor(own_processor(read))


def put_call_of_class(attention, read):
    """What libraries do that keep the maps of all attentions: they replace the processor's `__call__`."""
    kind = type(attention.processor)
    own = kind.__call__

    def call(self, attn, hidden_states, *args, **kwargs):
        read.append(hidden_states.shape[1])
        return own(self, attn, hidden_states, *args, **kwargs)

    kind.__call__ = call
    return lambda: setattr(kind, "__call__", own)


def put_forward(attention, read):
    """What prompt-to-prompt and MasaCtrl do."""
    own = type(attention).forward

    def forward(hidden_states, *args, **kwargs):
        read.append(hidden_states.shape[1])
        return own(attention, hidden_states, *args, **kwargs)

    attention.forward = forward


def put_hook(attention, read):
    attention.to_q.register_forward_hook(lambda module, given, out: read.append(out.shape[1]))


def put_early_hook(attention, read):
    attention.to_out[0].register_forward_pre_hook(
        functools.partial(lambda read, m, x: read.append(x[0].shape[1]), read)
    )


def put_forward_of_layer(attention, read):
    own = attention.to_k.forward
    attention.to_k.forward = lambda x: (read.append(x.shape[1]), own(x))[1]


def put_forward_on_a_placed_layer(attention, read):
    """As sequential offloading places layers, on which another forward is put, below the hook or above it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(attention.to_k, AlignDevicesHook(execution_device="cpu"))
    put_forward_of_layer(attention, read)


def put_forward_below_placing(attention, read):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    put_forward_of_layer(attention, read)
    add_hook_to_module(attention.to_k, AlignDevicesHook(execution_device="cpu"))


def put_forward_below_casting(attention, read):
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.layerwise_casting import LayerwiseCastingHook

    put_forward_of_layer(attention, read)
    registry = HookRegistry.check_if_exists_or_initialize(attention.to_k)
    registry.register_hook(LayerwiseCastingHook(torch.float32, torch.float32, False), "casting")


OF_LAYERS = [
    put_forward_of_layer,
    put_forward_on_a_placed_layer,
    put_forward_below_placing,
    put_forward_below_casting,
]
READERS = [put_processor, put_call_of_class, put_forward, put_hook, put_early_hook, *OF_LAYERS]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", ["attn1", "attn2"])
@pytest.mark.parametrize("put", READERS)
def test_a_reader_gets_all_tokens_once(unet, inputs, put, path, when):
    """And all other parts merge as without it: to call projections for A is nothing that it sees."""
    read, attention = [], unet.get_submodule(f"{BLOCK}.{path}")
    back = put(attention, read) if when == "before" else None
    with turbovlm.apply(unet, keep=0.5, scope="part") as handle:
        if when == "after":
            back = put(attention, read)
        run(unet, inputs)
        lines = [line for line in repr(handle).splitlines() if "left whole" in line]
    if back is not None:
        back()
    words = 7 if path == "attn2" and put in OF_LAYERS else 1024
    assert set(read) == ({1024, 256} if put is put_call_of_class else {words})
    assert put is put_call_of_class or len(read) == 1
    assert len(lines) >= 1 and all(path in line or put is put_call_of_class for line in lines)
    if not (put is put_forward and when == "after"):
        assert put is put_call_of_class or "test_diffusion_whole" in lines[0]
    else:
        assert "called another forward that was put in its place" in lines[0]


def test_a_hook_of_all_modules_gets_all_tokens(unet, inputs):
    read = []
    with turbovlm.apply(unet, keep=0.5, scope="part") as handle:
        query = unet.get_submodule(f"{BLOCK}.attn1.to_q")
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, given, out: read.append(out.shape[1]) if module is query else None
        )
        with pytest.warns(
            UserWarning, match="components whole: .* every module has a hook, .* take that off, .*; else handle"
        ):
            run(unet, inputs)
        hook.remove()
        assert "→" not in repr(handle)
        run(unet, inputs)
        assert "1024 → 512 tokens" in repr(handle)
    assert read == [1024]


def test_a_part_that_is_whole_gives_what_the_part_itself_gives(unet, inputs):
    seen = {}
    attention = unet.get_submodule(f"{BLOCK}.attn1")
    attention.register_forward_hook(lambda m, given, out: seen.update(x=given[0], out=out))
    put_processor(attention, [])
    with turbovlm.apply(unet, keep=0.5):
        run(unet, inputs)
    with torch.no_grad():
        assert torch.equal(seen["out"], attention.processor(attention, seen["x"]))


def test_hooks_around_parts_and_blocks_see_all_tokens_and_let_them_merge(unet, inputs):
    merged, read = merged_in(unet, inputs, scope="part"), []
    with turbovlm.apply(unet, keep=0.5, scope="part") as handle:
        for path in ("", ".attn1", ".attn2", ".ff"):
            unet.get_submodule(BLOCK + path).register_forward_hook(lambda m, i, out: read.append(out.shape[1]))
        assert torch.equal(run(unet, inputs), merged)
        assert "left whole" not in repr(handle)
    assert read == [1024] * 4


def test_adapters_and_hooks_of_libraries_merge(unet, inputs):
    """LoRA as sd-scripts put it in, weight norms and offloading change weights and devices, not positions."""
    attention = unet.get_submodule(f"{BLOCK}.attn1")

    class Adapter(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.own, self.down = layer.forward, torch.nn.Linear(layer.in_features, layer.out_features)
            layer.forward = self.forward

        def forward(self, x):
            return self.own(x) + 0.1 * self.down(x)

    adapter = Adapter(attention.to_q)
    torch.nn.utils.spectral_norm(attention.to_v)
    with turbovlm.apply(unet, keep=0.5) as handle:
        run(unet, inputs)
        assert "left whole" not in repr(handle)
    assert isinstance(adapter.down, torch.nn.Linear)


def test_attention_of_another_class(unet, inputs):
    from diffusers.models.attention_processor import Attention

    read = []

    class Own(Attention):
        def forward(self, hidden_states, *args, **kwargs):
            read.append(hidden_states.shape[1])
            return super().forward(hidden_states, *args, **kwargs)

    unet.get_submodule(f"{BLOCK}.attn1").__class__ = Own
    with turbovlm.apply(unet, keep=0.5, scope="part") as handle:
        assert f"left whole: {BLOCK}.attn1: it is a test_attention_of_another_class.<locals>.Own of" in repr(handle)
        run(unet, inputs)
    assert read == [1024]


def test_self_attention_that_is_given_other_tokens(unet, inputs):
    """What `reference` pipelines do: the block attends to what it kept of another image beside its own tokens."""
    attention, kept = unet.get_submodule(f"{BLOCK}.attn1"), torch.randn(1, 50, 32)

    def with_kept(x, encoder_hidden_states=None, **kwargs):
        return patched(x, encoder_hidden_states=torch.cat([x, kept], dim=1), **kwargs)

    results = []
    for components in (["attention"], ["cross_attention"]):
        with turbovlm.apply(unet, keep=0.5, components=components) as handle:
            patched = attention.forward
            attention.forward = with_kept
            run(unet, inputs)
            results.append(attention(torch.ones(1, 1024, 32)) if components != ["attention"] else None)
            assert components != ["attention"] or "it attends to other tokens than its own" in repr(handle)
            attention.forward = patched
    assert results[1] is not None


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_attention_that_others_put_in_place_of_the_libraries(family, monkeypatch):
    model, inputs = DENOISERS[family](), DENOISERS[family].inputs(1, 32, 32)
    alone, own, keys = merged_in(model, inputs, components=["ffn"]), F.scaled_dot_product_attention, set()

    def attend(query, key, *args, **kwargs):
        keys.add(key.shape[2])
        return own(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with (
        turbovlm.apply(model, keep=0.5, scope="part") as handle,
        pytest.warns(UserWarning, match="leaves all parts of these"),
    ):
        torch.testing.assert_close(run(model, inputs), alone)
        assert "torch.nn.functional.scaled_dot_product_attention is" in repr(handle)
    assert keys == ({1024, 256, 7} if family == "sd15" else {256 + 7})


@pytest.mark.parametrize("skipped", ["scores", "energy"])
def test_guiders_that_change_attention(skipped):
    """Perturbed attention leaves scores out, smoothed energy blurs queries on their grid: of whole attention both."""
    from diffusers.hooks import HookRegistry, LayerSkipConfig
    from diffusers.hooks.layer_skip import _apply_layer_skip_hook
    from diffusers.hooks.smoothed_energy_guidance_utils import (
        SmoothedEnergyGuidanceConfig,
        _apply_smoothed_energy_guidance_hook,
    )

    model, inputs = DENOISERS["pixart"](), DENOISERS["pixart"].inputs(2, 32, 32)

    def put():
        if skipped == "scores":
            how = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
            _apply_layer_skip_hook(model, LayerSkipConfig([0, 2], fqn="transformer_blocks", **how), name="skip")
        else:
            config = SmoothedEnergyGuidanceConfig([0, 2], fqn="transformer_blocks")
            _apply_smoothed_energy_guidance_hook(model, config, 1.0, name="skip")

    seen = {}
    with turbovlm.apply(model, keep=0.5, scope="part") as handle:
        merged = run(model, inputs)
        put()
        attention = model.transformer_blocks[0].attn1
        hook = attention.register_forward_hook(lambda m, given, out: seen.update(x=given[0], out=out))
        perturbed = run(model, inputs)
        hook.remove()
        assert not torch.allclose(perturbed, merged) and repr(handle).count("left whole") == 1
        assert "transformer_blocks.0.attn1 and 1 more attn1: " in repr(handle)
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("skip", recurse=True)
        assert torch.equal(run(model, inputs), merged) and "left whole" not in repr(handle)
    put()
    with torch.no_grad():
        torch.testing.assert_close(attention(seen["x"]), seen["out"])


def test_self_attention_guidance():
    pipe, given = PIPES["sd"](), PIPES["sd"]
    guided = diffusers.StableDiffusionSAGPipeline(**pipe.components, requires_safety_checker=False)
    guided.set_progress_bar_config(disable=True)
    settings = {"sag_scale": 0.75, "num_inference_steps": 2}
    plain = given.run(guided, 16, 16, **settings)
    with turbovlm.apply(guided, keep=0.5, scope="part") as handle:
        merged = given.run(guided, 16, 16, **settings)
        # it puts its processor in for the time of a run, into the middle block
        assert "mid_block.attentions.0.transformer_blocks.0.attn1: its processor is a CrossAttnStore" in repr(handle)
        assert torch.equal(given.run(guided, 16, 16, **settings), merged) and not torch.equal(merged, plain)
    assert torch.equal(given.run(guided, 16, 16, **settings), plain)
