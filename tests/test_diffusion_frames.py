"""UNets of videos, whose frames merge one by one, and whose blocks of time read all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import turbovlm
from denoisers import Watch, noise
from frame_denoisers import COLUMNS, FRAMED, FRAMES, ROWS, TOKENS
from marks import slow_but
from pipelines import NO_TEXT, vae
from test_diffusion import check_merges_and_comes_back, run
from turbovlm.errors import ConfigError, StateError

diffusers = pytest.importorskip("diffusers")
SCOPES = ({}, {"scope": "block"}, {"scope": "part"})


@pytest.fixture(params=FRAMED)
def framed(request):
    return FRAMED[request.param]


@pytest.mark.parametrize("given", SCOPES, ids=str)
def test_merges_and_comes_back(framed, given):
    check_merges_and_comes_back(framed(), framed.inputs(2), f"{TOKENS} → {TOKENS // 2} tokens", given)


@torch.no_grad()
def test_a_batch_is_as_single_videos(framed):
    model, inputs = framed(), framed.inputs(2)
    with turbovlm.apply(model, keep=0.5):
        together = run(model, inputs)
        for i in (0, 1):
            own = {name: value.unflatten(0, (2, -1))[i] if value.ndim else value for name, value in inputs.items()}
            torch.testing.assert_close(run(model, own)[0], together[i], rtol=1e-3, atol=1e-4 * float(together.std()))


@torch.no_grad()
def test_blocks_of_frames_read_fewer_tokens_and_those_of_time_all(framed):
    """In a block of time each position is a sequence of its own."""
    model, seen = framed(), {}
    names = [name for name, module in model.named_modules() if name.rpartition(".")[2] == "attn1"]
    spatial = {name for name in names if framed.spatial in name}
    assert spatial and spatial < set(names)
    with turbovlm.apply(model, keep=0.5) as handle:
        for name in names:
            Watch(
                model.get_submodule(f"{name}.to_q"), lambda x, out, name=name: seen.update({name: tuple(x.shape[:2])})
            )
        run(model, framed.inputs(2))
        assert {place.name for place in handle.features[0].places} == {name.removesuffix(".attn1") for name in spatial}
    for name in names:
        sequences, tokens = seen[name]
        if name in spatial:
            assert (sequences, tokens) in {
                (2 * FRAMES, TOKENS // 2),
                (2 * FRAMES, TOKENS // 4),
            }  # the middle is smaller
        else:
            assert FRAMES in seen[name] and sequences in {2 * TOKENS, TOKENS // 2}, (name, seen[name])


@torch.no_grad()
def test_guided_videos_merge_alike_and_frames_do_not(framed):
    model, inputs = framed(), framed.inputs(2)
    inputs["sample"] = inputs["sample"][:1].expand_as(inputs["sample"]).contiguous()
    with turbovlm.apply(model, keep=0.5) as handle:
        run(model, inputs)
        merges = [choice.merge for choice in handle.features[0].last.values() if choice.merge is not None]
    assert merges
    for merge in merges:
        assert torch.equal(merge.source[:FRAMES], merge.source[FRAMES:])
        assert not torch.equal(merge.source[0], merge.source[1])


@torch.no_grad()
def test_blocks_of_time_stand_between_the_blocks_of_a_list():
    """So each of Stable Video Diffusion's is a stack by itself, whatever `span` says."""
    framed = FRAMED["stable-video"]
    model, inputs = framed(), framed.inputs(1)
    with turbovlm.apply(model, keep=0.5, scope="block") as handle:
        blocks = run(model, inputs)
        assert any(place.name.endswith("transformer_blocks.1") for place in handle.features[0].places)
    with turbovlm.apply(model, keep=0.5, scope="stack", span=8):
        torch.testing.assert_close(run(model, inputs), blocks, rtol=0, atol=0.05 * float(blocks.std()))


@torch.no_grad()
@pytest.mark.parametrize("name", slow_but(["animatediff"], ["animatediff", "stable-video"]))
def test_a_compiled_denoiser_compiles_once(name):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    framed = FRAMED[name]
    model, inputs, counter = framed(), framed.inputs(1), CompileCounter()
    with turbovlm.apply(model, keep=0.5):
        merged = run(model, inputs)
        compiled = torch.compile(model, backend=counter)
        torch.testing.assert_close(run(compiled, inputs), merged, rtol=0, atol=1e-5 * float(merged.abs().max()))
        before = counter.frame_count
        run(compiled, inputs)
        assert counter.frame_count == before


def animated() -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8
    )
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    model = FRAMED["animatediff"]()
    return diffusers.AnimateDiffPipeline(vae=vae(), unet=model, motion_adapter=adapter, scheduler=scheduler, **NO_TEXT)


def of_frames(**given: Any) -> dict[str, Any]:
    text = {"prompt_embeds": noise(5, 1, 7, 32), "negative_prompt_embeds": noise(6, 1, 7, 32)}
    size = {"height": 2 * ROWS, "width": 2 * COLUMNS, "num_frames": FRAMES}
    return {**text, **size, "num_inference_steps": 3, "output_type": "latent", **given}


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{"keep": 0.5}, {"keep": 0.5, "refresh": 2}, {"keep": {0: 0.5, 0.5: 1.0}}], ids=str
)
def test_a_pipeline_of_frames(settings):
    pipe = animated()
    pipe.set_progress_bar_config(disable=True)

    def made() -> torch.Tensor:
        return pipe(**of_frames(generator=torch.Generator().manual_seed(0))).frames

    plain = made()
    with turbovlm.apply(pipe, **settings) as handle:
        merged = made()
        assert torch.equal(merged, made())
        assert "left whole" not in repr(handle)
    assert merged.shape == plain.shape and not torch.equal(merged, plain)
    assert torch.equal(made(), plain)


@torch.no_grad()
def test_windows_of_time_go_on_and_frames_in_chunks_are_refused():
    """FreeNoise gives its blocks of time some frames at a time; its split inference does the same to the others."""
    pipe, inputs = animated(), FRAMED["animatediff"].inputs(1)
    pipe.enable_free_noise(context_length=2, context_stride=1)
    with turbovlm.apply(pipe, keep=0.5) as handle:
        run(pipe.unet, inputs)
        assert "left whole" not in repr(handle)
    pipe.enable_free_noise_split_inference(spatial_split_size=64, temporal_split_size=2)
    with turbovlm.apply(pipe, keep=0.5), pytest.raises(StateError, match="was given 2 of 3 latents: something cuts"):
        run(pipe.unet, inputs)


def test_settings_that_do_not_fit_are_refused(framed):
    with pytest.raises(ConfigError, match="whole_first=2: a UNet has convolutions"):
        turbovlm.apply(framed(), keep=0.5, whole_first=2)


@torch.no_grad()
def test_a_control_network_of_frames():
    """SparseCtrl's reads all frames, and can be accelerated by itself."""
    controlnet = diffusers.SparseControlNetModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        cross_attention_dim=32,
        layers_per_block=1,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
    ).eval()
    for parameter in controlnet.parameters():  # what it gives begins as zeros
        torch.nn.init.normal_(parameter, std=0.05)
    inputs = FRAMED["animatediff"].inputs(1)
    hints = {
        "controlnet_cond": noise(3, 1, 4, FRAMES, ROWS, COLUMNS),
        "conditioning_mask": noise(4, 1, 1, FRAMES, ROWS, COLUMNS),
    }
    given = {**inputs, **hints}
    plain = controlnet(**given, return_dict=False)[0]
    with turbovlm.apply(controlnet, keep=0.5) as handle:
        merged = controlnet(**given, return_dict=False)[0]
        assert "left whole" not in repr(handle) and f"{TOKENS} → {TOKENS // 2} tokens" in repr(handle)
    assert any(not torch.equal(a, b) for a, b in zip(plain, merged))
    assert all(torch.equal(a, b) for a, b in zip(plain, controlnet(**given, return_dict=False)[0]))
    model = FRAMED["animatediff"]()
    down, middle = controlnet(**given, return_dict=False)
    with turbovlm.apply(model, keep=0.5):
        assert (
            run(model, {**inputs, "down_block_additional_residuals": down, "mid_block_additional_residual": middle})
            .isfinite()
            .all()
        )
