"""The mathematics on plain tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbovlm import ConfigError
from turbovlm.ops import (
    LayeredDegree,
    information_degree,
    match,
    merge_ranked,
    mutual_redundancy,
    partition_tokens,
    proportional_attention,
    rank_candidates,
    semantic_value,
)

SHAPES = {
    "batch": st.integers(1, 3),
    "tokens": st.integers(2, 30),
    "prefix": st.integers(0, 3),
    "r": st.integers(0, 40),
    "partition": st.sampled_from(["alternate", "random", "all"]),
    "order": st.sampled_from(["partition", "spatial"]),
    "reduce": st.sampled_from(["merge", "keep_norm", "prune"]),
    "degree": st.sampled_from(
        [
            *("weighted_distance", "weighted_difference", "coupled_division", "damped"),
            *("redundancy", "semantics", "random", LayeredDegree(alpha=6, beta=0.9, gamma=3)),
        ]
    ),
    "seed": st.integers(0, 1000),
}


def features_of(batch, tokens, seed, width=5, dtype=torch.float64):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None, max_examples=150)
@given(**SHAPES)
def test_every_merge_keeps_its_books(batch, tokens, prefix, r, partition, order, reduce, degree, seed):
    prefix = min(prefix, tokens - 1)
    x = features_of(batch, tokens, seed)
    semantic = features_of(batch, tokens, seed + 1)[..., 0].softmax(dim=-1)
    sizes = torch.randint(1, 5, (batch, tokens), generator=torch.Generator().manual_seed(seed)).double()
    order = "spatial" if partition == "all" else order  # there are no halves to order by
    settings_ = {"partition": partition, "order": order, "reduce": reduce, "degree": degree, "seed": seed}
    merge = match(x, r, semantic, sizes=sizes, prefix=prefix, **settings_)
    left = tokens - min(r, (tokens - prefix) // 2)
    assert merge.sizes.shape == merge.kept.shape == (batch, left)
    assert merge.source.shape == (batch, tokens)
    for b in range(batch):
        kept, source = merge.kept[b].tolist(), merge.source[b].tolist()
        assert [source[k] for k in kept] == list(range(left)), "a kept token is its own destination"
        assert kept[:prefix] == list(range(prefix)) and set(range(left)) == set(source)
        assert all(source.count(p) == 1 for p in range(prefix)), "nothing merges into the prefix"
        if order == "spatial":
            assert kept == sorted(kept)
        for destination in range(left):
            members = [i for i in range(tokens) if source[i] == destination]
            if reduce != "prune":
                weights = sizes[b, members]
                assert merge.sizes[b, destination] == weights.sum()
                expected = (weights[:, None] * x[b, members]).sum(0) / weights.sum()
                if reduce == "keep_norm":
                    expected *= (weights * x[b, members].norm(dim=-1)).sum() / weights.sum() / expected.norm()
            else:
                assert merge.sizes[b, destination] == sizes[b, kept[destination]]
                expected = x[b, kept[destination]]
            torch.testing.assert_close(merge.merge(x)[b, destination], expected)
    torch.testing.assert_close(
        merge.unmerge(merge.merge(x)), merge.merge(x).gather(1, merge.source[..., None].expand_as(x))
    )


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(2, 40), prefix=st.integers(0, 3), seed=st.integers(0, 100))
def test_the_most_redundant_go_into_their_most_similar_partner(tokens, prefix, seed):
    prefix = min(prefix, tokens - 1)
    x = features_of(2, tokens, seed)
    split = partition_tokens(tokens, prefix)
    even = [i for i in range(prefix, tokens) if i % 2 == 0]
    odd = [i for i in range(prefix, tokens) if i % 2 == 1]
    if not odd:
        return
    redundancy, partner = mutual_redundancy(x, split)
    units = x / x.norm(dim=-1, keepdim=True)
    similarity = units[:, even] @ units[:, odd].mT
    torch.testing.assert_close(redundancy, similarity.amax(-1))
    assert torch.equal(partner, similarity.argmax(-1))
    r = len(even) // 2
    merge = match(x, r, prefix=prefix, degree="redundancy")
    for b in range(2):
        gone = sorted(even, key=lambda i: -redundancy[b, even.index(i)])[: min(r, (tokens - prefix) // 2)]
        for i in gone:
            destination = odd[partner[b, even.index(i)]]
            assert merge.source[b, i] == merge.source[b, destination]


def test_the_published_order_is_unmerged_candidates_then_destinations():
    x = features_of(1, 9, 0)
    merge = match(x, 2, prefix=1, degree="redundancy")
    kept = merge.kept[0].tolist()
    assert kept[0] == 0 and kept[-4:] == [1, 3, 5, 7]
    assert all(i % 2 == 0 for i in kept[:-4])


@pytest.mark.parametrize(("grid", "patches"), [(None, 16), ((3, 5), 15), ((2, 2), 4)])
def test_grid_has_one_partner_in_every_cell(grid, patches):
    split = partition_tokens(patches + 1, 1, "grid", grid=grid)
    rows, columns = grid or (4, 4)
    corners = [1 + i * columns + j for i in range(0, rows, 2) for j in range(0, columns, 2)]
    assert split.destinations.tolist() == corners
    assert sorted(split.destinations.tolist() + split.candidates.tolist()) == list(range(1, patches + 1))


def test_grid_must_fit():
    with pytest.raises(ConfigError, match="15 found"):
        partition_tokens(16, 1, "grid")


def test_random_partition_is_half_and_half_and_depends_on_seed_and_block():
    splits = [partition_tokens(101, 1, "random", block=b, seed=s) for b, s in [(0, 0), (1, 0), (0, 1), (0, 0)]]
    for split in splits:
        assert split.candidates.shape == split.destinations.shape == (50,)
        assert sorted(split.candidates.tolist() + split.destinations.tolist()) == list(range(1, 101))
    assert splits[0].destinations.tolist() == splits[3].destinations.tolist()
    assert splits[0].destinations.tolist() != splits[1].destinations.tolist() != splits[2].destinations.tolist()


def test_random_degree_is_uniform():
    scores = information_degree(torch.zeros(1, 10_000), None, degree="random")[0]
    assert scores.min() >= 0 and scores.max() < 1
    assert abs(scores.mean() - 0.5) < 0.02 and abs(scores.var() - 1 / 12) < 0.01
    assert abs(torch.corrcoef(torch.stack((scores[1:], scores[:-1])))[0, 1]) < 0.05


@settings(deadline=None, max_examples=100)
@given(**SHAPES)
def test_what_a_merge_has_lost_brings_the_tokens_back(batch, tokens, prefix, r, partition, order, reduce, degree, seed):
    prefix = min(prefix, tokens - 1)
    x = features_of(batch, tokens, seed)
    semantic = features_of(batch, tokens, seed + 1)[..., 0].softmax(dim=-1)
    sizes = torch.randint(0, 5, (batch, tokens), generator=torch.Generator().manual_seed(seed)).double()
    sizes[:, :prefix] = 1
    order = "spatial" if partition == "all" else order  # there are no halves to order by
    settings_ = {"partition": partition, "order": order, "reduce": reduce, "degree": degree, "seed": seed}
    merge = match(x, r, semantic, sizes=sizes, prefix=prefix, **settings_)
    merged = merge.merge(x)
    back = merge.unmerge(merged, merge.lost(x, merged))
    seen = sizes > 0
    torch.testing.assert_close(back[seen], x[seen])
    gone = torch.zeros_like(seen).scatter(1, merge.src, True)
    torch.testing.assert_close(back[gone], x[gone])


def test_information_degrees_are_the_published_ones():
    r, a = torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[0.2, 0.05, 0.0]])

    def degree(name, block=0, **settings):
        return information_degree(r, a, block, degree=name, **settings)

    torch.testing.assert_close(degree("weighted_difference", alpha=3), r - 3 * a)
    torch.testing.assert_close(degree("weighted_difference"), r - 2 * a)
    torch.testing.assert_close(degree("weighted_distance"), degree("weighted_distance", alpha=1))
    torch.testing.assert_close(degree("weighted_distance", alpha=3), (r - 1) * (1 + 3 * (a / a.mean()).sqrt()))
    assert information_degree(r, torch.zeros_like(a), degree="weighted_distance").isfinite().all()
    torch.testing.assert_close(degree("coupled_division"), r / (a + 1e-3))
    torch.testing.assert_close(degree("damped", alpha=2), r * (1 - 2 * a))
    torch.testing.assert_close(degree(LayeredDegree(alpha=6, beta=0.9, gamma=3), block=5), r - 0.9**2 * 6 * a)
    torch.testing.assert_close(degree("redundancy"), r)
    torch.testing.assert_close(degree("semantics"), -a)
    torch.testing.assert_close(degree(lambda r, a, block: r * block + a, block=2), 2 * r + a)
    with pytest.raises(ConfigError, match="'entropy'"):
        degree("entropy")
    with pytest.raises(ConfigError, match="'layered'"):
        degree("layered")
    with pytest.raises(ConfigError, match="needs the semantic value"):
        information_degree(r, None, degree="semantics")
    with pytest.raises(ConfigError, match="R's shape"):
        degree(lambda r, a, block: r.sum())


def test_semantic_value_is_the_guides_attention_row():
    q, k = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    sizes = torch.randint(1, 4, (2, 7)).float()
    scores = q @ k.mT / 2 + sizes.log()[:, None, None, :]
    value = semantic_value(q[:, :, :1] / 2, k, sizes)
    torch.testing.assert_close(value, scores.softmax(-1).mean(1)[:, 0])
    torch.testing.assert_close(value.sum(-1), torch.ones(2))
    plain = (q @ k.mT / 2).softmax(-1).mean(1)[:, 0]
    torch.testing.assert_close(semantic_value(q[:, :, :1] / 2, k), plain)


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(1, 9), repeats=st.integers(1, 4), seed=st.integers(0, 100))
def test_proportional_attention_counts_copies(tokens, repeats, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, tokens, 4, generator=generator, dtype=torch.float64)
    sizes = torch.full((2, tokens), float(repeats), dtype=torch.float64)
    sizes[:, 0] = 1
    copies = torch.tensor([0] + [i for i in range(1, tokens) for _ in range(repeats)])
    merged = proportional_attention(q, k, v, sizes)
    torch.testing.assert_close(merged, proportional_attention(q, k[:, :, copies], v[:, :, copies]))


def test_tokens_of_size_zero_are_padding():
    x = features_of(1, 9, 0)
    sizes = torch.ones(1, 9, dtype=torch.float64)
    sizes[0, 6:] = 0
    merge = match(x, 3, sizes=sizes, degree="redundancy")
    assert merge.sizes.sum() == 6
    merged = merge.merge(x)
    assert merged.isfinite().all()
    gone = set(range(9)) - set(merge.kept[0].tolist())
    assert {6, 8} <= gone, "padding among the candidates goes first"
    attended = proportional_attention(*(t[:, None] for t in (x, x, x)), sizes)
    torch.testing.assert_close(attended, proportional_attention(*(t[:, None] for t in (x, x[:, :6], x[:, :6]))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_activations_do_not_overflow_in_half_precision(dtype):
    x = torch.full((1, 200, 4), 300.0).to(dtype)
    sizes = torch.full((1, 200), 150.0)
    merge = match(x, 100, sizes=sizes, degree="redundancy")
    assert torch.equal(merge.merge(x), torch.full((1, 100, 4), 300.0).to(dtype))
    assert merge.sizes.sum() == 200 * 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_the_norm_leaves_tokens_that_nothing_joined_bit_for_bit(dtype):
    x = features_of(2, 40, 0, width=64, dtype=dtype)
    x[0, 3:5] = 0
    merge = match(x, 12, prefix=1, degree="redundancy", reduce="keep_norm")
    merged = merge.merge(x)
    alone = merge.sizes == 1
    assert alone.any() and not alone.all() and merged.isfinite().all()
    assert torch.equal(merged[alone], x.gather(1, merge.kept[..., None].expand_as(merged))[alone])


@pytest.mark.parametrize("reduce", ["merge", "keep_norm"])
def test_merging_is_differentiable(reduce):
    x = features_of(2, 9, 0).requires_grad_()
    merge = match(x.detach(), 3, prefix=1, degree="redundancy", reduce=reduce)
    assert torch.autograd.gradcheck(lambda t: merge.unmerge(merge.merge(t)), (x,))
    assert torch.autograd.gradcheck(lambda t: merge.unmerge(merge.merge(t).exp(), merge.lost(t, merge.merge(t))), (x,))


def test_candidates_that_were_ranked_to_choose_some_choose_those():
    features, x = torch.randn(2, 17, 8), torch.randn(2, 17, 24)
    partition = partition_tokens(17, 1, "all")
    how = {"degree": "redundancy"}
    early, late = (rank_candidates(features, partition, None, r=r, **how) for r in (5, None))
    assert early.chosen is not None and late.chosen is None
    merged = [merge_ranked(ranking, 5, x, order="spatial", reduce="merge")[1] for ranking in (early, late)]
    torch.testing.assert_close(merged[0], merged[1], rtol=0, atol=0)
    with pytest.raises(ConfigError, match="r=4: the candidates were ranked to choose 5"):
        merge_ranked(early, 4, x, order="spatial", reduce="merge")
