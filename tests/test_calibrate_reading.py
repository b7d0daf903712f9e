"""`turbovlm.calibrate_reading` on small vision-language models."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn as nn

import turbovlm
from turbovlm import ConfigError, TurboConfig, TurboError, UnsupportedModelError
from turbovlm.profile import macs
from vlms import VLMS, blip, seeded

pytest.importorskip("transformers")
NAMES = ("qwen2_5_vl", "blip")


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    family = VLMS.get(request.param)
    model = seeded(family.make if family else lambda: blip("ConditionalGeneration")).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    chance = torch.Generator().manual_seed(0)
    prompts = []
    for _ in range(30):
        words = torch.randint(10, 60, (4,), generator=chance).tolist()
        if family:
            inputs = family.inputs([*words[:2], "image", *words[2:]])
        else:
            inputs = {"input_ids": torch.tensor([words]), "pixel_values": torch.empty(1, 3, 48, 48)}
        inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=chance)
        prompts.append(inputs)
    return model, prompts


def logits(model, prompt):
    with torch.inference_mode():
        return model(**prompt).logits


def drift_of(model, prompts, config, own):
    """1 − cosine of the centred logits behind each prompt, by hand."""
    with turbovlm.apply(model, config):
        there = torch.cat([logits(model, prompt)[:, -1] for prompt in prompts])
    return 1 - torch.cosine_similarity(there - own.mean(0), own - own.mean(0), dim=-1)


def halves():
    """The prompts that are searched on, and those that a promise is measured with."""
    order = random.Random(0).sample(range(30), 30)
    return sorted(order[:15]), sorted(order[15:])


def test_what_keeps_most_at_so_many_tokens(case, tmp_path):
    model, prompts = case
    own = torch.cat([logits(model, prompt)[:, -1] for prompt in prompts])
    went = []
    config = turbovlm.calibrate_reading(model, prompts, visual_keep=0.5, progress=went.append)
    assert torch.equal(logits(model, prompts[0])[:, -1], own[:1]) and sum(went) > 30 * 4
    promise = config.promise
    assert config.visual_keep == 0.5 and promise.images == 15
    whole = macs(model, **prompts[0])
    with turbovlm.apply(model, config):
        assert promise.flops == pytest.approx(macs(model, **prompts[0]) / whole, abs=1e-4)
    kept = drift_of(model, prompts, config, own)[halves()[1]]
    assert promise.drift == pytest.approx(kept.mean().item(), rel=1e-4)
    assert promise.drift <= promise.bound and len(promise.curve) > 8
    config.save(tmp_path / "turbo.json")
    assert TurboConfig.load(tmp_path / "turbo.json") == config


@pytest.mark.slow
def test_the_fewest_tokens_within_a_tolerance(case):
    """Of shares that go down from 0.9, the last before the mean drift is first above the tolerance."""
    model, prompts = case
    own = torch.cat([logits(model, prompt)[:, -1] for prompt in prompts])
    shares = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1)
    for max_drift in (0.05, 0.5):
        found = turbovlm.calibrate_reading(model, prompts, max_drift=max_drift, reduce="merge")
        drifts = {}
        for share in shares:
            config = dataclasses.replace(found, visual_keep=share)
            drifts[share] = drift_of(model, prompts, config, own)[halves()[0]].mean().item()
            if drifts[share] > max_drift:
                break
        assert found.visual_keep == [share for share, drift in drifts.items() if drift <= max_drift][-1]


def test_a_tolerance_out_of_reach(case):
    model, prompts = case
    with pytest.raises(ConfigError, match=r"max_drift=1e-12 is out of reach: with 90% of the visual tokens it is 0\."):
        turbovlm.calibrate_reading(model, prompts, max_drift=1e-12)


def test_what_cannot_be_done_says_why(case):
    model, prompts = case
    for given, said in (
        ({}, "exactly one of visual_keep and max_drift: got none"),
        ({"visual_keep": 0.5, "max_drift": 0.1}, "got both"),
        ({"max_drift": 2}, r"max_drift=2: must be in \(0, 1\)"),
        ({"visual_keep": 1.5}, "visual_keep=1.5"),
        ({"visual_keep": 0.5, "cross_keep": 0.5}, "cross_keep: calibrate_reading finds visual_keep"),
    ):
        with pytest.raises(ConfigError, match=said):
            turbovlm.calibrate_reading(model, prompts, **given)
    with pytest.raises(ConfigError, match="29 are too few, at least 30"):
        turbovlm.calibrate_reading(model, prompts[:29], visual_keep=0.5)
    with pytest.raises(ConfigError, match="each a mapping of one prompt"):
        turbovlm.calibrate_reading(model, prompts[0], visual_keep=0.5)
    with pytest.raises(UnsupportedModelError):
        turbovlm.calibrate_reading(nn.Linear(2, 2).eval(), prompts, visual_keep=0.5)
    with pytest.raises(TurboError, match="training mode"):
        turbovlm.calibrate_reading(model.train(), prompts, visual_keep=0.5)
    model.eval()
    with turbovlm.apply(model, visual_keep=0.5), pytest.raises(TurboError, match="accelerated already"):
        turbovlm.calibrate_reading(model, prompts, visual_keep=0.5)
