"""A block's whole merge in one call: the same as its steps, on every path, and one operator in compiled programs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck

import turbovlm
from families import FAMILIES
from turbovlm.ops import host, plain
from turbovlm.ops.partition import Split
from turbovlm.ops.whole import Guide, Rules, merge_operator, merge_whole


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(tokens, *, degree="weighted_distance", order="spatial", reduce="keep_norm", sized=True, guides=(0, 1)):
    """What `merge_whole` takes behind a path, but for the split: 2 images, 3 heads of 8 channels."""
    q, keys = (randn(2, 3, tokens, 8, seed=seed) for seed in range(2))
    sizes = torch.randint(1, 5, (2, tokens), generator=torch.Generator().manual_seed(3)).float() if sized else None
    weights = None if guides == (0, 1) else sizes
    guide = Guide(q, keys, None, None, weights, guides, 8**-0.5, True)
    rules = Rules(degree, None, 0, order, reduce)
    needs = degree not in ("redundancy", "random")
    return randn(2, tokens, 24, seed=2), keys.transpose(1, 2).flatten(2), guide if needs else None, sizes, rules


def merged_by(path, split, parts, r, **how):
    x, features, guide, sizes, rules = parts
    return merge_whole(path, x, features, guide, sizes, split, None, rules, r=r, index=0, **how)


@pytest.mark.parametrize("degree", ["weighted_distance", "weighted_difference", "damped", "redundancy", "random"])
@pytest.mark.parametrize("reduce", ["keep_norm", "merge", "prune"])
@pytest.mark.parametrize("kind", ["all", "random", "alternate", "grid"])
def test_on_the_host_it_is_what_the_steps_do(kind, reduce, degree):
    split = Split(kind, 1, 1, block=2, seed=5)
    for tokens, r, sized in itertools.product((38, 66), (1, 9), (True, False)):
        parts = case(tokens, degree=degree, reduce=reduce, sized=sized, guides=(1, tokens - 1))
        (found, y), (expected, z) = (merged_by(path, split, parts, r) for path in (host, plain))
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.src.sort(dim=1).values, expected.src.sort(dim=1).values)
        for name in ("weights", "sizes", "logs"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        assert found.keep_norm == expected.keep_norm == (reduce == "keep_norm")


def test_padding_and_the_published_order_are_taken_in_steps():
    split = Split("alternate", 1)
    for parts in (case(33, order="partition"), case(33)):
        parts[3][:, 20:24] = 0
        (found, y), (expected, z) = (merged_by(path, split, parts, 6, padded=True) for path in (host, plain))
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.rows, expected.rows)


@pytest.mark.parametrize("kind", ["all", "random", "grid"])
def test_the_operator_says_what_it_gives(kind):
    x, features, guide, sizes, rules = case(38 if kind == "all" else 37)
    split = Split(kind, 1, 0, 0, 0)
    opcheck(
        merge_operator,
        (
            x,
            features,
            sizes,
            None,
            *guide[:5],
            list(guide.guides),
            guide.scale,
            True,
            *split[:5],
            [],
            *rules,
            5,
            0,
            False,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


@torch.no_grad()
@pytest.mark.parametrize("setting", [{}, {"similarity": "hidden"}, {"degree": "random"}, {"partition": "grid"}])
def test_a_compiled_encoder_has_one_operator_for_each_merge(setting):
    graphs = []

    def kept(graph, inputs):
        graphs.append(graph)
        return graph.forward

    vit = FAMILIES["timm_layerscale"].make().eval()
    images = FAMILIES["timm_layerscale"].inputs(2)["x"]
    handle = turbovlm.apply(vit, r=2, **setting)
    expected = vit(images)
    found = torch.compile(vit, backend=kept, fullgraph=True)(images)
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes if "turbovlm" in str(node.target)]
    merges = [r for r in handle.schedules[0].merged if r]
    assert names == ["turbovlm.merge_whole.default"] * len(merges) and merges
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
