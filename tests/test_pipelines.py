"""Every kind of pipeline, whole: four steps, any size, the same image for a seed, and back."""

from __future__ import annotations

import pytest
import torch

import turbovlm
from marks import slow_but
from pipelines import PIPES

pytest.importorskip("diffusers")


CORE = ("text to image", "two ControlNets", "SDXL", "SD3", "FLUX", "PixArt", "DiT")
"""Those whose denoisers differ in structure; the others are slow."""


def image(pipe, inputs):
    seed = torch.Generator().manual_seed(0)
    steps = {"num_inference_steps": 4}
    out = pipe(**inputs, **steps, generator=seed, output_type="np")
    return torch.as_tensor(out.images)


@pytest.mark.parametrize("kind", slow_but(CORE, PIPES))
def test_an_image_in_four_steps(kind):
    pipe, inputs = PIPES[kind](), PIPES[kind].inputs(64, 64)
    plain = image(pipe, inputs)
    with turbovlm.apply(pipe, keep=1.0):
        assert torch.equal(image(pipe, inputs), plain)
    with turbovlm.apply(pipe, keep=0.5):
        merged = image(pipe, inputs)
        assert torch.equal(image(pipe, inputs), merged)
    with turbovlm.apply(pipe, keep=0.5, refresh=2):
        again = image(pipe, inputs)
    assert merged.shape == plain.shape and merged.isfinite().all()
    assert not torch.equal(merged, plain) and not torch.equal(again, merged)
    assert torch.equal(image(pipe, inputs), plain)


@pytest.mark.parametrize("size", [(48, 80), (72, 56)])
@pytest.mark.parametrize("kind", slow_but(CORE, [kind for kind in PIPES if kind != "DiT"]))
def test_sizes(kind, size):
    pipe, inputs = PIPES[kind](), PIPES[kind].inputs(*size)
    plain = image(pipe, inputs)
    with turbovlm.apply(pipe, keep=0.5):
        merged = image(pipe, inputs)
    assert merged.shape == plain.shape == (1, *size, 3) and not torch.equal(merged, plain)
