"""What a forward knows of its blocks is kept, and looked up again where something of it has changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn

import turbovlm
from families import FAMILIES
from turbovlm.encoder import lookups

INPUTS = FAMILIES["timm_layerscale"].inputs(2)


@torch.no_grad()
def doubled(layer):
    other = copy.deepcopy(layer)
    other.weight.mul_(2)
    return other


@pytest.fixture
def looks(monkeypatch):
    """Names of the blocks that are looked at, in order."""
    seen, through = [], lookups.through_module
    monkeypatch.setattr(
        lookups, "through_module", lambda layout, name, *rest: (seen.append(name), through(layout, name, *rest))[1]
    )
    return seen


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "mlp", nn.Identity()),
        lambda block: setattr(block.attn, "proj", doubled(block.attn.proj)),
        lambda block: setattr(block.ls1, "gamma", nn.Parameter(torch.full((32,), 3.0))),
        lambda block: block.attn.register_forward_hook(lambda module, args, out: out * 2),
    ],
    ids=["module", "inner module", "parameter", "hook"],
)
def test_a_change_is_seen_by_the_next_forward(change, looks):
    model = FAMILIES["timm_layerscale"].make().eval()
    plain = copy.deepcopy(model)
    turbovlm.apply(model, r=(2, 0, 0, 0))
    before = model(**INPUTS)
    assert len(looks) == 4
    model(**INPUTS)
    assert len(looks) == 4
    change(model.blocks[1])
    change(plain.blocks[1])
    found = model(**INPUTS)
    turbovlm.apply(plain, r=(2, 0, 0, 0))
    torch.testing.assert_close(found, plain(**INPUTS))
    assert not torch.equal(found, before)


@torch.no_grad()
def test_a_copy_knows_its_own_blocks(looks):
    model = FAMILIES["timm_layerscale"].make().eval()
    turbovlm.apply(model, r=(2, 0, 0, 0))
    model(**INPUTS)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.blocks[2].mlp.fc2.weight)
    assert not torch.equal(other(**INPUTS), model(**INPUTS))
    assert len(looks) == 8
