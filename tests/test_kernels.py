"""The Triton kernels against the plain path: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import turbovlm  # noqa: E402
from turbovlm.encoder import block  # noqa: E402
from turbovlm.ops import (  # noqa: E402
    Merge,
    Ranking,
    dispatch,
    fused,
    host,
    kernels,
    merge_ranked,
    mutual_redundancy,
    partition_tokens,
    plain,
    rank_candidates,
    size_bias,
)
from turbovlm.ops.partition import Partition, index_count, positions  # noqa: E402
from turbovlm.profile.macs import counting  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def split(tokens, prefix=1, kind="alternate"):
    """A partition whose indices are tensors, `[k]`, on the device."""
    found = partition_tokens(tokens, prefix, kind)
    return Partition(positions(found.candidates, CPU).to(DEVICE), positions(found.destinations, CPU).to(DEVICE))


def own_split(batch, tokens, destinations, prefix=1):
    """A partition of its own for each image, `[batch, k]`, cut out of a wider tensor."""
    order = torch.rand(batch, tokens - prefix, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    halves = order[:, :destinations].sort(dim=1).values, order[:, destinations:].sort(dim=1).values
    order = (torch.cat(halves, dim=1) + prefix).to(DEVICE)
    return Partition(order[:, destinations:], order[:, :destinations])


def check_similarity(features, partition):
    """R as on the plain path, and reached by the destination named."""
    redundancy, nearest = fused.most_similar(features, partition)
    expected, _ = mutual_redundancy(features.double(), partition)
    assert redundancy.dtype == torch.float32 and nearest.dtype == torch.int64
    assert redundancy.shape == nearest.shape == expected.shape
    torch.testing.assert_close(redundancy.double(), expected, rtol=0, atol=5e-6)
    units = torch.nn.functional.normalize(features.double(), dim=-1)
    everyone = torch.arange(len(features), device=DEVICE).unsqueeze(1)
    candidates = partition.candidates.expand(len(features), -1)
    chosen = partition.destinations.expand(len(features), -1).gather(1, nearest)
    reached = (units[everyone, candidates] * units[everyone, chosen]).sum(dim=-1)
    torch.testing.assert_close(reached, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "kind"),
    [(197, 64, "alternate"), (50, 72, "random"), (17, 384, "grid"), (17, 1100, "alternate"), (3, 64, "alternate")],
)
def test_redundancy_is_that_of_the_plain_path(tokens, width, kind, dtype):
    check_similarity(randn(2, tokens, width, dtype=dtype), split(tokens, kind=kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "destinations"), [(50, 1), (50, 48), (131, 65)])
def test_each_image_may_have_a_partition_of_its_own(tokens, destinations, dtype):
    check_similarity(randn(3, tokens, 72, dtype=dtype), own_split(3, tokens, destinations))


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_may_have_any_strides(dtype):
    partition = split(50)
    fused = randn(2, 50, 3 * 72, dtype=dtype)
    check_similarity(fused[:, :, 72:144], partition)
    check_similarity(fused.view(2, 50, 3, 72).transpose(1, 2).mean(dim=1), partition)
    check_similarity(randn(2, 72, 50, dtype=dtype).transpose(1, 2), partition)
    check_similarity(randn(50, 2, 72, dtype=dtype).transpose(0, 1), partition)
    check_similarity(randn(1, 50, 72, dtype=dtype).expand(2, -1, -1), partition)


def test_short_features_are_normalised_as_by_torch():
    features = randn(1, 17, 64)
    features[:, ::3] *= 1e-14
    features[:, 5] = 0
    partition = split(17)
    redundancy, _ = fused.most_similar(features, partition)
    torch.testing.assert_close(redundancy, mutual_redundancy(features, partition)[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize(("busy", "block"), [(1, 64), (4, 32), (1000, 16)])
@pytest.mark.parametrize("measured", [True, False], ids=["squares", "measured here"])
def test_programs_of_fewer_candidates_find_the_same(measured, busy, block, monkeypatch):
    similarity = sys.modules["turbovlm.ops.kernels.similarity"]
    monkeypatch.setattr(similarity, "BUSY", busy)
    assert similarity.candidates_at_a_time(2, 60) == block
    features = randn(2, 61, 48)
    squares = features.square().unflatten(2, (3, 16)).sum(dim=3).transpose(1, 2) if measured else None
    for kind in ("all", "random"):
        partition = partition_tokens(61, 1, kind, device=torch.device(DEVICE))
        found, expected = (
            fused.most_similar(features, partition, None, squares),
            plain.most_similar(features, partition),
        )
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=5e-6)
        assert torch.equal(found[1], expected[1])


def test_of_equally_similar_destinations_the_first_is_chosen():
    features = randn(1, 200, 64).sign()
    destinations = torch.arange(100, 200, device=DEVICE)
    features[:, 120:] = features[:, 100:180].clone()  # each again 20 columns on, and past the block of 64
    features[:, 0] = 0
    features[:, 1:21] = features[:, 100:120]
    redundancy, nearest = fused.most_similar(features, Partition(torch.arange(21, device=DEVICE), destinations))
    assert redundancy.tolist() == [[0.0] + [pytest.approx(1.0)] * 20]
    assert nearest.tolist() == [[0, *range(20)]]


def merged(batch, tokens, partition, r, *, sizes=None, order="partition", reduce="merge", seed=0, everyone_into=None):
    """The plain path's merge, with random choices, and what the kernel is told of it."""
    degree = randn(batch, partition.candidates.shape[-1], seed=seed + 1)
    if everyone_into is None:
        picks = torch.rand(degree.shape, generator=torch.Generator().manual_seed(seed + 2)).to(DEVICE)
        nearest = (picks * partition.destinations.shape[-1]).long()
    else:
        nearest = torch.full(degree.shape, everyone_into, device=DEVICE)
    ranking = Ranking(partition, tokens, degree, nearest, degree)
    merge, _ = merge_ranked(ranking, r, sizes=sizes, order=order, reduce=reduce, path=plain)
    dst = merge.kept.gather(1, merge.source.gather(1, merge.src))
    return merge, (sizes, merge.src, dst, slots_of(partition, tokens) if order == "partition" else None, reduce)


def slots_of(partition, tokens):
    """The place of each token among prefix, candidates and destinations, `[N]` or `[batch, N]`."""
    middle = torch.cat([partition.candidates, partition.destinations], dim=-1)
    prefix = torch.arange(tokens - middle.shape[-1], device=DEVICE).expand(*middle.shape[:-1], -1)
    return torch.cat([prefix, middle], dim=-1).argsort(dim=-1)


def check_merge(x, merge: Merge, told):
    """All outputs as on the plain path; y is the exact average rounded once."""
    y, rows, weights, merged_sizes, logs = kernels.merge_tokens(x, *told)
    torch.testing.assert_close(logs, plain.log_sizes(merge.sizes), rtol=1e-6, atol=1e-6)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, merge.rows)
    torch.testing.assert_close(weights, merge.weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(merged_sizes, merge.sizes, rtol=1e-6, atol=0)
    expected = merge.merge(x.double(), path=plain)
    assert y.dtype == x.dtype and y.shape == expected.shape and y.is_contiguous()
    truncates = DEVICE == "cpu" and x.dtype == torch.bfloat16  # only the interpreter does
    once = torch.finfo(x.dtype).eps / (1 if truncates else 2)
    torch.testing.assert_close(y.double(), expected, rtol=once + 1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["partition", "spatial"])
@pytest.mark.parametrize("reduce", ["merge", "keep_norm", "prune"])
@pytest.mark.parametrize("sized", [False, True], ids=["ones", "sizes"])
def test_the_merge_is_that_of_the_plain_path(order, reduce, sized, dtype):
    sizes = torch.randint(0, 5, (2, 50), generator=torch.Generator().manual_seed(3)).float().to(DEVICE)
    merge, told = merged(2, 50, split(50), 16, sizes=sizes if sized else None, order=order, reduce=reduce)
    check_merge(randn(2, 50, 72, dtype=dtype), merge, told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "r", "kind"),
    [
        (1, 197, 64, 98, "random"),
        (2, 17, 384, 1, "grid"),
        (2, 17, 384, 12, "grid"),
        (1, 17, 1100, 8, "alternate"),
        (1, 300, 20, 149, "alternate"),
        (3, 3, 64, 1, "alternate"),
    ],
)
@pytest.mark.parametrize("order", ["partition", "spatial"])
def test_the_merge_at_awkward_sizes(batch, tokens, width, r, kind, order):
    merge, told = merged(batch, tokens, split(tokens, kind=kind), r, order=order)
    check_merge(randn(batch, tokens, width), merge, told)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_candidates_may_go_into_one_destination(dtype):
    sizes = torch.rand(1, 300, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    merge, told = merged(1, 300, split(300), 149, sizes=sizes, everyone_into=7)
    check_merge(randn(1, 300, 24, dtype=dtype), merge, told)


def test_padding_weighs_nothing():
    sizes = torch.ones(2, 17, device=DEVICE)
    sizes[:, 5:] = 0
    merge, told = merged(2, 17, split(17), 8, sizes=sizes)
    check_merge(randn(2, 17, 64), merge, told)
    nothing = kernels.merge_tokens(randn(2, 17, 64), *told)[0][merge.sizes == 0]
    assert len(nothing) > 0 and not nothing.any()


@pytest.mark.parametrize("reduce", ["merge", "prune"])
def test_a_token_that_nothing_joined_is_bit_for_bit_itself(reduce):
    x = randn(2, 17, 64)
    merge, told = merged(2, 17, split(17), 3, order="spatial", reduce=reduce)
    out = kernels.merge_tokens(x, *told)[0]
    alone = (merge.sizes == 1) if reduce == "merge" else torch.ones_like(merge.sizes, dtype=torch.bool)
    own = x.gather(1, merge.kept.unsqueeze(-1).expand(-1, -1, 64))
    assert alone.sum() >= 2 * (17 - 2 * 3) and torch.equal(out[alone], own[alone])


@pytest.mark.parametrize("order", ["partition", "spatial"])
def test_nothing_disappears_with_r_0(order):
    merge, told = merged(2, 17, split(17), 0, order=order)
    check_merge(randn(2, 17, 64), merge, told)


def test_the_merge_takes_any_strides():
    sizes = torch.randint(1, 5, (1, 50), generator=torch.Generator().manual_seed(3)).float().to(DEVICE).expand(2, -1)
    merge, (_, src, dst, slots, reduce) = merged(2, 50, own_split(2, 50, 20), 16, sizes=sizes)
    wide = torch.stack([src, dst], dim=-1)
    apart = torch.stack([slots, slots], dim=-1)
    for x in (
        randn(2, 50, 3 * 72)[:, :, 72:144],
        randn(2, 72, 50).transpose(1, 2),
        randn(50, 2, 72).transpose(0, 1),
    ):
        check_merge(x, merge, (sizes, wide[..., 0], wide[..., 1], apart[..., 0], reduce))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["merge", "prune"])
def test_the_gradient_is_that_of_the_plain_path(reduce, dtype):
    sizes = torch.randint(0, 5, (2, 17), generator=torch.Generator().manual_seed(3)).float().to(DEVICE)
    merge, told = merged(2, 17, split(17), 6, sizes=sizes, reduce=reduce)
    x = randn(2, 17, 64, dtype=dtype).requires_grad_()
    y, _, weights, merged_sizes, _ = kernels.merge_tokens(x, *told)
    assert y.requires_grad and not weights.requires_grad and not merged_sizes.requires_grad
    grad = randn(*y.shape, seed=5, dtype=dtype)
    (found,) = torch.autograd.grad(y, x, grad)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(merge.merge(exact), exact, grad.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-7)


def test_gradients_of_means_that_keep_their_norm_take_the_plain_path():
    partition, x = split(17), randn(2, 17, 64)
    ranking = rank_candidates(x, partition, None, degree="redundancy", path=fused)
    how = {"order": "partition", "reduce": "keep_norm", "path": fused}
    _, on_kernels = merge_ranked(ranking, 6, x, **how)
    x.requires_grad_()
    merge, plain_merged = merge_ranked(ranking, 6, x, **how)
    torch.testing.assert_close(on_kernels, plain_merged.detach())
    (found,) = torch.autograd.grad(plain_merged.square().sum(), x)
    (expected,) = torch.autograd.grad(merge.merge(x, path=fused).square().sum(), x)
    torch.testing.assert_close(found, expected)
    with pytest.raises(NotImplementedError, match="keep_norm"):
        kernels.merge_tokens(x, *merged(2, 17, partition, 6, reduce="keep_norm")[1])


@pytest.mark.slow
def test_the_merge_keeps_to_its_contract():
    partition = split(17)
    sizes = torch.ones(2, 17, device=DEVICE)
    for order, reduce, known in (("partition", "merge", sizes), ("spatial", "prune", None)):
        _, told = merged(2, 17, partition, 6, sizes=known, order=order, reduce=reduce)
        torch.library.opcheck(kernels.merge_tokens.operator, (randn(2, 17, 64), *told))
        torch.library.opcheck(kernels.merge_tokens.operator, (randn(2, 17, 64).requires_grad_(), *told))


def of_all(x, partition):
    """What the guide's rows, similarity and the choice give, one after the other."""
    rows, squares = fused.attention_rows(x[:, None, :1], x[:, None], None)
    redundancy, nearest = fused.most_similar(x, partition, squares=squares)
    how = {"degree": "weighted_distance", "alpha": None, "seed": 0, "padding": None, "r": 5}
    redundancy_again, degree, chosen = fused.rank(redundancy, nearest, rows, partition, 0, **how)
    return rows, squares, redundancy, nearest, redundancy_again, degree, *chosen


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_outputs_look_like_real_ones(dtype):
    partition = split(17)
    _, told = merged(2, 17, partition, 6)
    x = randn(2, 17, 64, dtype=dtype)
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in (x, *told))
        both = Partition(mode.from_tensor(partition.candidates), mode.from_tensor(partition.destinations))
        fake = (*of_all(fakes[0], both), *kernels.merge_tokens(*fakes))
    real = (*of_all(x, partition), *kernels.merge_tokens(x, *told))
    assert len(fake) == len(real) == 13
    for one, other in zip(fake, real):
        assert (one.shape, one.dtype, one.stride(), one.device) == (
            other.shape,
            other.dtype,
            other.stride(),
            other.device,
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_block_compiles_into_one_graph(backend):
    partition = split(17)
    slots = slots_of(partition, 17)

    def block(x):
        redundancy, nearest = fused.most_similar(x.detach(), partition)
        chosen = redundancy.topk(5, dim=1).indices
        src, dst = partition.candidates[chosen], partition.destinations[nearest.gather(1, chosen)]
        y, rows, weights, *_ = kernels.merge_tokens(x * 2, None, src, dst, slots, "merge")
        return y.square(), rows, weights

    x = randn(2, 17, 64).requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    results = []
    for run in (block, compiled):
        y, rows, weights = run(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        results.append((y, rows, weights, grad))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected)


def every_split(tokens, destinations):
    """Halves as slices, as one table, and as a table of each image; all pairs."""
    return (
        partition_tokens(tokens, 1, "alternate"),
        split(tokens),
        own_split(2, tokens, destinations),
        partition_tokens(tokens, 1, "all"),
    )


@pytest.mark.parametrize("degree", ["redundancy", "weighted_difference", "weighted_distance"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 50, pytest.param(1900, marks=pytest.mark.slow)])
def test_degrees_are_those_of_the_plain_path(tokens, dtype, degree):
    rows = randn(2, 3, tokens, seed=1).softmax(dim=2)
    for partition in every_split(tokens, tokens // 2):
        count = partition.count()
        redundancy = randn(2, count, dtype=dtype).clamp(-1, 1)
        nearest = (torch.arange(count, device=DEVICE).expand(2, -1) + 1) % index_count(partition.destinations)
        how = {"degree": degree, "alpha": 0.7, "seed": 0, "padding": None, "r": None}
        expected = plain.rank(redundancy.double(), nearest, rows.double(), partition, 0, **how)
        found = fused.rank(redundancy, nearest, rows, partition, 0, **how)
        assert found[2] is None and found[0].dtype == found[1].dtype == torch.float32
        torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-6)
        alone = fused.rank(redundancy, nearest, rows.mean(dim=1), partition, 0, **how)
        torch.testing.assert_close(alone[1], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "r"), [(3, 1), (50, 0), (50, 16), (131, 65), pytest.param(1300, 400, marks=pytest.mark.slow)]
)
def test_those_of_highest_degree_are_chosen(tokens, r, dtype):
    for partition in every_split(tokens, tokens - 1 - max(r, 1))[:3]:
        degree = randn(2, partition.count(), dtype=dtype)
        degree[:, ::7] = degree[:, :1].clone()  # equals
        degree[1, -2:] = torch.inf
        nearest = torch.arange(degree.shape[1], device=DEVICE).expand(2, -1) % index_count(partition.destinations)
        src, dst = fused.choose(degree, nearest, partition, r)
        chosen = degree.argsort(dim=1, descending=True, stable=True)[:, :r].sort(dim=1).values
        candidates, destinations = (positions(half, src.device) for half in halves(partition))
        assert torch.equal(src, candidates.expand(2, -1).gather(1, chosen))
        assert torch.equal(dst, destinations.expand(2, -1).gather(1, nearest.gather(1, chosen)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [4, 50, 131, pytest.param(1300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_of_all_pairs_those_are_chosen_that_the_trees_choose(share, tokens, dtype):
    """From real similarities and from any; degrees that differ, so that the order of equals does not count."""
    partition = partition_tokens(tokens, 1, "all")
    count, r = tokens - 1, int(share * (tokens - 1))
    similar = fused.most_similar(randn(3, tokens, 8, dtype=dtype), partition)[1]
    anyone = torch.randint(1, count, (3, count), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for nearest in (similar, (torch.arange(count, device=DEVICE) + anyone) % count):
        degree = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(k)) for k in range(3)])
        degree = (degree / count - 1).to(DEVICE).to(dtype if tokens < 200 else torch.float32)
        src, dst = fused.choose(degree, nearest, partition, r)
        wanted, into = plain.choose(degree, nearest, partition, r)
        order = wanted.argsort(dim=1)
        assert torch.equal(src, wanted.gather(1, order)) and torch.equal(dst, into.gather(1, order))


def halves(partition):
    return partition.candidates, partition.destinations


def test_a_degree_that_is_no_number_goes_first_and_nobody_twice():
    partition = split(51)
    degree, nearest = randn(1, 25), torch.zeros(1, 25, dtype=torch.int64, device=DEVICE)
    degree[0, [3, 4, 20]] = torch.nan
    src, _ = fused.choose(degree, nearest, partition, 9)
    assert set(partition.candidates[[3, 4, 20]].tolist()) <= set(src[0].tolist()) and len(src.unique()) == 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_means_of_bags_are_those_of_the_plain_path(dtype):
    sizes = torch.randint(0, 5, (2, 50), generator=torch.Generator().manual_seed(3)).float().to(DEVICE)
    for reduce in ("merge", "keep_norm", "prune"):
        merge, _ = merged(2, 50, split(50), 16, sizes=sizes, order="spatial", reduce=reduce)
        for x in (randn(2, 50, 72, dtype=dtype), randn(2, 57, 72, dtype=dtype)[:, 7:]):
            expected = merge.merge(x.double())
            found = merge.merge(x, path=fused)
            assert found.dtype == dtype and found.shape == expected.shape
            roundings = 2 if reduce == "keep_norm" else 1
            bound = roundings * torch.finfo(dtype).eps
            torch.testing.assert_close(found.double(), expected, rtol=bound + 1e-6, atol=bound)
    torch.library.opcheck(kernels.mean_of_bags.operator, (randn(2, 50, 72), *merge.bags))


ATTENTION = [(50, 32), (17, 88), (1, 64)]
LARGER = [(197, 64), (129, 128), (300, 40), (65, 80), (33, 24)]
ATTENTION += [pytest.param(*size, marks=pytest.mark.slow) for size in LARGER]


def heads(tokens, head_dim, dtype):
    """Queries, keys and values as one projection gives them, and the bias of sizes, of which the last are padding."""
    q, k, v = randn(2, tokens, 3, 3, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    sizes = torch.randint(1, 9, (2, tokens), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    sizes[1, tokens - tokens // 4 :] = 0
    return q, k, v, size_bias(sizes, dtype)


@pytest.mark.parametrize("tokens, head_dim", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_attention_with_a_bias(tokens, head_dim, dtype):
    q, k, v, bias = heads(tokens, head_dim, dtype)
    out = kernels.biased_attention(q, k, v, bias, head_dim**-0.5)
    expected = plain.attend(q.double(), k.double(), v.double(), bias.double(), head_dim**-0.5)
    assert out.dtype == dtype and out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    few = kernels.biased_attention(q[:, :, : tokens // 2 + 1], k, v, bias, head_dim**-0.5)
    torch.testing.assert_close(few, out[:, :, : tokens // 2 + 1])


WIDTHS = [(40, 1), (48, 63), (64, 65), (72, 197), (80, 64), (88, 65), (96, 63), (112, 64), (128, 65)]
ENOUGH = [(72, 577), (128, 197), (80, 1), (64, 128)]
WIDTHS += [pytest.param(*size, marks=pytest.mark.slow) for size in ENOUGH]


@pytest.mark.parametrize("head_dim, tokens", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("busy", [True, False], ids=["programs of 128 queries", "of 64"])
def test_attention_with_a_bias_at_every_width(head_dim, tokens, dtype, busy, monkeypatch):
    """Heads in one part and in two; keys that fill their blocks and do not; fewer and more queries than keys."""
    monkeypatch.setattr(sys.modules["turbovlm.ops.kernels.attention"], "BUSY", 1 if busy else 1 << 20)
    _, k, v, bias = heads(tokens, head_dim, dtype)
    q = heads(tokens // 2 + 33, head_dim, dtype)[0]
    out = kernels.biased_attention(q, k, v, bias, head_dim**-0.5)
    expected = plain.attend(q.double(), k.double(), v.double(), bias.double(), head_dim**-0.5)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_heads_are_computed_in_the_fewest_channels_that_two_parts_allow():
    attention = sys.modules["turbovlm.ops.kernels.attention"]
    parts = {8: (16, 0), 24: (32, 0), 33: (32, 16), 40: (32, 16), 48: (32, 16), 49: (64, 0), 64: (64, 0), 65: (64, 16)}
    parts |= {72: (64, 16), 80: (64, 16), 81: (64, 32), 88: (64, 32), 96: (64, 32), 97: (128, 0), 128: (128, 0)}
    assert {head_dim: attention.head_parts(head_dim) for head_dim in parts} == parts


def test_many_queries_are_taken_128_at_a_time():
    tile_of = sys.modules["turbovlm.ops.kernels.attention"].tile_of
    assert [tile_of(batch, 16, 577, 72).queries for batch in (1, 3, 4, 64)] == [64, 64, 128, 128]
    assert [tile_of(64, 16, 577, head_dim).warps for head_dim in (64, 96, 112, 128)] == [4, 4, 8, 8]


@torch.no_grad()
def test_attention_is_launched_along_one_axis(monkeypatch):
    """The others end at 65,535 programs: 4,096 images of 16 heads are more."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(sys.modules["turbovlm.ops.kernels.attention"], "_biased_attention", Kernel())
    x = torch.empty(5000, 16, 50, 64, dtype=torch.float16, device="meta")
    kernels.biased_attention(x, x, x, torch.empty(5000, 1, 1, 50, device="meta"), 0.1)
    assert grids == [(5000 * 16,)]


def test_attention_takes_any_strides():
    """Channels apart in memory, images that share their keys, and rows that begin anywhere."""
    q, k, v, bias = (x.float() for x in heads(50, 40, torch.float16))
    apart = torch.stack([q, q], dim=-1).half()[..., 0]
    shared = k[:1].half().expand(2, -1, -1, -1)
    anywhere = torch.nn.functional.pad(v, (1, 2)).half()[..., 1:41]
    assert apart.stride(3) == 2 and shared.stride(0) == 0 and anywhere.stride(2) == 43
    out = kernels.biased_attention(apart, shared, anywhere, bias, 0.2)
    expected = plain.attend(q.double(), k[:1].double().expand(2, -1, -1, -1), v.double(), bias.double(), 0.2)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("tokens, head_dim", [*ATTENTION, (300, 32)])  # more tokens than one turn of the loop takes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", ["cls", "mean", "weighted mean"])
def test_attention_rows_of_a_guide(tokens, head_dim, dtype, guidance):
    q, k, v, bias = heads(tokens, head_dim, dtype)
    how = {"scale": head_dim**-0.5, "guides": (0, 1) if guidance == "cls" else (min(2, tokens - 1), tokens)}
    if guidance == "weighted mean":
        how["weights"] = torch.randint(1, 9, (2, tokens), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    for added, content in ((bias, None), (None, v)):
        rows, squares = fused.attention_rows(q, k, added, content=content, **how)
        weights = {name: value.double() for name, value in how.items() if name == "weights"}
        inputs = (q.double(), k.double(), None if added is None else added.double())
        expected, _ = plain.attention_rows(*inputs, **{**how, **weights})
        assert rows.dtype == squares.dtype == torch.float32 and rows.shape == squares.shape == k.shape[:3]
        torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-6)
        lengths = (k if content is None else content).double().square().sum(dim=-1)
        torch.testing.assert_close(squares.double(), lengths, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_operators_keep_to_their_contracts():
    q, k, v, bias = heads(17, 32, torch.float16)
    torch.library.opcheck(kernels.biased_attention.operator, (q, k, v, bias, 0.2))
    torch.library.opcheck(kernels.attention_rows.operator, (q, k, None, bias, None, [0, 1], 0.2))
    assert torch.compile(kernels.biased_attention, fullgraph=True, backend="eager")(q, k, v, bias, 0.2).shape == q.shape
    partition, squares = split(17), randn(2, 3, 17).square()
    both = partition.candidates, partition.destinations
    similar = (randn(2, 17, 8), squares, None, *both, [0, 0, 1], [8, 8, 1])
    torch.library.opcheck(kernels.most_similar.operator, similar)
    redundancy, nearest = kernels.most_similar(*similar)
    for degree in ("given", *kernels.RANKED):
        ranked = (redundancy, nearest, squares, *both, [0, 0, 1], degree, 0.7, False, 3)
        torch.library.opcheck(kernels.choose.operator, ranked)


@torch.no_grad()
def test_counters_see_the_operator_that_eager_calls_leave_out():
    q, k, v, bias = heads(17, 32, torch.float16)
    direct = kernels.biased_attention(q, k, v, bias, 0.2)
    with counting() as total:
        counted = kernels.biased_attention(q, k, v, bias, 0.2)
    assert total() == 2 * q.numel() * 17
    assert torch.equal(direct, counted)


def test_only_what_the_kernels_take_is_usable():
    assert kernels.usable(randn(1)) == (DEVICE == "cuda" and torch.version.hip is None)
    assert not kernels.usable(torch.zeros(1))
    assert not kernels.usable(randn(1, dtype=torch.float64))


def test_the_path_is_asked_of_the_device_and_the_dtype():
    assert dispatch.path_for(randn(1)) is (fused if kernels.usable(randn(1)) else host)
    assert dispatch.path_for(torch.zeros(1)) is dispatch.path_for(torch.zeros(1, dtype=torch.float64)) is host
    assert dispatch.path_for(torch.zeros(1, device="meta")) is plain
    assert dispatch.path_for(randn(1, dtype=torch.float64)) is (plain if DEVICE == "cuda" else host)
    with FakeTensorMode():
        assert dispatch.path_for(torch.zeros(1)) is plain
    seen = []
    torch.func.vmap(lambda x: seen.append(dispatch.path_for(x)) or x)(torch.zeros(2, 1))
    make_fx(lambda x: seen.append(dispatch.path_for(x)) or x)(torch.zeros(1))
    torch.jit.trace(lambda x: seen.append(dispatch.path_for(x)) or x + 1, torch.zeros(1), check_trace=False)
    assert seen == [plain] * 3


def test_a_handle_says_what_runs(monkeypatch):
    gpu, half = torch.device("cuda"), torch.bfloat16
    assert dispatch.path_told(CPU, half) == "PyTorch and NumPy"
    assert dispatch.path_told(torch.device("mps"), half) == "PyTorch: there are no kernels for mps"
    assert "take float32, float16, bfloat16" in dispatch.path_told(gpu, torch.float64)
    assert "has one in half precision" in dispatch.path_told(gpu, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "needs compute capability 8.0" in dispatch.path_told(gpu, half)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dispatch.path_told(gpu, half) == "Triton's kernels"
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert "need triton, which is not installed" in dispatch.path_told(gpu, half)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA's GPUs alone" in dispatch.path_told(gpu, half)
    model = torch.nn.Sequential(timm_vit())
    with turbovlm.apply(model, r=2) as handle:
        assert str(handle).endswith("merges run on cpu, float32, in eager mode: PyTorch and NumPy")
    assert "merges run" not in str(handle)


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=3, img_size=96, embed_dim=48).eval()


class Seen(TorchDispatchMode):
    """Names of the operators that run within it, but for views."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function).removesuffix(".default"))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_merge_of_any_two_patches_is_four_operators(monkeypatch):
    names = []

    def seen(function):
        def run(*args):
            with Seen(names):
                return function(*args)

        return run

    for name in ("guide_of", "_compared", "_merge"):
        monkeypatch.setattr(block, name, seen(getattr(block, name)))
    monkeypatch.setattr(block, "path_for", lambda x: fused)
    vit = timm_vit().to(DEVICE)
    with turbovlm.apply(vit, r=(0, 2, 2), partition="all"):
        vit(randn(2, 3, 96, 96))
    four = ["attention_rows", "most_similar", "choose", "merge_tokens"]
    assert names == [f"turbovlm.{name}" for name in four] * 2


@torch.no_grad()
@pytest.mark.parametrize("setting", [{}, {"degree": "redundancy"}, {"similarity": "hidden"}, {"reduce": "merge"}])
def test_in_eager_nothing_else_is_launched(setting, monkeypatch):
    """Without a mode that watches, the kernels are called themselves; the result is that of the plain path."""
    launched = []

    def counted(name):
        launch = getattr(kernels, name).eager
        return lambda *args: (launched.append(name), launch(*args))[1]

    for name in ("attention_rows", "most_similar", "choose", "merge_tokens"):
        monkeypatch.setattr(getattr(kernels, name), "eager", counted(name))
    vit, images = timm_vit().to(DEVICE), randn(2, 3, 96, 96)
    features = []
    for path in (fused, plain):
        monkeypatch.setattr(block, "path_for", lambda x, path=path: path)
        with turbovlm.apply(vit, r=(0, 2, 2), partition="all", **setting):
            features.append(vit(images))
    by_redundancy = setting.get("degree") == "redundancy"
    once = ["attention_rows"] * (not by_redundancy) + ["most_similar", "choose", "merge_tokens"]
    assert launched == once * 2
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_takes_no_bias_before_the_first_merge(monkeypatch):
    """Where each token is one patch, PyTorch's own attention runs; blocks behind the first merge take the kernel."""
    ran, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, **how):
        ran.append("SDPA" if attn_mask is None else "masked")
        return sdpa(q, k, v, attn_mask=attn_mask, **how)

    def kernel(q, k, v, bias, scale):
        ran.append("kernel")
        return sdpa(q, k, v, attn_mask=bias, scale=scale)

    monkeypatch.setattr(block, "path_for", lambda x: fused)
    monkeypatch.setattr(kernels, "attends", lambda q, k, v: True)
    monkeypatch.setattr(kernels, "biased_attention", kernel)
    vit = timm_vit().to(DEVICE)
    with turbovlm.apply(vit, r=(0, 2, 2)):
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        vit(randn(2, 3, 96, 96))
    assert ran == ["SDPA", "SDPA", "kernel"]


def test_both_paths_have_the_same_functions():
    for name in set(fused.__all__) - {"usable", "at_once"}:
        for path in (fused, host):
            assert inspect.signature(getattr(path, name)) == inspect.signature(getattr(plain, name)), name


def test_what_the_kernels_lack_takes_the_plain_path(monkeypatch):
    """Nothing to launch for them: with kernels that fail, each gives what the plain path does."""
    for name in ("attention_rows", "biased_attention", "most_similar", "choose", "mean_of_bags"):
        monkeypatch.setattr(kernels, name, None)
    q, k, v = (randn(2, 3, 17, 16, seed=seed).requires_grad_() for seed in range(3))
    bias = size_bias(torch.ones(2, 17, device=DEVICE), q.dtype)
    for path_q, added in ((q, bias), (q.detach().double(), bias.double()), (q.detach(), None)):
        inputs = (path_q, k.to(path_q), v.to(path_q), added, 0.25)
        torch.testing.assert_close(fused.attend(*inputs), plain.attend(*inputs), rtol=0, atol=0)
    rows, expected = (path.attention_rows(q, k, bias)[0] for path in (fused, plain))
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)
    partition, one = split(17), torch.ones(1, dtype=torch.int64, device=DEVICE)
    alone = fused.most_similar(randn(2, 2, 8), Partition(one, one[:0]))
    assert alone[0].tolist() == [[-1.0]] * 2 and alone[1].tolist() == [[0]] * 2
    redundancy, semantic = randn(2, 8), randn(2, 17).softmax(dim=1)
    nearest = torch.zeros(2, 8, dtype=torch.int64, device=DEVICE)
    for degree, padding in (
        ("damped", None),
        (lambda R, A, index: R * A, None),
        ("weighted_distance", torch.arange(17, device=DEVICE).expand(2, -1) > 11),
    ):
        how = {"degree": degree, "alpha": None, "seed": 0, "padding": padding, "r": None}
        found, expected = (path.rank(redundancy, nearest, semantic, partition, 0, **how) for path in (fused, plain))
        assert torch.equal(found[1], expected[1])
    found, expected = (path.choose(redundancy.double(), nearest, partition, 3) for path in (fused, plain))
    assert all(map(torch.equal, found, expected))
    monkeypatch.setattr(kernels, "MOST_RANKED", 7)
    found, expected = (path.choose(redundancy, nearest, partition, 3) for path in (fused, plain))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("capable", [True, False])
def test_the_attention_kernel_takes_half_precision_and_heads_of_128(capable, monkeypatch):
    attention = sys.modules["turbovlm.ops.kernels.attention"]
    monkeypatch.setattr(attention, "usable", lambda x: True)
    monkeypatch.setattr(attention, "_is_capable", lambda device: capable)
    for dtype in DTYPES:
        x = randn(1, 2, 5, 128, dtype=dtype)
        assert kernels.attends(x, x, x) == (capable and dtype != torch.float32)
    half, wide = randn(1, 2, 5, 64, dtype=torch.float16), randn(1, 2, 5, 129, dtype=torch.float16)
    assert not kernels.attends(wide, wide, wide)
    assert not kernels.attends(half, half, half.bfloat16()) and not kernels.attends(half, half, half[..., :32])


def test_attention_with_sizes_is_the_kernel_unless_dropout_is_wanted(monkeypatch):
    ran = []
    monkeypatch.setattr(kernels, "attends", lambda q, k, v: True)
    monkeypatch.setattr(kernels, "biased_attention", lambda *inputs: ran.append("kernel"))
    monkeypatch.setattr(plain, "attend", lambda *inputs: ran.append("plain"))
    q, bias = randn(2, 3, 17, 16), size_bias(torch.ones(2, 17, device=DEVICE), torch.float32)
    fused.attend(q, q, q, bias, 0.25)
    fused.attend(q, q, q, bias, 0.25, 0.1)
    fused.attend(q, q, q, None, 0.25)
    assert ran == ["kernel", "plain", "plain"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_them_compile_for_gpus_that_are_not_there():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, Path(__file__).with_name("compiled_kernels.py"), "--few"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    names = ["attention_rows", "biased_attention", "choose", "mean_of_bags", "merge_tokens", "most_similar"]
    names += ["merge_books", "linear_maps", "restore", "take_in_turn"]
    assert compiled == {f"_{name}" for name in names} and "sm_80" in done.stdout and "sm_90" in done.stdout
    shared = [int(size) for size in re.findall(r"(\d+) bytes shared", done.stdout)]
    assert max(shared) <= 99 * 1024, "more than small GPUs have"
    attention = re.findall(r"_biased_attention sm_90.*instructions, (\d+) on the stack", done.stdout)
    assert len(attention) >= 4 and set(attention) == {"0"}


@pytest.mark.slow
def test_the_module_can_be_imported_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from turbovlm.ops import kernels; "
        "assert not kernels.HAS_TRITON and not kernels.usable(torch.zeros(1))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"partition": "alternate", "order": "partition"},
        {"partition": "grid"},
        {"similarity": "hidden", "reduce": "prune"},
    ],
    ids=["default", "published", "grid", "hidden and prune"],
)
@torch.no_grad()
def test_an_encoder_on_the_kernels_is_the_encoder_on_the_plain_path(setting, monkeypatch):
    torch.manual_seed(0)
    vit, images, asked = timm_vit().to(DEVICE), randn(2, 3, 96, 96), []

    def run(path):
        monkeypatch.setattr(block, "path_for", lambda x: (asked.append(x), path)[1])
        return vit.forward_features(images), handle.trace

    with turbovlm.apply(vit, r=6, trace=True, **setting) as handle:
        expected, expected_trace = run(plain)
        found, found_trace = run(fused)
    assert len(asked) == 2 * 3, "each block asks once"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for a, b in zip(expected_trace, found_trace):
        assert torch.equal(a.source, b.source) and torch.equal(a.sizes, b.sizes)
