"""The study's own merging gives what the library gives, where both can do it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import turbovlm

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "studies" / "design_space"))
from merging import Design, merged_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 112, "patch_size": 14}
    return Dinov2Model(Dinov2Config(**sizes, layerscale_value=0.5)).eval()


@pytest.mark.parametrize(
    ("design", "settings"),
    [
        (Design(), {}),
        (Design(features="keys", degree="redundancy"), {"similarity": "keys", "degree": "redundancy"}),
        (
            Design(features="hidden", degree="difference", alpha=2),
            {"similarity": "hidden", "degree": "weighted_difference"},
        ),
        (Design(proportional=False), {"proportional": False}),
        (Design(reduce="mean"), {"reduce": "merge"}),
        (Design(reduce="prune", degree="semantics"), {"reduce": "prune", "degree": "semantics"}),
    ],
)
def test_it_merges_as_the_library_does(model, design, settings):
    pixels = torch.randn(2, 3, 112, 112)
    with torch.inference_mode(), turbovlm.apply(model, r=6, dense=True, partition="alternate", **settings):
        expected = model(pixel_values=pixels).last_hidden_state
    found, compared = merged_tokens(model, pixels, [6] * 4, dataclasses.replace(design, pairs="alternate"))
    assert compared > 0
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_every_way_to_pair_merges_as_many(model):
    pixels = torch.randn(2, 3, 112, 112)
    own = model(pixel_values=pixels).last_hidden_state
    for pairs in ("halves", "alternate", "important", "order", "any"):
        for rounds in (1, 2):
            found, _ = merged_tokens(model, pixels, [8, 0, 5, 3], Design(pairs=pairs, rounds=rounds))
            assert found.shape == own.shape and found.isfinite().all()
            assert not torch.allclose(found, own, atol=1e-3)
