"""Tokens chosen one after another over all pairs: as plain loops in float64 choose them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from turbovlm.ops.greedy import LEAST_GAIN, LEAST_LEFT, RIDGE, STATES, TIE, choose_greedily

WAYS = tuple(STATES)


def plain(features, k, by, log_weights, sizes):
    """The choice for one image, `[n, width]`, of which every step looks at every token anew."""
    x = F.normalize(features.double(), dim=-1)
    cosines, n = x @ x.T, len(x)
    log_weights = log_weights.double()
    weights = log_weights.exp()
    chosen: list[int] = []
    for _ in range(k):
        values = torch.full((n,), -torch.inf, dtype=torch.float64)
        for token in set(range(n)) - set(chosen):
            if by == "coverage":
                covered = cosines[chosen].amax(0).clamp(min=0) if chosen else torch.zeros(n, dtype=torch.float64)
                gain = float((sizes.double() * (cosines[token] - covered).clamp(min=0)).sum())
                values[token] = log_weights[token] + math.log(max(gain, LEAST_GAIN))
            elif by == "dpp":
                kernel = weights.outer(weights).sqrt() * (cosines + RIDGE * torch.eye(n, dtype=torch.float64))
                both = [*chosen, token]
                ratio = torch.linalg.det(kernel[both][:, both]) / torch.linalg.det(kernel[chosen][:, chosen])
                left = float(ratio / weights[token])
                values[token] = log_weights[token] + math.log(max(left, LEAST_LEFT))
            else:
                others = [other for other in range(n) if other != token] if by == "diversity" and not chosen else chosen
                near = cosines[token, others].max() if others else 0.0
                values[token] = (log_weights[token] if by == "mmr" else 0.0) - near
        chosen.append(int((values >= values.max() - TIE).nonzero()[0]))
    return chosen


def drawn(images=3, n=24, width=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, n, width, generator=generator) + 0.5
    return features, torch.randn(images, n, generator=generator) * 0.5


def weighed(by, log_weights):
    return None if by == "diversity" else log_weights


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("sized", [False, True])
def test_as_plain_loops_choose(by, sized):
    features, log_weights = drawn()
    sizes = torch.randint(1, 5, log_weights.shape, generator=torch.Generator().manual_seed(1)).float()
    sizes = sizes if sized else torch.ones_like(sizes)
    found = choose_greedily(features, 12, by, weighed(by, log_weights), sizes)
    for image in range(len(features)):
        wanted = plain(features[image], 12, by, log_weights[image], sizes[image])
        assert found.order[image].tolist() == wanted
    x = F.normalize(features, dim=-1)
    cosines = x @ x.transpose(1, 2)
    nearest = cosines.gather(2, found.order.unsqueeze(1).expand(-1, x.shape[1], -1)).argmax(2)
    assert torch.equal(found.nearest, nearest)


@pytest.mark.parametrize("by", WAYS)
def test_images_by_themselves_and_shorter_choices_agree(by, monkeypatch):
    features, log_weights = drawn()
    log_weights = weighed(by, log_weights)
    found = choose_greedily(features, 10, by, log_weights)
    monkeypatch.setattr("turbovlm.ops.greedy.PAIRS", 1)  # image after image
    assert torch.equal(choose_greedily(features, 10, by, log_weights).order, found.order)
    assert torch.equal(choose_greedily(features, 4, by, log_weights).order, found.order[:, :4])
    every = choose_greedily(features, 24, by, log_weights).order
    assert torch.equal(every.sort(dim=1).values, torch.arange(24).expand(3, -1))
    assert torch.equal(choose_greedily(features, 1, by, log_weights).order, every[:, :1])


@pytest.mark.parametrize("by", WAYS)
def test_tokens_in_another_order(by):
    features, log_weights = drawn(seed=1)  # no two come within TIE of each other where one is taken
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    found = choose_greedily(features, 10, by, weighed(by, log_weights))
    moved = choose_greedily(features[:, order], 10, by, weighed(by, log_weights[:, order]))
    assert torch.equal(order[moved.order], found.order)


@pytest.mark.parametrize("by", WAYS)
def test_of_equal_tokens_the_first_is_chosen(by):
    features = torch.eye(4).repeat_interleave(3, dim=0).unsqueeze(0)  # every token thrice, at right angles to others
    found = choose_greedily(features, 4, by)
    assert found.order[0].tolist() == [0, 3, 6, 9]
    assert found.nearest[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({*choose_greedily(features, 12, by).order[0].tolist()}) == 12


def copied(images=3, n=48, noise=0.0):
    """Tokens that are copies of a third as many, in no order, and log weights; noise of that size on both."""
    generator = torch.Generator().manual_seed(3)
    of = torch.randint(0, n // 3, (images, n), generator=generator)
    parts = []
    for part in drawn(images, n // 3, 32):
        index = of.view(images, n, *[1] * (part.ndim - 2)).expand(-1, -1, *part.shape[2:])
        part = part.gather(1, index)
        parts.append(part + noise * torch.randn(part.shape, generator=generator))
    return parts


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("k", [10, 32, 48])
def test_of_copies_but_for_rounding_the_first_is_chosen(by, k):
    features, log_weights = copied()
    wanted = choose_greedily(features, k, by, weighed(by, log_weights)).order
    for features, log_weights in (copied(noise=1e-6), copied(noise=-1e-6)):
        assert torch.equal(choose_greedily(features, k, by, weighed(by, log_weights)).order, wanted)
    assert all(len({*row.tolist()}) == k for row in wanted)


@pytest.mark.parametrize("by", WAYS)
def test_as_many_tokens_as_a_tolerance_needs(by):
    features, log_weights = drawn(n=40)
    features[1] = features[1, :5].repeat(8, 1)  # five different tokens
    features[2] = features[2, :1]
    until = 0.999
    found = choose_greedily(features, 30, by, weighed(by, log_weights), until=until, fewest=2)
    assert found.counts[2] == 2
    assert by == "mmr" or found.counts[1] == 5
    whole = choose_greedily(features, 40, by, weighed(by, log_weights), until=0.7)
    x = F.normalize(features, dim=-1)
    for image, count in enumerate(whole.counts.tolist()):
        order = whole.order[image, :count]
        reached = [float((x[image] @ x[image, order[:m]].T).amax(1).min()) >= 0.7 for m in range(1, count + 1)]
        assert reached == [False] * (count - 1) + [True]
        assert bool((whole.nearest[image] < count).all())


@pytest.mark.parametrize("by", WAYS)
def test_padding_comes_last_and_needs_no_cover(by):
    features, log_weights = drawn()
    alone = choose_greedily(features[:, :20], 8, by, weighed(by, log_weights[:, :20])).order
    sizes = torch.ones_like(log_weights)
    sizes[:, 20:] = 0
    features[:, 20:] = 0
    assert torch.equal(choose_greedily(features, 8, by, weighed(by, log_weights), sizes).order, alone)
    assert (choose_greedily(features, 24, by, weighed(by, log_weights), sizes).order[:, 20:] >= 20).all()


@pytest.mark.parametrize("by", WAYS)
def test_numbers_that_are_none_leave_a_choice(by):
    features, log_weights = drawn()
    features[0, 3], features[1, 4] = torch.nan, torch.inf
    order = choose_greedily(features, 24, by, weighed(by, log_weights)).order
    assert torch.equal(order.sort(dim=1).values, torch.arange(24).expand(3, -1))
    features, log_weights = drawn()
    log_weights[0, 2:9], log_weights[1, 4] = -torch.inf, torch.nan
    log_weights[2] = -torch.inf
    order = choose_greedily(features, 24, by, log_weights).order
    assert torch.equal(order.sort(dim=1).values, torch.arange(24).expand(3, -1))
    assert torch.equal(order[0, 17:], torch.arange(2, 9)) and order[1, 23] == 4


@pytest.mark.parametrize("by", WAYS)
def test_more_tokens_than_directions(by):
    features, log_weights = drawn(n=60, width=4)
    order = choose_greedily(features, 50, by, weighed(by, log_weights)).order
    assert all(len({*row.tolist()}) == 50 for row in order)


def test_autocast_leaves_the_choice():
    features, log_weights = drawn()
    wanted = choose_greedily(features, 10, "coverage", log_weights).order
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(choose_greedily(features, 10, "coverage", log_weights).order, wanted)


def test_compilers_do_not_look_into_it():
    features, log_weights = drawn()
    wanted = choose_greedily(features, 3, "coverage", log_weights)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(features, log_weights):
        return choose_greedily(features, 3, "coverage", log_weights)

    assert all(map(torch.equal, compiled(features, log_weights), wanted))
    traced = torch.jit.trace(lambda *inputs: choose_greedily(*inputs[:1], 3, "coverage", inputs[1]).order, drawn())
    other, weights = drawn(seed=7)
    assert torch.equal(traced(other, weights), choose_greedily(other, 3, "coverage", weights).order)
    meta = choose_greedily(features.to("meta"), 5, "dpp", log_weights.to("meta"))
    assert [part.shape for part in meta] == [(3, 5), (3, 24), (3,)]
