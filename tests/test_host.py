"""The steps of a merge in NumPy against those in PyTorch's operators."""

from __future__ import annotations

import pytest
import torch

from turbovlm.ops import host, partition_tokens, plain

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 50, 1300])
@pytest.mark.parametrize("kind", ["all", "random", "alternate"])
def test_the_most_similar_are_those_of_the_plain_path(kind, tokens, dtype):
    features, partition = randn(2, tokens, 24, dtype=dtype), partition_tokens(tokens, 1, kind)
    found, expected = (path.most_similar(features, partition) for path in (host, plain))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("degree", ["redundancy", "weighted_difference", "weighted_distance", "damped", "random"])
@pytest.mark.parametrize("kind", ["all", "random", "alternate"])
@pytest.mark.parametrize("tokens", [3, 50, 131])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_choice_is_that_of_the_plain_path(share, tokens, kind, degree):
    partition = partition_tokens(tokens, 1, kind)
    redundancy, nearest = plain.most_similar(randn(3, tokens, 8), partition)
    for semantic in (randn(3, 4, tokens, seed=1).softmax(dim=2), randn(3, tokens, seed=1).softmax(dim=1)):
        how = {"degree": degree, "alpha": None, "seed": 0, "padding": None, "r": int(share * (tokens - 1))}
        found, expected = (path.rank(redundancy, nearest, semantic, partition, 0, **how) for path in (host, plain))
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
        assert into_of(found[2]) == into_of(expected[2])


def test_any_partners_form_the_same_trees():
    """Cycles, long ways, equal degrees, padding: whatever partners say, nobody goes into one that goes."""
    partition, generator = partition_tokens(65, 1, "all"), torch.Generator().manual_seed(0)
    nearest = (torch.arange(64) + torch.randint(1, 64, (40, 64), generator=generator)) % 64
    nearest[:3] = (torch.arange(64) + 1) % 64  # one cycle
    degree = torch.rand(40, 64, generator=generator)
    degree[20:, 40:] = torch.inf
    for r in (1, 9, 32):
        found, expected = (path.choose(degree, nearest, partition, r) for path in (host, plain))
        for b in range(40):
            assert not set(found[0][b].tolist()) & set(found[1][b].tolist())
        assert into_of(tuple(each[:20] for each in found)) == into_of(tuple(each[:20] for each in expected))


def into_of(chosen):
    """What each token that goes goes into, for each image."""
    return [dict(zip(src.tolist(), dst.tolist())) for src, dst in zip(*chosen)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["merge", "keep_norm", "prune"])
@pytest.mark.parametrize("sized", [False, True], ids=["ones", "sizes"])
@pytest.mark.parametrize("slots", [None, torch.arange(49, -1, -1)], ids=["spatial", "reversed"])
def test_the_merge_is_that_of_the_plain_path(slots, sized, reduce, dtype):
    partition = partition_tokens(50, 1, "all")
    features = randn(2, 50, 8)
    src, dst = plain.choose(randn(2, 49, seed=2), plain.most_similar(features, partition)[1], partition, 16)
    sizes = torch.randint(0, 5, (2, 50), generator=torch.Generator().manual_seed(3)).float() if sized else None
    sizes = sizes if sizes is None or dtype != torch.float64 else sizes.double()
    x = randn(2, 50, 72, dtype=dtype)
    names = ("merged", "rows", "weights", "sizes", "logs")
    found, expected = (path.merge_tokens(x, sizes, src, dst, slots, reduce) for path in (host, plain))
    for name, one, other in zip(names, found, expected):
        assert one.shape == other.shape and one.dtype == other.dtype, name
        bound = 2 * torch.finfo(dtype).eps if name == "merged" else 1e-6
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for path, leaf in zip((host, plain), leaves):
        path.merge_tokens(leaf, sizes, src, dst, slots, reduce)[0].square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_what_is_differentiated_takes_the_plain_path():
    partition, leaves = partition_tokens(17, 1, "all"), [randn(2, 17, 8).requires_grad_() for _ in range(2)]
    how = {"degree": "weighted_distance", "alpha": None, "seed": 0, "padding": None, "r": 4}
    for path, leaf in zip((host, plain), leaves):
        redundancy, nearest = path.most_similar(leaf, partition)
        path.rank(redundancy, nearest, randn(2, 17).softmax(dim=1), partition, 0, **how)[1].sum().backward()
    assert leaves[1].grad.abs().sum() > 0
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
