"""Pipelines with two denoisers, one for much noise and one for little, as Wan 2.2: both merge."""

from __future__ import annotations

import gc

import pytest
import torch

import turbovlm
from turbovlm import DenoiseConfig, TurboError
from turbovlm.profile import compare_images
from turbovlm.profile.quantize import weight_bytes

pytest.importorskip("diffusers")


def small_wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        in_channels=6,
        out_channels=6,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=32,
        text_dim=384,
        freq_dim=16,
        rope_max_seq_len=64,
    ).eval()


@pytest.fixture
def pipe():
    from turbovlm_lab.zoo.moving import moving_pipeline

    torch.manual_seed(0)
    made = moving_pipeline(small_wan())
    made.register_modules(transformer_2=small_wan())
    made.register_to_config(boundary_ratio=0.9)
    made.set_progress_bar_config(disable=True)
    return made


def video(pipe, steps=4):
    return pipe(
        "red apple, on white, moving left",
        num_inference_steps=steps,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


def test_both_merge_and_both_are_left_as_they_were(pipe):
    plain = video(pipe)
    with turbovlm.apply(pipe.transformer, keep=0.5):
        first = video(pipe)
    with turbovlm.apply(pipe.transformer_2, keep=0.5):
        second = video(pipe)
    handle = turbovlm.apply(pipe, keep=0.5)
    both = video(pipe)
    assert len({tuple(made.flatten().tolist()) for made in (plain, first, second, both)}) == 4
    told = repr(handle)
    assert "transformer.blocks.0" in told and "transformer_2.blocks.0" in told and told.count("2048 → 1024 tokens") == 2
    with pytest.raises(TurboError, match=r"accelerated already \(keep=0.5\)"):
        turbovlm.apply(pipe, keep=0.5)
    assert turbovlm.get_handle(pipe).config == DenoiseConfig(0.5)
    handle.remove()
    assert not handle.active and torch.equal(video(pipe), plain)


def test_as_each_by_itself(pipe):
    with turbovlm.apply(pipe, keep=0.5):
        both = video(pipe)
    with turbovlm.apply(pipe.transformer, keep=0.5), turbovlm.apply(pipe.transformer_2, keep=0.5):
        assert torch.equal(video(pipe), both)


def test_over_the_steps_and_refreshed(pipe):
    plain = video(pipe)
    with turbovlm.apply(pipe, keep={0: 1.0, 0.75: 0.5}) as handle:
        late = video(pipe)
        assert "in the last step" in repr(handle)
    with turbovlm.apply(pipe, keep=0.5, refresh=2):
        assert video(pipe).isfinite().all()
    assert not torch.equal(late, plain) and torch.equal(video(pipe), plain)


def test_a_handle_outlives_the_pipeline_but_not_its_denoisers(pipe):
    handle, one = turbovlm.apply(pipe, keep=0.5), pipe.transformer
    pipe.transformer = pipe.transformer_2 = None
    gc.collect()
    assert handle.active
    handle.remove()
    assert not handle.active and "forward" not in one.__dict__


@pytest.mark.parametrize("keep", [0.5, {0: 1.0, 0.5: 0.5}], ids=str)
def test_measured_together(pipe, keep):
    """Both run in every version: their multiply-accumulates, seconds and weights add up."""
    _check_measured(pipe, compare_images(pipe, DenoiseConfig(keep), size=(32, 32), steps=4, rounds=1))


def _check_measured(pipe, compared):
    own, (run,) = [pipe.transformer, pipe.transformer_2], compared.runs[1:]
    assert compared.baseline.macs > run.macs > 0 and run.drifts[0].latent > 0
    assert min(run.timings["step"].peak_bytes, *run.timings["step"].seconds) > 0
    assert compared.baseline.weight_bytes == sum(map(weight_bytes, own)) == 2 * weight_bytes(own[0])
    assert not any("forward" in module.__dict__ for each in own for module in each.modules())


def test_multiply_accumulates_are_those_of_the_denoiser_that_runs(pipe):
    """The second one has half of the blocks, and runs in one of two steps."""
    from turbovlm.profile.pipelines import WatchedPipeline, inputs_of

    def counted():
        return WatchedPipeline(pipe, inputs_of(pipe, (32, 32), 1, 2, "red apple", {}), [0]).count(2)

    both = counted()
    del pipe.transformer_2.blocks[1]
    one_block = 2 * (both - counted())
    assert 0.3 * both < one_block < 0.6 * both


def test_one_of_them_accelerated_is_no_baseline(pipe):
    with turbovlm.apply(pipe.transformer_2, keep=0.5), pytest.raises(TurboError, match="accelerated already"):
        compare_images(pipe, DenoiseConfig(0.5))


@pytest.mark.slow
def test_calibrated_together(pipe):
    """What is found is of both."""
    prompts = [f"red apple, on white, moving {way}" for way in ("left", "right")] * 15
    settled = {"scope": "block", "restore": "copy", "refresh": 1, "whole_first": 0}
    found = turbovlm.calibrate(pipe, prompts, flops=0.8, steps=2, size=(32, 32), **settled)
    with turbovlm.apply(pipe, found) as handle:
        video(pipe)
        assert "transformer.blocks" in repr(handle) and "transformer_2.blocks" in repr(handle)
