"""The lines of docs/tomesd.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import turbovlm

pytest.importorskip("diffusers")

from pipelines import PIPES

SNIPPETS = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parents[1] / "docs" / "tomesd.md").read_text(encoding="utf-8"),
    flags=re.DOTALL,
)


def prompted():
    """A small pipeline, that takes a prompt as ones with a text encoder do."""
    pipe, seen = PIPES["text to image"](), []

    class Prompted(type(pipe)):
        def __call__(self, prompt):
            given, generator = PIPES["text to image"].inputs(32, 48), torch.Generator().manual_seed(0)
            out = super().__call__(**given, num_inference_steps=2, output_type="pt", generator=generator)
            seen.append(out.images)
            return out

    pipe.__class__ = Prompted
    return pipe, seen


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["tomesd", "turbovlm", "nearest"])
def test_the_lines_run(snippet):
    if "tomesd" in snippet:
        pytest.importorskip("tomesd")
    pipe, seen = prompted()
    plain = pipe("a fox").images
    exec(snippet, {"pipe": pipe, "prompt": "a fox", "turbovlm": turbovlm})
    merged = seen[-1] if len(seen) > 1 else pipe("a fox").images
    assert not torch.equal(merged, plain)
    if "remove" in snippet:
        assert torch.equal(pipe("a fox").images, plain)
