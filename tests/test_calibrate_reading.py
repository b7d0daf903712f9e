"""`turbovlm.calibrate` of what small language models read."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import turbovlm
from turbovlm import Calibration, ConfigError, ReadConfig, TurboConfig, TurboError, UnsupportedModelError
from turbovlm.calibration.subjects.reading import ReadingSubject
from turbovlm.profile import macs
from vlms import VLMS, blip, seeded

pytest.importorskip("transformers")
NAMES = ("qwen2_5_vl", "blip")


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=pytest.mark.slow if n == "qwen2_5_vl" else ()) for n in NAMES],
)
def case(request):
    family = VLMS.get(request.param)
    model = seeded(family.make if family else lambda: blip("ConditionalGeneration")).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    chance = torch.Generator().manual_seed(0)
    prompts = []
    for _ in range(30):
        words = torch.randint(10, 60, (12,), generator=chance).tolist()  # of four, choosing costs more than it saves
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


def drift_of(model, prompts, *configs):
    """Of every prompt."""
    own = torch.cat([logits(model, prompt)[:, -1] for prompt in prompts])
    with turbovlm.apply(model, *configs):
        there = torch.cat([logits(model, prompt)[:, -1] for prompt in prompts])
    return 1 - torch.cosine_similarity(there - own.mean(0), own - own.mean(0), dim=-1)


def halves():
    """Those searched on, and those held out."""
    order = random.Random(0).sample(range(30), 30)
    return sorted(order[:15]), sorted(order[15:])


def test_what_keeps_most_at_so_many_tokens(case, tmp_path):
    model, prompts = case
    before = logits(model, prompts[0])
    went = []
    found = turbovlm.calibrate(model, prompts, visual_keep=0.5, progress=went.append)
    assert torch.equal(logits(model, prompts[0]), before) and 15 + 6 * 4 <= sum(went) - 30 - 12 * 15 <= 7 * 15
    assert found.config.visual_keep == 0.5 and found.images == 15 and found.coverage == 0.8
    drift = drift_of(model, prompts, found)
    assert found.drift == pytest.approx(drift[halves()[1]].mean().item(), rel=1e-4)
    assert found.bound == pytest.approx(drift[halves()[1]].max().item(), rel=1e-4)
    default = drift_of(model, prompts, ReadConfig(0.5))[halves()[0]]
    assert drift[halves()[0]].mean() <= default.mean()
    own = macs(model, **prompts[0])
    with turbovlm.apply(model, found):
        assert found.flops == round(macs(model, **prompts[0]) / own, 4)
    found.save(tmp_path / "turbo.json")
    assert Calibration.load(tmp_path / "turbo.json") == found and "15 prompts that took no part" in str(found)


@pytest.mark.slow
def test_the_fewest_tokens_within_a_tolerance(case):
    model, prompts = case
    found = turbovlm.calibrate(model, prompts, max_drift=0.2, reduce="merge")
    assert drift_of(model, prompts, found)[halves()[0]].mean() <= 0.2
    shares = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1]
    fewer = shares[shares.index(found.config.visual_keep) + 1 :][:1]
    for share in fewer:
        assert drift_of(model, prompts, replace(found.config, visual_keep=share))[halves()[0]].mean() > 0.2
    with pytest.raises(ConfigError, match=r"max_drift=1e-12 is out of reach: with 90.0% of the visual tokens .* 0\."):
        turbovlm.calibrate(model, prompts, max_drift=1e-12)


@pytest.mark.slow
def test_a_tower_that_merges_meanwhile(case):
    model, prompts = case
    merging = TurboConfig(keep=0.8)
    found = turbovlm.calibrate(model, prompts, visual_keep=0.5, encoder=merging)
    assert found.drift == pytest.approx(drift_of(model, prompts, merging, found)[halves()[1]].mean().item(), rel=1e-4)


@pytest.mark.slow
def test_a_cost_is_solved_for(case):
    model, prompts = case
    cost = turbovlm.calibrate(model, prompts, visual_keep=0.4).flops
    assert turbovlm.calibrate(model, prompts, flops=cost).flops == pytest.approx(cost, abs=0.03)
    with pytest.raises(ConfigError, match=r"flops=0.01 is out of reach: 0\.\d+ is left with 10% of the visual tokens"):
        turbovlm.calibrate(model, prompts, flops=0.01)


def test_what_cannot_be_done_says_why(case):
    model, prompts = case
    for given, said in (
        ({}, "exactly one of flops, max_drift, speedup and visual_keep: got none"),
        ({"visual_keep": 0.5, "max_drift": 0.1}, "got max_drift, visual_keep"),
        ({"max_drift": 2}, r"max_drift=2: must be in \(0, 1\)"),
        ({"visual_keep": 1.5}, "visual_keep=1.5"),
        ({"visual_keep": 0.5, "cross_keep": 0.5}, "cross_keep: calibrate finds how much"),
    ):
        with pytest.raises(ConfigError, match=said):
            turbovlm.calibrate(model, prompts, **given)
    with pytest.raises(ConfigError, match="29 are too few, at least 30"):
        turbovlm.calibrate(model, prompts[:29], visual_keep=0.5)
    with pytest.raises(ConfigError, match=r"visual_keep: is for a language model .* prompts: a list of mappings"):
        turbovlm.calibrate(model, prompts[0], visual_keep=0.5)
    with pytest.raises(ConfigError, match="per_image: is for a model with vision encoders, and images"):
        turbovlm.calibrate(model, prompts, visual_keep=0.5, per_image=True)
    with pytest.raises(UnsupportedModelError):
        turbovlm.calibrate(nn.Linear(2, 2).eval(), prompts, visual_keep=0.5)
    with pytest.raises(TurboError, match="training mode"):
        turbovlm.calibrate(model.train(), prompts, visual_keep=0.5)
    model.eval()
    with turbovlm.apply(model, visual_keep=0.5), pytest.raises(TurboError, match="accelerated already"):
        turbovlm.calibrate(model, prompts, visual_keep=0.5)


def test_a_prompt_is_timed(case):
    model, prompts = case
    subject = ReadingSubject(model, prompts[:2], ReadConfig(1.0), frozenset(), 0, lambda _: None)
    found = subject.speedups([ReadConfig(1.0), ReadConfig(0.5)], 2)
    assert len(found) == 2 and all(0.1 < faster < 10 for faster in found)
    assert subject.timed_on.startswith("one prompt on ") and subject.timed_on.endswith(", float32")


def test_no_trial_undoes_what_was_asked_for():
    asked = {"visual_select": "diversity", "visual_tolerance": 0.2}
    subject = SimpleNamespace(base=ReadConfig(1.0, **asked), fixed=frozenset(asked))
    assert [trial.settings for trial in ReadingSubject.trials(subject, 0.5)] == [{}, {"reduce": "prune"}]
    subject = SimpleNamespace(base=ReadConfig(1.0, alpha=3), fixed=frozenset(["alpha"]))
    changes = [trial.settings for trial in ReadingSubject.trials(subject, 0.5)]
    assert {"visual_select": "dpp"} in changes and {"reduce": "prune"} in changes
    assert {"visual_select": "attention"} not in changes and {"visual_select": "uniform"} not in changes
