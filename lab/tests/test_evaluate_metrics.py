"""Metrics against their definitions and libraries; intervals against what is known of them."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from turbovlm.errors import ConfigError, DataError, TurboError
from turbovlm_lab.evaluate import statistics
from turbovlm_lab.evaluate.metrics import (
    caption_scores,
    frechet_distance,
    normalised_answer,
    recalled,
    region_scores,
    vqa_accuracy,
)

ANSWERS = {
    "The Dog": "dog",
    "two": "2",
    "none": "0",
    "A\nbig\tred  bus ": "big red bus",
    "yes.": "yes",
    "3.5": "3.5",
    "10,000": "10000",
    "black, white": "black white",
    "black/white": "black white",
    "t-shirt": "t shirt",
    "t - shirt": "t shirt",
    "(left)": "left",
    "dont know": "don't know",
    "couldnt've": "couldn't've",
    "ows'at": "ows'at",
    "its": "its",
    "she's": "she's",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_normalised_answers(answer):
    assert normalised_answer(answer) == ANSWERS[answer]


def test_vqa_accuracy_leaves_one_person_out_in_turn():
    said = ["red"] * 2 + ["blue"] * 8
    assert vqa_accuracy("Red.", said) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("the blue", said) == 1
    assert vqa_accuracy("green", said) == 0
    assert vqa_accuracy("two", ["2"] * 3 + ["3"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)


@pytest.mark.parametrize(("made", "said"), [("Yes.", "yes"), ("two", "2"), ("t-shirt", "t-shirt"), ("The dog", "dog")])
def test_answers_on_which_all_agree_are_normalised_too(made, said):
    """Models that follow a chat begin with a capital: they would be wrong on the questions that are clearest."""
    assert vqa_accuracy(made, [said] * 10) == 1 and vqa_accuracy("no", [said] * 10) == 0


OFFICIAL = r"""
1,000 dogs!|1000 dogs
a, b, the c|b c
none/zero|0 0
Ten o'clock.|10 o'clock
No. 5|no 5
3.5.|3.5
.5 in.|.5 in
its @home|its home
its@home|its home
"stop" sign|stop sign
(left)-handed|left handed
wouldnt've; didnt|wouldn't've didn't
whats up?|what's up
im not|im not
"""


@pytest.mark.parametrize("line", OFFICIAL.split("\n")[1:-1])
def test_normalised_answers_are_the_official_codes(line):
    """Answers written by VQAv2's evaluation code."""
    given, expected = line.split("|")
    assert normalised_answer(given) == expected


def test_one_answer_is_right_or_wrong():
    assert vqa_accuracy("The bag", ["bag"]) == 1 and vqa_accuracy("bags", ["bag"]) == 0


def test_recall():
    similarity = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.2, 0.1, 0.9, 0.3]])
    right = torch.tensor([[False, True, False, False], [True, False, False, True]])
    found = {k: recalled(similarity, right, k).tolist() for k in (1, 2, 10)}
    assert found == {1: [False, False], 2: [True, True], 10: [True, True]}


def test_captions_that_are_words_already():
    references = [["a red dog on the left", "a dog"], ["two blue cats", "cats that are blue"], ["a bus", "one bus"]]
    bleu, cider = caption_scores(["a red dog on the left", "two blue cats", "a bus"], references, tokenized=True)
    worse, lower = caption_scores(["a red dog on the right", "two red cats", "a cat"], references, tokenized=True)
    assert bleu == pytest.approx(1, abs=1e-4) and 0 < worse < bleu
    assert len(cider) == 3 and all(a > b for a, b in zip(cider, lower))


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer runs on Java")
def test_captions_are_cut_as_the_official_metric_cuts_them():
    references = [["A red dog, on the left."], ["Two blue cats!"]]
    words = [["a red dog on the left"], ["two blue cats"]]
    made = ["a red dog on the left", "two red cats"]
    assert caption_scores(made, references) == caption_scores(made, words, tokenized=True)


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer runs on Java")
def test_captions_of_several_lines_are_not_taken_for_the_next_ones():
    """The official tokenizer ends a line at more characters than `\\n`: all captions behind one were shifted."""
    references = [["a red dog"], ["two blue cats"], ["a bus on a road"]]
    made = ["a red\u2028dog", "two\x85blue\r\ncats", "a bus\x0bon a road"]
    assert caption_scores(made, references) == caption_scores([each[0] for each in references], references)
    assert caption_scores(["", "...", "a bus on a road"], references)[1][2] > 1


def test_captions_without_java(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(TurboError, match="needs Java"):
        caption_scores(["a"], [["a"]])


def test_regions():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2, :2] = True
    exact = region_scores(mask.float(), mask)
    assert exact == {"IoU": 1, "MAE": 0, "AUC": 1}
    half = region_scores(torch.full((4, 4), 0.5), mask)
    assert half == {"IoU": 0.25, "MAE": 0.5, "AUC": 0.5}
    with pytest.raises(DataError, match="a mask is empty"):
        region_scores(mask.float(), torch.zeros_like(mask))


def test_area_under_the_curve_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    heat, mask = torch.rand(16, 16).round(decimals=1), torch.rand(16, 16) > 0.7
    expected = sklearn.roc_auc_score(mask.flatten().numpy(), heat.flatten().numpy())
    assert region_scores(heat, mask)["AUC"] == pytest.approx(expected)


def test_frechet_distance_of_normal_distributions():
    """(difference of means)² + (difference of deviations)², summed over independent dimensions."""
    torch.manual_seed(0)
    a = torch.randn(100_000, 2) * torch.tensor([1.0, 2.0])
    b = torch.randn(100_000, 2) * torch.tensor([3.0, 2.0]) + torch.tensor([0.0, 1.5])
    assert frechet_distance(a, b) == pytest.approx(4 + 1.5**2, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_interval_of_a_mean_is_the_normal_one():
    scores = np.random.default_rng(0).normal(3, 2, 400)
    found = statistics.mean(list(scores))
    reach = 1.96 * scores.std() / math.sqrt(400)
    assert found.value == pytest.approx(scores.mean())
    assert [found.value - found.low, found.high - found.value] == pytest.approx([reach, reach], rel=0.05)
    assert statistics.mean(list(scores)) == found != statistics.mean(list(scores), seed=1)


def test_samples_of_a_group_are_drawn_together():
    scores = [float(i % 2) for i in range(100) for _ in range(10)]
    groups = [i for i in range(100) for _ in range(10)]
    alone, together = statistics.mean(scores), statistics.mean(scores, groups)
    assert alone.value == together.value == 0.5
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(10), rel=0.05)


def test_draws_of_many_groups_are_made_some_at_a_time(monkeypatch):
    """ImageNet's 50,000 images would take 4 GB at once."""
    scores = list(np.random.default_rng(0).normal(3, 2, 90))
    base = [value + 1 for value in scores]
    groups = [i % 60 for i in range(90)]
    whole = [statistics.mean(scores, groups), statistics.kept(scores, base, groups)]
    monkeypatch.setattr(statistics, "FEW", 0)
    monkeypatch.setattr(statistics, "AT_ONCE", 60 * 999)
    for one, parts in zip(whole, [statistics.mean(scores, groups), statistics.kept(scores, base, groups)]):
        assert [parts.value, parts.low, parts.high] == pytest.approx([one.value, one.low, one.high], rel=1e-12)


def test_pairs_tell_more_than_two_means():
    base = list(np.random.default_rng(0).normal(10, 5, 200))
    scores = [value - 0.1 for value in base]
    found = statistics.difference(scores, base)
    assert [found.value, found.low, found.high] == pytest.approx([-0.1] * 3)
    share = statistics.kept([value * 0.98 for value in base], base)
    assert [share.value, share.low, share.high] == pytest.approx([0.98] * 3)


def test_intervals_over_seeds():
    found = statistics.over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2 and found.high - 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert statistics.over_seeds([1.5]) == statistics.Interval(1.5, 1.5, 1.5)


def test_wrong_scores():
    with pytest.raises(ConfigError, match="no scores"):
        statistics.mean([])
    with pytest.raises(ConfigError, match="2 groups for 3 scores"):
        statistics.mean([1.0, 2.0, 3.0], groups=[0, 1])
    with pytest.raises(ConfigError, match="1 scores and 2 of base"):
        statistics.difference([1.0], [1.0, 2.0])
    with pytest.raises(ConfigError, match="the mean of base is 0"):
        statistics.kept([1.0], [0.0])
