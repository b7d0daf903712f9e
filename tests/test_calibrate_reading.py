"""`turbovlm.calibrate_reading` on small vision-language models."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import turbovlm
from turbovlm import ConfigError, TurboConfig, TurboError, UnsupportedModelError
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


def test_what_keeps_most_at_so_many_tokens(case, tmp_path):
    model, prompts = case
    before = logits(model, prompts[0])
    went = []
    config = turbovlm.calibrate_reading(model, prompts, visual_keep=0.5, progress=went.append)
    assert torch.equal(logits(model, prompts[0]), before) and sum(went) > 30 * 4
    promise = config.promise
    assert config.visual_keep == 0.5 and 0 < promise.flops < 1.1 and promise.images == 15
    assert 0 < promise.drift <= promise.bound and len(promise.curve) > 8
    with turbovlm.apply(model, config):
        there = torch.cat([logits(model, prompt)[:, -1] for prompt in prompts])
    own = torch.cat([logits(model, prompt)[:, -1] for prompt in prompts])
    drift = 1 - torch.cosine_similarity(there - own.mean(0), own - own.mean(0), dim=-1)
    assert drift.min() <= promise.drift <= drift.max()
    config.save(tmp_path / "turbo.json")
    assert TurboConfig.load(tmp_path / "turbo.json") == config


def test_the_fewest_tokens_within_a_tolerance(case):
    model, prompts = case
    tight = turbovlm.calibrate_reading(model, prompts, max_drift=0.05, reduce="merge")
    loose = turbovlm.calibrate_reading(model, prompts, max_drift=0.5, reduce="merge")
    assert loose.visual_keep < tight.visual_keep or tight.visual_keep == 0.1
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
