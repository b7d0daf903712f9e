"""Pipelines with two denoisers, one for much noise and one for little, as Wan 2.2: both merge."""

from __future__ import annotations

import gc

import pytest
import torch

import turbovlm
from turbovlm import DenoiseConfig, TurboError, UnsupportedModelError
from turbovlm.profile import compare_images

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


def test_measured_together_they_are_not(pipe):
    with pytest.raises(UnsupportedModelError, match=r"several denoisers \(transformer, transformer_2\)"):
        compare_images(pipe, DenoiseConfig(0.5))
