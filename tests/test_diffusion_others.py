"""Image generation where something else changes the denoiser, calls it in its own way, or looks inside it."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import turbovlm
from denoisers import DENOISERS, noise, unet, unet_inputs
from families import _livelier as livelier
from test_diffusion import one, run
from turbovlm.errors import StateError, TurboError

diffusers = pytest.importorskip("diffusers")


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max())


def denoiser(family):
    return DENOISERS[family](), DENOISERS[family].inputs(1, 32, 32)


def other(inputs):
    latent = "sample" if "sample" in inputs else "hidden_states"
    return {**inputs, latent: noise(55, *inputs[latent].shape)}


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "pixart"])
def test_one_projection_for_queries_keys_and_values(family):
    model, inputs = denoiser(family)
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
        model.fuse_qkv_projections()
        assert gap(run(model, inputs), merged) < 1e-4
        model.unfuse_qkv_projections()
        assert gap(run(model, inputs), merged) < 1e-4


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_groups_of_layers_offloaded(family, kind, when):
    from diffusers.hooks import apply_group_offloading

    model, inputs = denoiser(family)
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
    here = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "offload_type": kind}
    here |= {"num_blocks_per_group": 1} if kind == "block_level" else {}
    if when == "before":
        apply_group_offloading(model, **here)
    with turbovlm.apply(model, keep=0.5):
        if when == "after":
            apply_group_offloading(model, **here)
        assert torch.equal(run(model, inputs), merged)
    assert torch.equal(run(model, inputs), plain)
    with turbovlm.apply(model, keep=0.5):
        assert torch.equal(run(model, inputs), merged)


@pytest.mark.parametrize("undone", ["hook", "handle"])
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_hook_of_accelerate_that_came_later(family, undone):
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = denoiser(family)
    plain = run(model, inputs)
    handle = turbovlm.apply(model, keep=0.5)
    merged = run(model, inputs)
    hooks.add_hook_to_module(model, hooks.CpuOffload("cpu"))
    assert torch.equal(run(model, inputs), merged)
    if undone == "hook":
        hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(run(model, other(inputs)), run(model, other(inputs)))
        assert torch.equal(run(model, inputs), merged)
        handle.remove()
    else:
        handle.remove()
        assert torch.equal(run(model, inputs), plain)
        hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "pixart"])
def test_a_hook_that_was_there_before_goes(family):
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = denoiser(family)
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, other(inputs))
    hooks.add_hook_to_module(model, hooks.CpuOffload("cpu"))
    with turbovlm.apply(model, keep=0.5):
        run(model, inputs)
        hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(run(model, other(inputs)), merged)


def test_hooks_on_every_layer_that_were_there_before_go():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = denoiser("flux")
    accelerate.cpu_offload(model, execution_device="cpu")
    with turbovlm.apply(model, keep=0.5):
        run(model, inputs)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        with contextlib.suppress(TurboError):
            assert run(model, inputs).isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4), id="MagCache"),
        pytest.param(
            lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1), id="Taylor"
        ),
        pytest.param(lambda: diffusers.FirstBlockCacheConfig(threshold=10.0), id="FirstBlock"),
    ],
)
def test_caches_go_and_leave_nothing(config):
    model, inputs = denoiser("flux")

    def steps():
        with torch.no_grad(), model.cache_context("cond"):
            return torch.stack([model(**given, return_dict=False)[0] for given in (inputs, other(inputs), inputs)])

    plain = steps()
    handle = turbovlm.apply(model, keep=0.5, scope="part")
    merged = steps()
    for last in (False, True):
        model.enable_cache(config())
        assert torch.equal(steps()[0], merged[0])
        if last:
            handle.remove()
            model.disable_cache()
            assert torch.equal(steps(), plain)
        else:
            model.disable_cache()
            assert torch.equal(steps(), merged)


def projections_adapted():
    """Of FLUX, whose single blocks merge `proj_mlp` by itself."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["to_q", "proj_mlp", "proj_out"], init_lora_weights=False)


def test_lora_on_what_a_single_block_merges():
    model, inputs = denoiser("flux")
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5, scope="part"):
        merged = run(model, inputs)
        model.add_adapter(projections_adapted())
        found = run(model, inputs)
        part = model.single_transformer_blocks[0].proj_mlp
        assert list(turbovlm.patching.patches_of(part)) and not list(turbovlm.patching.patches_of(part.base_layer))
        model.fuse_lora()
        fused = run(model, inputs)
        assert gap(found, fused) < 1e-4 < gap(found, merged)
        model.unfuse_lora()
        model.unload_lora()
        assert gap(run(model, inputs), merged) < 1e-4
    assert gap(run(model, inputs), plain) < 1e-4


def test_lora_that_was_there_before_goes():
    model, inputs = denoiser("flux")
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
    model.add_adapter(projections_adapted())
    with turbovlm.apply(model, keep=0.5) as handle:
        model.unload_lora()
        assert torch.equal(run(model, inputs), merged)
        assert "left whole" not in str(handle)
    assert torch.equal(run(model, inputs), plain)


def test_blocks_that_are_taken_out_are_skipped():
    model, inputs = denoiser("pixart")
    with turbovlm.apply(model, keep=0.5, scope="part") as handle:
        run(model, inputs)
        model.transformer_blocks = model.transformer_blocks[:1]
        run(model, inputs)
        assert "left whole: transformer_blocks.1.attn1" in str(handle) and "skipped it" in str(handle)


def test_image_embeddings_of_flux_in_a_batch():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model, inputs = DENOISERS["flux"](), DENOISERS["flux"].inputs(2, 32, 32)
    for block in model.transformer_blocks:
        block.attn.set_processor(livelier(FluxIPAdapterAttnProcessor(32, 32, num_tokens=(4,), scale=[1.0])))
    embeds = noise(3, 2, 4, 32)

    def given(rows):
        some = {k: v if k.endswith("_ids") else v[rows] for k, v in inputs.items()}
        return {**some, "joint_attention_kwargs": {"ip_hidden_states": [embeds[rows]]}}

    assert gap(run(model, given([0, 1]))[:1], run(model, given([0]))) < 1e-4
    with turbovlm.apply(model, keep=0.5):
        assert gap(run(model, given([0, 1]))[:1], run(model, given([0]))) < 1e-4


def test_image_embeddings_of_sd3_in_a_batch():
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model, inputs = DENOISERS["sd3"](), DENOISERS["sd3"].inputs(2, 32, 32)
    size = {"hidden_size": 32, "ip_hidden_states_dim": 32, "head_dim": 16, "timesteps_emb_dim": 32}
    for block in model.transformer_blocks:
        block.attn.set_processor(livelier(SD3IPAdapterJointAttnProcessor2_0(**size)))
    more = {"ip_hidden_states": noise(3, 2, 4, 32), "temb": noise(4, 2, 32)}
    with turbovlm.apply(model, keep=0.5):
        together = run(model, {**inputs, "joint_attention_kwargs": more})
        first = {"joint_attention_kwargs": {name: value[:1] for name, value in more.items()}}
        assert gap(together[:1], run(model, {**one(inputs, 0), **first})) < 1e-4


@pytest.mark.parametrize("size", [(16, 20), (20, 16), (16, 24)])
@pytest.mark.parametrize("where", ["another thread", "the same thread"])
def test_a_forward_in_the_midst_of_another(where, size):
    model, inputs, within = DENOISERS["sd15"](), unet_inputs(1, 16, 20), other(unet_inputs(2, *size))
    made = []

    def elsewhere():
        hook.remove()
        made.append(run(model, within))

    def start(*_):
        if where == "the same thread":
            elsewhere()
        else:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

    with turbovlm.apply(model, keep=0.5):
        alone, alone_within = run(model, inputs), run(model, within)
        hook = model.down_blocks[0].attentions[1].register_forward_pre_hook(start)
        assert torch.equal(run(model, inputs), alone)
        assert torch.equal(made[0], alone_within)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_forwards_in_several_threads_are_as_one_after_another(family):
    model = DENOISERS[family]()
    every = [DENOISERS[family].inputs(1 + i % 2, 32, 32 + 4 * i) for i in range(4)]
    with turbovlm.apply(model, keep=0.5), ThreadPoolExecutor(4) as pool:
        alone = [run(model, inputs) for inputs in every]
        for made in (pool.map(lambda inputs: run(model, inputs), every) for _ in range(2)):
            assert all(torch.equal(a, b) for a, b in zip(made, alone))


def test_an_exception_half_way_needs_no_clean_up():
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, 32, 32)
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
        fails = model.mid_block.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, other(inputs))
        fails.remove()
        block = model.down_blocks[0].attentions[1].transformer_blocks[0]
        with pytest.raises(StateError, match="runs outside of its denoiser's forward"):
            block(noise(3, 1, 256, 32), encoder_hidden_states=noise(4, 1, 7, 32))
        assert torch.equal(run(model, inputs), merged)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_checkpoint_goes_by_the_merges_of_its_own_forward(family):
    """And not by those of a later forward, which other latents were merged in."""
    model, inputs = DENOISERS[family]().train(), DENOISERS[family].inputs(1, 32, 32)
    with turbovlm.apply(model, keep=0.5):
        model(**inputs, return_dict=False)[0].square().mean().backward()
        whole = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        model.zero_grad()
        model.enable_gradient_checkpointing()
        loss = model(**inputs, return_dict=False)[0].square().mean()
        run(model, other(inputs))
        loss.backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, whole[name])


def test_places_given_without_their_name():
    model, square = denoiser("flux")
    wide = DENOISERS["flux"].inputs(1, 16, 64)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    with turbovlm.apply(model, keep=0.5), torch.no_grad():
        named = run(model, wide)
        run(model, square)
        assert torch.equal(model(*(wide[name] for name in names), return_dict=False)[0], named)


def test_places_that_begin_elsewhere():
    model, inputs = denoiser("flux")
    with turbovlm.apply(model, keep=0.5), contextlib.suppress(TurboError):
        merged = run(model, inputs)
        moved = {**inputs, "img_ids": inputs["img_ids"] + torch.tensor([0, 16, 0])}
        assert run(model, moved).shape == merged.shape


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_a_denoiser_inside_another_module(family):
    model, inputs = denoiser(family)
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, **kwargs):
            return self.module(**kwargs)

    around = Around()
    with turbovlm.apply(around, keep=0.5):
        assert torch.equal(run(around, inputs), merged)


def test_quantised_weights():
    class Packed(torch.Tensor):
        """Knows how to be multiplied only, as the weights of quantisers do."""

        @staticmethod
        def __new__(cls, plain):
            return torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype, device=plain.device)

        def __init__(self, plain):
            self.plain = plain

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            if "detach" in str(function):
                return cls(args[0].plain)
            if function.overloadpacket not in (torch.ops.aten.t, torch.ops.aten.addmm, torch.ops.aten.mm):
                raise NotImplementedError(str(function))
            return function(*[a.plain if isinstance(a, cls) else a for a in args], **(kwargs or {}))

    model, inputs = denoiser("sd15")
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(Packed(module.weight.data), requires_grad=False)
    with turbovlm.apply(model, keep=0.5):
        assert gap(run(model, inputs), merged) < 1e-4


def test_blocks_that_attend_to_the_text_only():
    model = livelier(unet(only_cross_attention=True, cross_attention_dim=64))
    inputs = {**unet_inputs(1, 32, 32), "encoder_hidden_states": noise(1, 1, 7, 64)}
    with turbovlm.apply(model, keep=0.5, components=["ffn"]):
        assert run(model, inputs).isfinite().all()


def test_boxes_of_gligen():
    model = livelier(unet(attention_type="gated"))

    def given():
        boxes = {
            "boxes": torch.full((1, 5, 4), 0.5),
            "masks": torch.ones(1, 5),
            "positive_embeddings": noise(2, 1, 5, 32),
        }
        return {**unet_inputs(1, 32, 32), "cross_attention_kwargs": {"gligen": boxes}}

    plain = run(model, given())
    with turbovlm.apply(model, keep=0.5, scope="part"):
        merged = run(model, given())
        assert torch.equal(run(model, given()), merged) and not torch.equal(merged, plain)
    assert torch.equal(run(model, given()), plain)


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart"])
def test_gradients_through_checkpoints_where_all_blocks_have_one_grid(family):
    model, inputs = DENOISERS[family]().train(), DENOISERS[family].inputs(2, 32, 32)

    def gradients():
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    with turbovlm.apply(model, keep=0.5):
        whole = gradients()
        model.enable_gradient_checkpointing()
        checkpointed = gradients()
    for name, value in whole.items():
        torch.testing.assert_close(checkpointed[name], value)


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_autocast_and_training_after_inference(family):
    model, inputs = denoiser(family)
    with turbovlm.apply(model, keep=0.5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert run(model, inputs).isfinite().all()
        with torch.inference_mode():
            model(**inputs)
        model(**inputs, return_dict=False)[0].mean().backward()
        assert next(model.parameters()).grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["sdxl", "pixart", "sd35", "flux"])
def test_half_precision_of_other_families(family, dtype):
    model, inputs = DENOISERS[family]().to(dtype), DENOISERS[family].inputs(2, 16, 16 if family == "dit" else 32)

    def cast(name, value):
        if isinstance(value, dict):
            return {k: cast(k, v) for k, v in value.items()}
        plain = not isinstance(value, torch.Tensor) or not value.is_floating_point() or name.endswith("_ids")
        return value if plain and name != "time_ids" else value.to(dtype)

    inputs = {name: cast(name, value) for name, value in inputs.items()}
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
        assert merged.dtype == dtype and merged.isfinite().all() and torch.equal(run(model, inputs), merged)
