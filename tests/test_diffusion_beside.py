"""Image generation beside what else users put into a denoiser: adapters, caches, offloading, other processors."""

from __future__ import annotations

import pytest
import torch

import turbovlm
from denoisers import DENOISERS, noise, unet_inputs, words
from test_diffusion import run
from turbovlm.errors import StateError, TurboError

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def unet():
    return DENOISERS["sd15"]()


@pytest.fixture
def inputs():
    return unet_inputs(1, 32, 32)


def lora():
    peft = pytest.importorskip("peft")
    wanted = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    return peft.LoraConfig(r=4, target_modules=wanted, init_lora_weights=False)


def test_lora_before(unet, inputs):
    unet.add_adapter(lora())
    plain = run(unet, inputs)
    with turbovlm.apply(unet, keep=0.5):
        assert not torch.equal(run(unet, inputs), plain)
    assert torch.equal(run(unet, inputs), plain)


def test_lora_comes_and_goes_while_merging(unet, inputs):
    plain = run(unet, inputs)
    handle = turbovlm.apply(unet, keep=0.5)
    merged = run(unet, inputs)
    unet.add_adapter(lora())
    adapted = run(unet, inputs)
    assert not torch.allclose(adapted, merged)
    unet.fuse_lora()
    torch.testing.assert_close(run(unet, inputs), adapted, rtol=0, atol=1e-3)
    unet.unfuse_lora()
    unet.disable_adapters()
    torch.testing.assert_close(run(unet, inputs), merged, rtol=0, atol=1e-3)
    unet.delete_adapters("default")
    handle.remove()
    torch.testing.assert_close(run(unet, inputs), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", ["fuse_qkv_projections", "set_attention_slice", "set_default_attn_processor"])
def test_other_ways_to_attend(unet, inputs, change):
    with turbovlm.apply(unet, keep=0.5):
        merged = run(unet, inputs)
        getattr(unet, change)(*(["max"] if change == "set_attention_slice" else []))
        torch.testing.assert_close(run(unet, inputs), merged, rtol=0, atol=1e-4)


def test_a_processor_of_the_users_reads_all_tokens(unet, inputs):
    from diffusers.models.attention_processor import AttnProcessor2_0

    read = []

    class Counting(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            read.append(hidden_states.shape[1])
            return super().__call__(attn, hidden_states, *args, **kwargs)

    with turbovlm.apply(unet, keep=0.5, scope="part", components=["ffn"]):
        merged = run(unet, inputs)
    with turbovlm.apply(unet, keep=0.5, scope="part"):
        unet.set_attn_processor(Counting())
        with pytest.warns(UserWarning, match="leaves all parts of these components whole: attention: its processor is"):
            torch.testing.assert_close(run(unet, inputs), merged)
    assert set(read) == {1024, 256}


def test_an_attention_backend_without_masks():
    from diffusers.models.attention_dispatch import attention_backend

    model, inputs = DENOISERS["flux"](), DENOISERS["flux"].inputs(2, 32, 32)
    with turbovlm.apply(model, keep=0.5, proportional=False):
        merged = run(model, inputs)
        with attention_backend("_native_flash"):
            torch.testing.assert_close(run(model, inputs), merged, rtol=0, atol=1e-4)
    refused = pytest.raises(StateError, match=r"takes no mask.*proportional=False, or use another")
    with turbovlm.apply(model, keep=0.5), attention_backend("_native_flash"), refused:
        run(model, inputs)


def test_ip_adapter(unet, inputs):
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    class Embeds(torch.nn.Module):
        def forward(self, images):
            return images

    unet.set_attn_processor(
        {
            name: AttnProcessor2_0() if "attn1" in name else IPAdapterAttnProcessor2_0(width(unet, name), 32, (4,))
            for name in unet.attn_processors
        }
    )
    unet.encoder_hid_proj = Embeds()
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    given = {**inputs, "added_cond_kwargs": {"image_embeds": [noise(3, 1, 1, 4, 32)]}}
    other = {**inputs, "added_cond_kwargs": {"image_embeds": [noise(4, 1, 1, 4, 32)]}}
    plain = run(unet, given)
    with turbovlm.apply(unet, keep=0.5, scope="part"):
        merged = run(unet, given)
        assert not torch.equal(merged, plain) and not torch.equal(run(unet, other), merged)
        masks = {"cross_attention_kwargs": {"ip_adapter_masks": [noise(5, 1, 1, 32, 32).sigmoid()]}}
        masked = run(unet, {**given, **masks})
    with turbovlm.apply(unet, keep=0.5, scope="part", components=["attention", "ffn"]):
        torch.testing.assert_close(run(unet, {**given, **masks}), masked)
    assert torch.equal(run(unet, given), plain)


def width(unet, name):
    return unet.get_submodule(name.removesuffix(".processor")).to_q.in_features


def test_a_mask_over_the_image_reaches_all_tokens():
    model = DENOISERS["dit"]()
    attention = model.transformer_blocks[1].attn1
    mask = torch.zeros(1, 1, 256).masked_fill(torch.arange(256) % 3 == 0, -1e4)
    own = attention.forward
    attention.forward = lambda x, **given: own(x, **{**given, "attention_mask": mask})
    given = DENOISERS["dit"].inputs(1, 32, 32)
    with turbovlm.apply(model, keep=0.5, components=["attention"]) as handle:
        assert "transformer_blocks.1.attn1: it has a forward of its own" in repr(handle)
        masked = run(model, given)
    del attention.forward
    with turbovlm.apply(model, keep=0.5, components=["attention"]) as handle:
        patched = attention.forward
        attention.forward = lambda x, **given: patched(x, **{**given, "attention_mask": mask})
        torch.testing.assert_close(run(model, given), masked)
        assert "transformer_blocks.1.attn1: it is given attention_mask, which are of the image's" in repr(handle)


def test_padding_of_the_text_changes_nothing(unet):
    inputs, mask = unet_inputs(2, 32, 32), torch.ones(2, 7)
    mask[0, 5:] = 0
    text = words(2)
    text[0, 5:] = 99
    with turbovlm.apply(unet, keep=0.5):
        plain = run(unet, {**inputs, "encoder_attention_mask": mask})
        other = run(unet, {**inputs, "encoder_attention_mask": mask, "encoder_hidden_states": text})
    assert torch.equal(plain, other)


def test_gradients_are_those_of_checkpoints(unet, inputs):
    def gradients():
        unet.zero_grad()
        unet(**inputs).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}

    unet.train()
    with turbovlm.apply(unet, keep=0.5):
        whole = gradients()
        unet.enable_gradient_checkpointing()
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, whole[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(unet, inputs, dtype):
    unet.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with turbovlm.apply(unet, keep=0.5):
        out = run(unet, inputs)
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_in_another_dtype_until_called(unet, inputs, when):
    def cast():
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    if when == "before":
        cast()
    handle = turbovlm.apply(unet, keep=0.5)
    if when == "after":
        cast()
    merged = run(unet, inputs)
    handle.remove()
    plain = run(unet, inputs)
    assert merged.isfinite().all() and not torch.equal(merged, plain)


def test_weights_elsewhere_until_called(unet, inputs):
    accelerate = pytest.importorskip("accelerate")
    plain = run(unet, inputs)
    handle = turbovlm.apply(unet, keep=0.5)
    merged = run(unet, inputs)
    accelerate.cpu_offload(unet, execution_device="cpu")
    torch.testing.assert_close(run(unet, inputs), merged, rtol=0, atol=1e-4)
    handle.remove()
    assert torch.equal(run(unet, inputs), plain) and not handle.active
    with turbovlm.apply(unet, keep=0.5):
        torch.testing.assert_close(run(unet, inputs), merged, rtol=0, atol=1e-4)
    accelerate.hooks.remove_hook_from_module(unet, recurse=True)
    assert torch.equal(run(unet, inputs), plain)


CACHES = ["FirstBlockCache", "PyramidAttentionBroadcast"]


def cache(name):
    if name == "FirstBlockCache":
        return diffusers.FirstBlockCacheConfig(threshold=10.0)
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=("transformer_blocks",),
    )


@torch.no_grad()
def four_steps(model, inputs):
    outs = []
    for step in range(4):
        latent = inputs["hidden_states"] * (1 - 0.1 * step)
        with model.cache_context("cond"):
            outs.append(model(**{**inputs, "hidden_states": latent}, return_dict=False)[0])
    return torch.stack(outs)


@pytest.mark.parametrize("name", CACHES)
def test_caches_between_steps(name):
    model, inputs = DENOISERS["flux"](), DENOISERS["flux"].inputs(1, 32, 32)
    plain = four_steps(model, inputs)
    handle = turbovlm.apply(model, keep=0.5, scope="part")
    merged = four_steps(model, inputs)
    model.enable_cache(cache(name))
    cached = four_steps(model, inputs)
    assert torch.equal(cached[0], merged[0]) and not torch.equal(cached[1], merged[1])
    assert (cached - merged).abs().mean() < (merged - plain).abs().mean() + plain.std()
    model.disable_cache()
    assert torch.equal(four_steps(model, inputs), merged)
    model.enable_cache(cache(name))
    handle.remove()
    assert not handle.active
    model.disable_cache()
    assert torch.equal(four_steps(model, inputs), plain)
    with turbovlm.apply(model, keep=0.5, scope="part"):
        assert torch.equal(four_steps(model, inputs), merged)
    assert torch.equal(four_steps(model, inputs), plain)


def test_a_cache_before():
    model, inputs = DENOISERS["flux"](), DENOISERS["flux"].inputs(1, 32, 32)
    model.enable_cache(cache("FirstBlockCache"))
    with turbovlm.apply(model, keep=0.5, scope="part"):
        first = four_steps(model, inputs)
    model.disable_cache()
    with turbovlm.apply(model, keep=0.5, scope="part"):
        model.enable_cache(cache("FirstBlockCache"))
        assert torch.equal(four_steps(model, inputs), first)
        model.disable_cache()
    model.enable_cache(cache("PyramidAttentionBroadcast"))
    with pytest.raises(TurboError, match=r"transformer_blocks\.0\.attn has a .*: enable the cache after turbovlm"):
        turbovlm.apply(model, keep=0.5, scope="part")
