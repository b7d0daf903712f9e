"""A is aligned with the visual tokens: compared with what the tower's own attention pays, token by token."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import turbovlm
from turbovlm.vlm.marks import ATTENTION
from vlms import VLMS, seeded, visual_of

transformers = pytest.importorskip("transformers")

CAPTURED: list = []


def probe(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The library's attention, whose queries and keys are kept."""
    CAPTURED.append((module, query.detach(), key.detach(), query.shape[-1] ** -0.5 if scaling is None else scaling))
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@contextmanager
def probed(tower):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", sdpa_mask)
    configs = {id(module.config): module.config for module in tower.modules() if hasattr(module, "config")}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "probe"
    try:
        yield
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name


def rows_of(guide, guidance, prefix):
    """A of every position of the tower, `[positions of all images]`, from the queries and keys kept."""
    found = []
    for module, query, key, scaling in CAPTURED:
        if not any(module is part for part in guide.modules()):
            continue
        asking = query[:, :, :1] if guidance == "cls" else query[:, :, prefix:].mean(2, keepdim=True)
        scores = (asking.double() @ key.double().transpose(2, 3)) * scaling
        found.append(scores.softmax(-1).mean(1).flatten())
    return torch.cat(found)


def features_of(model, pixels, kind):
    return getattr(model, f"get_{kind}_features")(**pixels, return_dict=True)


def members(model, guide, pixels, kind, positions):
    """Which visual tokens are made of each position behind the guide, `[tokens, positions]`, 0 or 1."""

    def run(position):
        def disturb(module, inputs, output):
            changed = output.clone(memory_format=torch.contiguous_format)
            changed.view(-1, output.shape[-1])[position] += 9 * torch.linspace(-1, 1, output.shape[-1])
            return changed

        hook = None if position is None else guide.mlp.register_forward_hook(disturb)
        found = torch.cat(list(features_of(model, pixels, kind).pooler_output)).view(-1, 32)
        if hook is not None:
            hook.remove()
        return found

    plain = run(None)
    changes = torch.stack([(run(p) - plain).abs().amax(-1) for p in range(positions)], dim=1)
    return (changes > 1e-6).double()


@torch.no_grad()
def check(model, family, pixels, kind="image", guidance="auto"):
    CAPTURED.clear()
    with turbovlm.apply(model, visual_keep=0.5, guidance=guidance) as handle:
        (feature,) = handle.features
        part = model.get_submodule(feature.part)
        guide = part.get_submodule(feature.guide)
        with probed(getattr(part, feature.family.tower)):
            outputs = features_of(model, pixels, kind)
        row = rows_of(guide, feature.guidance, feature.prefix)
        found = torch.cat(getattr(outputs, ATTENTION)).double()
    member = members(model, guide, pixels, kind, len(row))
    torch.testing.assert_close(found, member @ row, rtol=0, atol=1e-6)
    assert found.std() > 0
    return found


@pytest.mark.parametrize("name", VLMS)
def test_a_is_what_the_tower_pays_to_each_token(name):
    family = VLMS[name]
    model = seeded(family.make)
    check(model, family, visual_of(family.inputs([5, "image", 6, "image", 7]), family))
