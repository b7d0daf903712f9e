"""`turbovlm.calibrate` on the small text-to-image pipeline: what it finds, promises and refuses."""

from __future__ import annotations

import pytest
import torch

import turbovlm
from turbovlm import Calibration, ConfigError, DenoiseConfig, TurboError
from turbovlm.calibration.subjects.denoiser import DenoiserSubject
from turbovlm.profile import compare_images

pytest.importorskip("diffusers")
GIVEN = {"components": ("ffn",), "degree": "weighted_difference", "alpha": 3.0, "restore": "copy", "refresh": 1}
FEW = {"steps": 2, "batch": 15}


@pytest.fixture(scope="module")
def pipe():
    from turbovlm_lab.zoo.emoji import load_emoji_pipeline

    return load_emoji_pipeline()


@pytest.fixture(scope="module")
def prompts():
    from turbovlm_lab.zoo.emoji import emoji_prompts

    return list(emoji_prompts())[::40][:30]


def image(pipe, prompt):
    made = pipe(prompt, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0))
    return made.images


@pytest.mark.slow
def test_a_share_for_each_resolution_at_one_cost(pipe, prompts):
    before, went = image(pipe, prompts[0]), []
    fixed = {name: value for name, value in GIVEN.items() if name != "components"}
    found = turbovlm.calibrate(pipe, prompts, flops=0.9, **FEW, progress=went.append, **fixed)
    assert torch.equal(image(pipe, prompts[0]), before) and sum(went) > 30 * 4
    assert isinstance(found.config, DenoiseConfig) and len(found.config.keep) == 4
    assert found.flops == pytest.approx(0.9, abs=0.01) and found.images == 15 and found.coverage == 0.8
    assert 0 < found.drift <= found.bound < 0.1
    costs, drifts = zip(*found.curve)
    assert len(costs) > 3 and list(drifts) == sorted(drifts, reverse=True)
    compared = compare_images(pipe, found.config, steps=2, prompt=prompts[0], rounds=1, warmup=0)
    assert 1 / compared.macs_ratio(compared.runs[1].name) == pytest.approx(found.flops, abs=0.005)


def test_settings_that_are_given_stay(pipe, prompts, tmp_path):
    found = turbovlm.calibrate(pipe, prompts, max_drift=0.005, **FEW, **GIVEN)
    assert all(getattr(found.config, name) == value for name, value in GIVEN.items())
    found.save(tmp_path / "turbo.json")
    assert Calibration.load(tmp_path / "turbo.json") == found
    with turbovlm.apply(pipe, found):
        assert image(pipe, prompts[0]).isfinite().all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one of flops, max_drift and speedup"),
        ({"flops": 0.9, "speedup": 2}, "exactly one of"),
        ({"flops": 1.5}, r"flops=1.5: must be a share in \(0, 1\)"),
        ({"flops": 0.9, "keep": 0.5}, "keep: calibrate finds how much is merged"),
        ({"flops": 0.9, "per_image": True}, "per_image: is for a model with vision encoders"),
        ({"flops": 0.9, "steps": 0}, "steps=0"),
        pytest.param({"flops": 0.3}, r"flops=0.3 is out of reach: 0\.\d+ is the least", marks=pytest.mark.slow),
        pytest.param({"max_drift": 1e-9, **GIVEN}, "max_drift=1e-09 is out of reach: with 9", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_done_says_why(pipe, prompts, given, said):
    with pytest.raises(ConfigError, match=said):
        turbovlm.calibrate(pipe, prompts, **{**FEW, **given})


def test_what_is_no_pipeline_or_too_little(pipe, prompts):
    with pytest.raises(ConfigError, match="prompts: 3 are too few, at least 30"):
        turbovlm.calibrate(pipe, prompts[:3], flops=0.9)
    with pytest.raises(ConfigError, match="prompts: must be a list of texts or class numbers, got 'a red fox"):
        turbovlm.calibrate(pipe, "a red fox, close up, in the snow", flops=0.9)
    with pytest.raises(ConfigError, match=r"texts and class numbers are for a pipeline.*; this is a Linear"):
        turbovlm.calibrate(torch.nn.Linear(2, 2), prompts, flops=0.9)
    with turbovlm.apply(pipe, keep=0.5), pytest.raises(TurboError, match="accelerated already"):
        turbovlm.calibrate(pipe, prompts, flops=0.9)


def test_whole_calls_are_timed(pipe, prompts):
    subject = DenoiserSubject(pipe, prompts[:2], DenoiseConfig(1.0), frozenset(), 0, lambda _: None, steps=2)
    found = subject.speedups([DenoiseConfig(1.0), DenoiseConfig(0.5)], 1)
    assert len(found) == 2 and all(0.1 < faster < 10 for faster in found)
    assert subject.timed_on.startswith("a call for 1 image in 2 steps on ") and subject.timed_on.endswith(", float32")


def test_first_blocks_are_tried_whole_where_there_are_no_convolutions_in_front(pipe, prompts):
    from turbovlm_lab.zoo.drawings import load_drawings_pipeline

    def tried(pipe, **given):
        base = DenoiseConfig(1.0, **given)
        subject = DenoiserSubject(pipe, prompts[:1], base, frozenset(given), 0, lambda _: None, steps=2)
        return [trial.settings["whole_first"] for trial in subject.trials(0.9) if "whole_first" in trial.settings]

    drawings = load_drawings_pipeline()
    assert tried(drawings) == [0, 2, 4, 6]
    assert tried(drawings, scope="part") == tried(drawings, whole_first=1) == tried(pipe) == []
