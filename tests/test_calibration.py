"""`turbovlm.calibrate` on small models: what it finds, what it promises, what it refuses."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

import turbovlm
from turbovlm import Calibration, ConfigError, TurboConfig, TurboError
from turbovlm.calibration import search
from turbovlm.calibration.bound import upper_bound
from turbovlm.calibration.drift import Reference, clearly_less
from turbovlm.calibration.outputs import check_different
from turbovlm.calibration.schedule_search import EncoderCost, schedule_search
from turbovlm.calibration.subject import Found, Subject, Trial, solve_amount
from turbovlm.calibration.subjects import thresholds
from turbovlm.calibration.subjects.encoder import EncoderSubject
from turbovlm.encoder.schedule import EncoderShape, token_counts

transformers = pytest.importorskip("transformers")

SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=64, patch_size=8, **SIZE)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def images():
    """Smooth ones, in which patches are alike."""
    small = torch.randn(36, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=64, mode="bilinear")


@pytest.fixture(scope="module")
def varied():
    """From a few patches that differ to many."""
    chance = torch.Generator().manual_seed(0)
    small = (torch.randn(1, 3, 2 + number, 2 + number, generator=chance) for number in range(36))
    return torch.cat([torch.nn.functional.interpolate(each, size=64, mode="bilinear") for each in small])


def ratio_of(model, config):
    with turbovlm.apply(model, config) as handle:
        return handle.schedules[0].ratio


def subject_of(model, images, **options):
    return EncoderSubject(model, images, TurboConfig(r=0), frozenset(), 0, lambda _: None, **options)


def halves(seed=0, count=36):
    """Those searched on, and those held out."""
    order = random.Random(seed).sample(range(count), count)
    return sorted(order[: count // 2]), sorted(order[count // 2 :])


def test_drift_is_one_minus_the_cosine_with_the_mean_taken_off():
    own = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]], [[0.0, 1.0]], [[0.0, -1.0]]])  # of mean 0
    merged = torch.tensor([[[0.0, 2.0]], [[3.0, 0.0]], [[0.0, 5.0]]])
    assert Reference([own]).drift([merged], [0, 1, 2], "r=1").tolist() == [1, 2, 0]
    shifted = Reference([own + 7])
    assert shifted.drift([merged + 7], [0, 1, 2], "r=1").tolist() == pytest.approx([1, 2, 0], abs=1e-6)
    assert Reference([own, own]).drift([merged, own[:3]], [0, 1, 2], "r=1").tolist() == [0.5, 1, 0]  # parts count alike
    with pytest.raises(TurboError, match=r"gave \(2, 2\) per image with merging and \(1, 2\) without"):
        Reference([own]).drift([merged.repeat(1, 2, 1)], [0, 1, 2], "r=1")
    with pytest.raises(TurboError, match="NaN or infinite with r=1; nothing was calibrated"):
        Reference([own]).drift([merged * torch.nan], [0, 1, 2], "r=1")


def test_clearly_less_is_by_two_standard_errors():
    difference = torch.tensor([1.0, -1.0] * 8)  # of standard deviation 1.033, standard error 0.258
    assert clearly_less(difference - 0.52, torch.zeros(16))
    assert not clearly_less(difference - 0.51, torch.zeros(16))


SHAPE = EncoderShape((4 * 64,) * 4, (8 * 64,) * 4, (8,) * 4, 8, (8,) * 4, 3 * 64, prefix=1, suffix=2)


def test_amounts_of_a_spread_meet_the_cost():
    cost = EncoderCost(SHAPE, 67)
    for spread in ((1.0, 1.0, 1.0, 1.0), (0.0, 3.0, 0.0, 1.0)):
        amounts = cost.amounts(spread, 0.7)
        assert cost.share(amounts) == pytest.approx(0.7, abs=0.01)
        assert [amount == 0 for amount in amounts] == [share == 0 for share in spread]
    assert cost.share((0, 0, 0, 0)) == 1
    least = cost.share((32, 16, 8, 4))  # half of the 64 patches, of the 32 that are left, ...
    assert cost.least((1.0,) * 4) == least == cost.share((67,) * 4)
    assert cost.amounts((1.0,) * 4, least - 0.02) is None


def test_a_cost_is_solved_for():
    asked = []

    def cost(amount):
        asked.append(amount)
        return 0.2 + 0.8 * amount**1.2

    assert cost(solve_amount(cost, 0.6, 0.1, 1.0)) == pytest.approx(0.6, abs=0.0025) and len(asked) <= 7
    assert solve_amount(cost, 0.1, 0.1, 1.0) == 0.1 and solve_amount(cost, 1.5, 0.1, 1.0) == 1.0


class Line(Subject):
    """Drift and cost by arithmetic: an amount drifts by 1 − amount, times what the settings say."""

    amounts = (0.9, 0.8, 0.7, 0.6, 0.5)
    curve = (0.9, 0.5)
    count_samples = staticmethod(len)

    def __init__(self, start, finer, factor=1.0):
        self.start, self.finer, self.factor = start, finer, factor
        self.base, self.asked = TurboConfig(r=0), []

    def __post_init__(self):
        raise AssertionError

    def outputs(self, config, samples):
        raise AssertionError

    def drift(self, config, samples):
        amount = config.keep
        self.asked.append(amount)
        own = torch.tensor([float(sample) for sample in samples])
        return own + (1 - amount) * self.factor * (0.5 if config.dense else 1)

    def cost(self, config):
        return config.keep

    def speedups(self, configs, rounds):
        return [1 / (0.1 + 0.9 * config.keep) for config in configs]

    timed_on = "paper"

    def trials(self, amount):
        return [Trial(), Trial({"dense": True}), Trial({"reduce": "merge"})]

    def configured(self, config, spread, amount):
        return None if amount < 0.5 else TurboConfig(keep=amount, dense=config.dense, reduce=config.reduce)

    def least(self, config, spread):
        return 0.5


SAMPLES = range(16)
OFFSET = 7.5
"""Mean of what every drift of `Line` has beside."""


def test_the_best_trial_is_kept_and_built_on():
    found = search.least_drift(Line(0.9, 1), 0.6, SAMPLES)
    assert found.config == TurboConfig(keep=0.6, dense=True) and found.mean == pytest.approx(OFFSET + 0.2)
    with pytest.raises(ConfigError, match=r"flops=0.3: no setting comes within 1% of it"):
        search.least_drift(Line(0.9, 1), 0.3, SAMPLES)


@pytest.mark.parametrize(
    ("start", "finer", "max_drift", "amount"),
    [
        (0.9, 1, 0.16, 0.7),  # 0.5 · (1 − 0.7) = 0.15
        (0.9, 4, 0.16, 0.7),  # 0.675 drifts by 0.1625
        (0.9, 4, 0.19, 0.625),
        (0.7, 1, 0.21, 0.6),
        (0.7, 1, 0.11, 0.8),  # from above: 0.7 drifts by 0.15
        (0.9, 4, 0.9, 0.5),
    ],
)
def test_the_smallest_amount_within_a_drift(start, finer, max_drift, amount):
    assert search.within_drift(Line(start, finer), OFFSET + max_drift, SAMPLES).amount == amount


def test_a_drift_out_of_reach_names_the_least():
    with pytest.raises(ConfigError, match=r"with 90\.0% of the multiply-accumulates left the least is 7.55"):
        search.within_drift(Line(0.7, 1), OFFSET + 0.01, SAMPLES)


def test_a_speedup_is_solved_for():
    found, measured = search.at_speedup(Line(0.9, 1), 1.5, SAMPLES)
    assert measured == pytest.approx(1.5, rel=0.02)
    assert found.amount == pytest.approx((1 / 1.5 - 0.1) / 0.9, rel=0.04) and found.config.dense
    with pytest.raises(ConfigError, match=r"speedup=2 is out of reach: 1.82 is the most that was measured"):
        search.at_speedup(Line(0.9, 1), 2, SAMPLES)


class Spreads(Line):
    """Two spreads of one config: at one amount the first drifts least, and takes a tenth of the model's time more."""

    MANY, FEW = (1.0, 1.0), (0.0, 1.0)

    def trials(self, amount):
        return [Trial({}, self.MANY), Trial({}, self.FEW), Trial({"dense": True})]

    def configured(self, config, spread, amount):
        degree = "redundancy" if spread == self.MANY else "weighted_distance"
        return None if amount < 0.5 else TurboConfig(keep=amount, dense=config.dense, degree=degree)

    def drift(self, config, samples):
        own = torch.tensor([float(sample) for sample in samples])
        many, halved = config.degree == "redundancy", 0.5 if config.dense else 1
        return own + (1 - config.keep) * (1.0 if many else 1.2) * halved

    def speedups(self, configs, rounds):
        self.asked.append((len(configs), rounds))
        return [1 / (config.keep + (0.1 if config.degree == "redundancy" else 0)) for config in configs]


def test_spreads_are_compared_at_one_time():
    """At 70 % of the time the first may leave 60 %, and the second 70 %; at one amount the first is better."""
    subject = Spreads(0.9, 1)
    assert search.least_drift(subject, 0.7, SAMPLES).spread == Spreads.MANY
    found, measured = search.at_speedup(subject, 1 / 0.7, SAMPLES)
    assert found.spread == Spreads.FEW and found.config.dense and found.amount == pytest.approx(0.7, abs=0.015)
    assert measured == pytest.approx(1 / 0.7, rel=0.02)
    assert subject.asked == [(2, search.FEW_ROUNDS), (1, search.FEW_ROUNDS), (1, search.ROUNDS)]


def test_a_spread_that_cannot_be_so_fast_is_left_out():
    """Half of the multiply-accumulates and a tenth beside are the least time of the first."""
    assert search.at_speedup(Spreads(0.9, 1), 1.9, SAMPLES)[0].spread == Spreads.FEW
    with pytest.raises(ConfigError, match=r"speedup=2\.2 is out of reach: 2\.00 is the most that was measured"):
        search.at_speedup(Spreads(0.9, 1), 2.2, SAMPLES)


def test_a_schedule_for_one_cost(vit, images):
    before = vit(images[:2])[0]
    went = []
    found = turbovlm.calibrate(vit, images, flops=0.7, effort=3, progress=went.append)
    assert torch.equal(vit(images[:2])[0], before) and "forward" not in vars(vit.layers[0])
    assert isinstance(found, Calibration) and found.config == TurboConfig(
        (11, 11, 12, 0), similarity="hidden", guidance="cls", alpha=1.0, partition="random"
    )
    assert found.flops == round(ratio_of(vit, found), 4) == pytest.approx(0.7, abs=0.006)
    drift = subject_of(vit, images).drift(found.config, halves()[1])
    assert found.drift == pytest.approx(drift.mean().item(), rel=1e-5) == pytest.approx(0.02810, abs=1e-4)
    assert found.bound == pytest.approx(drift.max().item(), rel=1e-5) and found.coverage == 0.8 and found.images == 18
    assert found.speedup is None
    costs, drifts = zip(*found.curve)
    assert costs == pytest.approx((0.55, 0.7, 0.85), abs=0.01)
    assert list(drifts) == sorted(drifts, reverse=True) and (found.flops, found.drift) in found.curve
    assert sum(went) == 273
    assert turbovlm.calibrate(vit, images, flops=0.7, effort=3) == found
    assert turbovlm.calibrate(vit, images, flops=0.7, effort=3, seed=1).drift != found.drift


def test_what_is_given_stays(vit, images):
    found = turbovlm.calibrate(vit, images, flops=0.7, effort=1, similarity="queries", dense=True, seed=3)
    assert found.config == TurboConfig(
        (10, 11, 11, 11), similarity="queries", dense=True, guidance="cls", alpha=1.0, partition="random", seed=0
    )


def test_the_search_pays(vit, images):
    """On the images that were searched on, what is found is clearly better than the default settings spread evenly."""
    found = turbovlm.calibrate(vit, images, flops=0.7, effort=3)
    subject = subject_of(vit, images)
    even = TurboConfig(r=(11, 11, 11, 11))
    assert subject.cost(even) == pytest.approx(0.7, abs=0.01)
    assert clearly_less(subject.drift(found.config, halves()[0]), subject.drift(even, halves()[0]))


def test_the_cheapest_within_a_tolerance(vit, images):
    found = turbovlm.calibrate(vit, images, max_drift=0.2, effort=3)
    assert found.config.r == (11, 26, 6, 0) and found.flops == 0.6088
    subject = subject_of(vit, images)
    assert subject.drift(found.config, halves()[0]).mean() <= 0.2
    with pytest.raises(ConfigError, match=r"max_drift=1e-09 is out of reach: with 95.0% .* the least is 0\.\d+"):
        turbovlm.calibrate(vit, images, max_drift=1e-9, effort=1)


def test_a_speed_is_measured(vit, images, monkeypatch):
    """As fast as the arithmetic allows, by a clock of our own."""
    rounds = []

    def speedups(self, configs, count):
        rounds.append((len(configs), count))
        return [0.9 / self.cost(config) for config in configs]

    monkeypatch.setattr(EncoderSubject, "speedups", speedups)
    found = turbovlm.calibrate(vit, images, speedup=1.3, effort=1)
    assert found.speedup == pytest.approx(1.3, rel=0.02)
    assert found.flops == pytest.approx(0.9 / 1.3, abs=0.02)
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    assert found.measured_on.startswith("a batch of 16 images on ")
    assert found.measured_on.endswith(f" CPU, {threads}, float32")
    assert f"{found.speedup:.2f} times faster as measured with {found.measured_on}. On" in str(found)
    spreads = len([trial for trial in subject_of(vit, images).trials(1 / 1.3) if trial.spread is not None])
    assert rounds[0] == (spreads, search.FEW_ROUNDS) and rounds[-1] == (1, search.ROUNDS) and len(rounds) <= 4


def test_few_merges_are_found_where_a_merge_takes_time(vit, images, monkeypatch):
    """One of the four blocks merges where each merge takes a twentieth of the model's time, all of them where none."""
    merges = {}
    for each in (0.0, 0.05):

        def speedups(self, configs, count, each=each):
            return [1 / (self.cost(config) + each * sum(r > 0 for r in config.r)) for config in configs]

        monkeypatch.setattr(EncoderSubject, "speedups", speedups)
        found = turbovlm.calibrate(vit, images, speedup=1.2, effort=1)
        merges[each] = [r > 0 for r in found.config.r]
        assert found.speedup == pytest.approx(1.2, rel=0.02)
        assert found.flops == pytest.approx(1 / 1.2 - each * sum(merges[each]), abs=0.02)
    assert sum(merges[0.05]) < sum(merges[0.0])


class Flattest(Line):
    """Drifts by the most that a block merges, so that more blocks are better."""

    def drift(self, config, samples):
        return torch.tensor([float(sample) for sample in samples]) + max(config.r)


def test_a_search_that_stays_as_fast_merges_in_no_other_block():
    subject, cost, spread = Flattest(0.9, 1), EncoderCost(SHAPE, 67), (0.0, 1.0, 0.2, 0.0)
    config = TurboConfig(cost.amounts(spread, 0.8))
    start = Found(config, spread, 0.8, subject.drift(config, SAMPLES))
    for as_fast, merging in ((False, {0, 1, 2}), (True, {1, 2})):
        found = schedule_search(subject, cost, start, SAMPLES, 2000, 0, as_fast)
        assert {block for block, r in enumerate(found.config.r) if r} == merging
        assert max(found.config.r) < max(config.r) and cost.share(found.config.r) == pytest.approx(0.8, abs=0.01)


def test_the_clock_of_a_device(vit, images):
    fast, slow = subject_of(vit, images).speedups([TurboConfig(r=(16, 16, 8, 4)), TurboConfig(r=(1, 0, 0, 0))], 3)
    assert 0.2 < fast < 5 and 0.2 < slow < 5


def test_what_each_family_is_measured_by(images):
    torch.manual_seed(0)
    text = {**SIZE, "vocab_size": 99, "max_position_embeddings": 16}
    vision = {**SIZE, "image_size": 64, "patch_size": 8}
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)).eval()
    shapes = {}
    for name, model in {
        "clip": clip,
        "tower": transformers.CLIPVisionModelWithProjection(clip.config.vision_config).eval(),
        "classifier": transformers.ViTForImageClassification(transformers.ViTConfig(**vision, num_labels=5)).eval(),
        "encoder": transformers.ViTModel(transformers.ViTConfig(**vision)).eval(),
        "captioner": transformers.BlipForConditionalGeneration(
            transformers.BlipConfig(vision_config=vision, text_config={**text, "encoder_hidden_size": 32})
        ).eval(),
    }.items():
        subject = subject_of(model, {"pixel_values": images[:4]}, batch=2)
        shapes[name] = [tuple(part.shape[1:]) for part in subject.outputs(None, range(4))]
        drift = subject.drift(TurboConfig(r=4), range(4))
        assert drift.shape == (4,) and (drift > 0).all()
    width = clip.config.projection_dim
    assert shapes == {
        "clip": [(1, width)],
        "tower": [(1, clip.config.vision_config.projection_dim)],
        "classifier": [(1, 5)],
        "encoder": [(1, 32), (64, 32)],
        "captioner": [(1, 32), (64, 32)],
    }


@torch.no_grad()
def test_a_measure_of_ones_own(vit, images):
    found = turbovlm.calibrate(
        vit, {"pixel_values": images}, flops=0.8, effort=1, measure=lambda model, given: model(**given).pooler_output
    )
    own = vit(images).pooler_output
    with turbovlm.apply(vit, found):
        merged = vit(images).pooler_output
    drift = 1 - torch.cosine_similarity(merged - own.mean(0), own - own.mean(0))
    assert found.drift == pytest.approx(drift[halves()[1]].mean().item(), rel=1e-3)
    with pytest.raises(ConfigError, match=r"measure: must give a tensor or several, got NoneType"):
        turbovlm.calibrate(vit, images, flops=0.8, measure=lambda model, given: None)
    with pytest.raises(ConfigError, match=r"measure: gave a tensor of shape \(16,\)"):
        turbovlm.calibrate(vit, images, flops=0.8, measure=lambda model, given: model(given)[0][:, 0, 0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of flops, max_drift and speedup: got none"),
        ({"flops": 0.5, "speedup": 2}, "got flops, speedup"),
        ({"flops": 1.0}, r"flops=1.0: must be a share in \(0, 1\)"),
        ({"flops": "half"}, "flops='half': must be a number"),
        ({"max_drift": 0}, "max_drift=0: must be in"),
        ({"speedup": 0.9}, "speedup=0.9: must be more than 1"),
        ({"flops": 0.05}, "flops=0.05 is out of reach"),
        ({"flops": 0.5, "effort": 0}, "effort=0: must be an integer ≥ 1"),
        ({"flops": 0.5, "r": 3}, "r: .*calibrate finds"),
        ({"flops": 0.5, "min_tokens": 9}, "min_tokens: calibrate finds"),
        ({"flops": 0.5, "partition": "grid"}, "partition='grid'"),
        ({"speedup": 1.5, "per_image": True}, "per_image: a speed-up is measured in batches"),
        ({"flops": 0.5, "degree": "entropy"}, "degree='entropy'"),
        ({"flops": 0.5, "visual_select": "uniform"}, "visual_select='uniform': is no setting of TurboConfig"),
        ({"visual_keep": 0.5}, "visual_keep: is for a language model that reads images, and prompts: a list of mapp"),
        ({"flops": 0.5, "steps": 3}, "steps: is for a pipeline that makes images, and prompts"),
    ],
)
def test_bad_targets(vit, images, given, message):
    with pytest.raises(ConfigError, match=message):
        turbovlm.calibrate(vit, images, **given)


@pytest.fixture(scope="module")
def dino():
    torch.manual_seed(0)
    config = transformers.Dinov2Config(image_size=56, patch_size=14, **SIZE)
    return transformers.Dinov2Model(config).eval()


def test_images_of_several_sizes(dino):
    """Those of one size go through the model together; cost and drift are over all of them."""
    chance = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 42 + 14 * (number % 2), 56, generator=chance) for number in range(36)]
    found = turbovlm.calibrate(dino, images, flops=0.8, effort=1)
    subject = subject_of(dino, images)
    before, after = 0, 0
    shape = subject.encoder.shape
    for size in (42, 56):
        tokens = 1 + 4 * size // 14
        before += shape.macs((tokens,) * 5)
        after += shape.macs(token_counts(found.config.r, tokens, shape.protected, 0))
    assert found.flops == pytest.approx(after / before, abs=1e-4) == pytest.approx(0.8, abs=0.011)
    places = [3, 0, 8, 5]
    together = subject.drift(found.config, places)
    assert together.tolist() == pytest.approx([subject.drift(found.config, [i]).item() for i in places], abs=1e-5)
    assert (together > 0).all()
    with pytest.raises(ConfigError, match="per_image: thresholds are found on images of one size"):
        turbovlm.calibrate(dino, images, flops=0.8, effort=1, per_image=True)


def test_a_list_of_one_size_is_that_tensor(vit, images):
    assert turbovlm.calibrate(vit, list(images), flops=0.7, effort=1) == turbovlm.calibrate(
        vit, images, flops=0.7, effort=1
    )


def test_inputs_that_are_no_pictures_have_no_colour():
    check_different(torch.randn(20, 784), 16)
    with pytest.raises(ConfigError, match="only 1 of the 20 differ"):
        check_different(torch.randn(1, 784).expand(20, -1), 16)


def test_images_that_say_nothing_of_others(vit, images):
    with pytest.raises(ConfigError, match="images: only 1 of the 36 differ, at least 30 must"):
        turbovlm.calibrate(vit, images[:1].expand(36, -1, -1, -1), flops=0.5)
    with pytest.raises(ConfigError, match="images: only 29 of the 36 differ"):
        turbovlm.calibrate(vit, {"pixel_values": torch.cat((images[:29], images[:7]))}, flops=0.5)
    with pytest.raises(ConfigError, match="images: each of the 36 is of one colour"):
        turbovlm.calibrate(vit, torch.arange(36.0)[:, None, None, None].expand(36, 3, 64, 64), flops=0.5)
    with pytest.raises(
        ConfigError, match=r"of a list each must be a tensor \[3, height, width\], got \(1, 3, 64, 64\)"
    ):
        turbovlm.calibrate(vit, [image[None] for image in images], flops=0.5)


def test_bad_images(vit, images):
    with pytest.raises(ConfigError, match="images: 20 are too few, at least 30"):
        turbovlm.calibrate(vit, images[:20], flops=0.5)
    with pytest.raises(ConfigError, match=r"images: must be what the model takes.*got str"):
        turbovlm.calibrate(vit, {"pixel_values": "cat.jpg"}, flops=0.5)
    with pytest.raises(ConfigError, match="NaN"):
        turbovlm.calibrate(vit, images.where(images < 1, torch.nan), flops=0.5)
    with pytest.raises(ConfigError, match=r"different lengths: \[35, 36\]"):
        turbovlm.calibrate(vit, {"a": images, "b": images[1:]}, flops=0.5)


def test_bad_models(vit, images):
    with pytest.raises(ConfigError, match=r"samples: texts and class numbers are for a pipeline .*this is a ViTModel"):
        turbovlm.calibrate(vit, ["a cat"] * 30, flops=0.5)
    with pytest.raises(ConfigError, match=r"model: must be a torch.nn.Module or a pipeline of diffusers, got str"):
        turbovlm.calibrate("vit", images, flops=0.5)
    with pytest.raises(TurboError, match="training mode"):
        turbovlm.calibrate(vit.train(), images, flops=0.5)
    vit.eval()
    with turbovlm.apply(vit, r=1), pytest.raises(TurboError, match="accelerated already"):
        turbovlm.calibrate(vit, images, flops=0.5)
    broken = transformers.ViTModel(transformers.ViTConfig(image_size=64, patch_size=8, **SIZE)).eval()
    with torch.no_grad():
        broken.layernorm.weight.fill_(torch.nan)
    with pytest.raises(TurboError, match="NaN or infinite on these samples"):
        turbovlm.calibrate(broken, images, flops=0.5)


def test_an_interruption_leaves_the_model_as_it_was(vit, images):
    seen = []

    def stop(count):
        seen.append(count)
        if len(seen) == 9:
            raise KeyboardInterrupt

    before = vit(images[:1])[0]
    with pytest.raises(KeyboardInterrupt):
        turbovlm.calibrate(vit, images, flops=0.5, progress=stop)
    assert torch.equal(vit(images[:1])[0], before) and "forward" not in vars(vit.layers[0])


@pytest.mark.parametrize(("count", "coverage", "above"), [(15, 0.8, 0), (31, 0.9, 0), (61, 0.95, 0), (128, 0.95, 1)])
def test_the_bound_is_the_smallest_that_is_sure(count, coverage, above):
    """With 15, 31 and 61 images the largest value is above 80, 90 and 95 % of as many others."""
    values = [float(i) for i in range(count)]
    bound = upper_bound(values)
    assert bound.coverage == coverage and bound.value == count - 1 - above
    with pytest.raises(ConfigError, match="14 values allow no bound"):
        upper_bound(values[:14])


def test_the_bound_holds():
    """Of a distribution with a heavy tail: of as many others, as many as it says are below in at least 95 of 100."""
    chance = random.Random(0)
    held = 0
    for _ in range(400):
        seen, others = ([chance.paretovariate(1.5) for _ in range(64)] for _ in range(2))
        bound = upper_bound(seen)
        held += sum(value <= bound.value for value in others) >= int(bound.coverage * 64)
    assert 0.94 * 400 <= held < 400


def test_saved_and_loaded(vit, images, tmp_path):
    curve, measured_on = ((0.71, 0.01), (0.8, 0.005)), "a batch of 16 images on NVIDIA H200, bfloat16"
    found = Calibration(TurboConfig((3, 2)), 0.71, 0.01, 0.02, 0.9, 31, 1.25, curve, measured_on)
    found.save(tmp_path / "turbo.json")
    assert Calibration.load(tmp_path / "turbo.json") == found
    assert TurboConfig.load(tmp_path / "turbo.json") == found.config
    assert str(found) == (
        "r=[3, 2]: 71.0% of the multiply-accumulates are left, 1.25 times faster as measured with a batch of 16 images "
        "on NVIDIA H200, bfloat16. On 31 images that took no part in the search the mean drift is 0.0100. At least 90% "
        "of as many other images like these drift no further than 0.0200, with a probability of 95 %."
    )
    assert "drift is 3.5e-05. At least 90% of" in str(replace(found, drift=0.0000347))
    saved = json.loads((tmp_path / "turbo.json").read_text())
    assert saved["promise"].pop("measured_on") == measured_on  # as before it was told
    (tmp_path / "turbo.json").write_text(json.dumps(saved))
    earlier = Calibration.load(tmp_path / "turbo.json")
    assert earlier == replace(found, measured_on=None) and "1.25 times faster as measured. On" in str(earlier)
    with pytest.raises(ConfigError, match=r"these settings were not calibrated: read them with TurboConfig.load"):
        TurboConfig(r=1).save(tmp_path / "plain.json")
        Calibration.load(tmp_path / "plain.json")
    TurboConfig(keep=0.5, grid=(2, 3), partition="grid").save(tmp_path / "grid.json")
    assert TurboConfig.load(tmp_path / "grid.json") == TurboConfig(keep=0.5, grid=(2, 3), partition="grid")
    with pytest.raises(ConfigError, match="a function cannot be saved"):
        TurboConfig(r=1, degree=lambda r, a, block: r).save(tmp_path / "no.json")
    for content, message in {
        '{"r": 1}': "holds no settings of turbovlm",
        "[1]": "holds no settings of turbovlm",
        "r=1": "holds no settings of turbovlm",
        '{"turbovlm": 99, "r": 1}': "is of format 99",
        '{"turbovlm": 1, "r": 1, "speed": 2}': "does not know: 'speed'",
        '{"turbovlm": 1, "r": -1}': "r=-1",
    }.items():
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            TurboConfig.load(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="there is no such file"):
        TurboConfig.load(tmp_path / "none.json")


@pytest.fixture
def folder(vit, images, tmp_path):
    image = pytest.importorskip("PIL.Image")
    vit.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "vit")
    files = tmp_path / "images" / "some"
    files.mkdir(parents=True)
    for number, pixels in enumerate(((images[:30] + 3) * 40).clamp(0, 255).byte().permute(0, 2, 3, 1)):
        image.fromarray(pixels.numpy()).save(files / f"{number}.png")
    return tmp_path


def test_from_the_command_line(folder, vit, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from turbovlm.cli import main

    monkeypatch.chdir(folder)
    argv = ["calibrate", "./vit", "images", "--flops", "0.7", "--effort", "1", "--limit", "30", "--json", "a.json"]
    assert main(argv) == 0
    document = json.loads((folder / "a.json").read_text())
    assert document["calibration"] == json.loads((folder / "turbo.json").read_text())
    assert document["files"] == ["turbo.json", "turbo.png"] and document["target"] == {"flops": 0.7}
    said = " ".join(capsys.readouterr().out.split())
    found = Calibration.load("turbo.json")
    assert str(found) in said and found.images == 15 and "settings: turbo.json; drift over cost: turbo.png" in said
    assert ratio_of(vit, found) == pytest.approx(0.7, abs=0.011)
    assert pytest.importorskip("PIL.Image").open(folder / "turbo.png").size == (1350, 540)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["./vit", "none", "--flops", "0.5"], "none: there is no such folder"),
        (["./vit", "vit", "--flops", "0.5"], "vit: holds no images"),
        (["./none", "images", "--flops", "0.5"], "there is no such folder"),
        (["zoo:emoji", "images", "--flops", "0.5"], "images: is a folder: give a text file with a prompt in each line"),
        (["./vit", "images", "--flops", "0.5", "--out", "turbo.txt"], "must end in .json"),
        (["./vit", "images", "--flops", "0.5", "--out", "none/turbo.json"], "there is no folder none"),
        (["./vit", "images", "--flops", "0.5", "--effort", "0"], "--effort 0: must be an integer ≥ 1"),
        (["./vit", "images", "--flops", "0.5", "--limit", "20"], "--limit 20: must be at least 30"),
        (["./vit", "images", "--flops", "2"], "flops=2.0: must be a share in (0, 1)"),
        (["./vit", "images", "--flops", "0.5", "--seed", "-1"], "--seed -1"),
        (["./vit", "images/some/0.png", "--flops", "0.5"], "is a file; give a folder"),
        (["./vit", "few", "--flops", "0.5"], "few: holds 1 image, too few for a bound"),
    ],
)
def test_bad_input_on_the_command_line(folder, capsys, monkeypatch, given, message):
    from turbovlm.cli import main

    monkeypatch.chdir(folder)
    (folder / "few").mkdir()
    shutil.copy(folder / "images" / "some" / "0.png", folder / "few")
    assert main(["calibrate", *given]) == 2
    assert message in capsys.readouterr().err
    for name in ("broken.png", "cut.png"):
        (folder / "images" / "some" / name).write_text("no image")
    assert main(["calibrate", "./vit", "images", "--flops", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "2 of 32 images cannot be read" in error and "broken.png" in error and "cut.png" in error


def test_images_of_several_sizes_on_the_command_line(folder, capsys, monkeypatch):
    """As the processor leaves them; a model that takes one size alone says so."""
    pytest.importorskip("matplotlib")
    from turbovlm.cli import main

    monkeypatch.chdir(folder)
    image = pytest.importorskip("PIL.Image")
    for number in range(10):
        file = folder / "images" / "some" / f"{number}.png"
        image.open(file).resize((56, 42)).save(file)
    settings = {"do_resize": False, "do_center_crop": False}
    transformers.BitImageProcessor(**settings).save_pretrained(folder / "vit")
    assert main(["calibrate", "./vit", "images", "--flops", "0.7", "--effort", "1"]) == 2
    assert "does not take these images: ValueError: Input image size" in capsys.readouterr().err
    config = transformers.Dinov2Config(image_size=56, patch_size=14, num_hidden_layers=3, hidden_size=32)
    config.num_attention_heads = 2
    torch.manual_seed(0)
    transformers.Dinov2Model(config).save_pretrained(folder / "dino")
    transformers.BitImageProcessor(**settings).save_pretrained(folder / "dino")
    for file in (folder / "images" / "some").iterdir():
        small = image.open(file)
        small.resize((56, 42) if small.width == 56 else (56, 56)).save(file)
    assert main(["calibrate", "./dino", "images", "--flops", "0.8", "--effort", "1"]) == 0
    assert Calibration.load("turbo.json").images == 15


@torch.no_grad()
def test_thresholds_leave_each_image_what_it_needs(vit, varied):
    amounts, counts = [8] * 4, []
    with turbovlm.apply(vit, r=amounts, trace=True) as handle:
        vit(varied)
        middle = [entry.degree[~entry.degree.isnan()].median().item() for entry in handle.trace]
    with turbovlm.apply(vit, r=amounts, thresholds=middle, trace=True) as handle:
        for image in varied:
            vit(image[None])
            counts.append([65, *(entry.sizes.shape[1] for entry in handle.trace)])
            for before, after, entry, threshold in zip(counts[-1], counts[-1][1:], handle.trace, middle):
                known = entry.degree[~entry.degree.isnan()]
                assert before - after == min((known > threshold).sum(), (before - 1) // 2)
        vit(varied)
        assert handle.trace[0].sizes.shape[1] == max(each[1] for each in counts)
    assert len({each[-1] for each in counts}) > 3
    plain = vit(varied[:2])[0]
    with turbovlm.apply(vit, r=amounts, thresholds=[1e9] * 4):
        torch.testing.assert_close(vit(varied[:2])[0], plain)


def test_thresholds_cannot_be_compiled(vit, images):
    with (
        turbovlm.apply(vit, TurboConfig(r=[8] * 4, thresholds=[-0.05] * 4)),
        torch.no_grad(),
        pytest.raises(Exception, match="cannot be compiled: use r"),
    ):
        torch.compile(vit, backend="eager", fullgraph=True)(images[:1])


def test_thresholds_for_one_cost(vit, varied, tmp_path, monkeypatch):
    fixed = turbovlm.calibrate(vit, varied, flops=0.7, effort=1)
    monkeypatch.setattr(thresholds, "clearly_less", lambda drift, other: True)
    found = turbovlm.calibrate(vit, varied, flops=0.7, effort=1, per_image=True)
    assert found.config.r == fixed.config.r and len(found.config.thresholds) == 4
    assert found.flops == pytest.approx(0.7, abs=0.06) and found.drift != fixed.drift and found.curve == fixed.curve
    monkeypatch.setattr(thresholds, "clearly_less", lambda drift, other: False)
    assert turbovlm.calibrate(vit, varied, flops=0.7, effort=1, per_image=True) == fixed
    found.save(tmp_path / "turbo.json")
    assert Calibration.load(tmp_path / "turbo.json") == found
