"""Every fast path against `reference.py`: stored scores, Triton's kernels, compiled and exported encoders.

The kernels run on the GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn as nn

import reference
from reference_encoders import Chosen, Timm, check, expected, images, run, vit, windows_of
from turbovlm.encoder import block
from turbovlm.ops import fused, kernels, partition_tokens, plain, proportional_attention, size_bias
from turbovlm.ops.merging import merge_ranked, rank_candidates
from turbovlm.ops.partition import Partition

TOKENS, PREFIX, HEADS = 41, 2, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def randn(*shape, seed=0, dtype=torch.float32):
    """Numbers that are the same in `dtype` and in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def heads(dtype, head_dim=16):
    q, k, v = randn(2, TOKENS, 3, HEADS, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    sizes = torch.randint(1, 9, (2, TOKENS), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    sizes[1, -7:] = 0
    return q, k, v, sizes


def exact_attention(q, k, v, sizes, scale):
    """Of every image, by the reference."""
    parts = [part.double().cpu() for part in (q, k, v, sizes)]
    return torch.stack([reference.attention(*image, scale) for image in zip(*parts)])


def check_attention(found, dtype, *inputs):
    assert found.dtype == dtype
    torch.testing.assert_close(found.double().cpu(), exact_attention(*inputs), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_stored_scores(dtype):
    q, k, v, sizes = heads(dtype)
    check_attention(plain.stored_attention(q, k, v, size_bias(sizes, dtype), 0.3), dtype, q, k, v, sizes, 0.3)
    ones = torch.ones_like(sizes)
    check_attention(plain.stored_attention(q, k, v, None, 0.3), dtype, q, k, v, ones, 0.3)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_however_products_are_made(fast, monkeypatch):
    monkeypatch.setattr(plain, "FAST_BFLOAT16_PRODUCTS", fast)
    q, k, v, sizes = heads(torch.bfloat16)
    check_attention(proportional_attention(q, k, v, sizes), torch.bfloat16, q, k, v, sizes, 0.25)


triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="no Triton")


@triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_attention_kernel(dtype):
    q, k, v, sizes = heads(dtype)
    found = kernels.biased_attention(q, k, v, size_bias(sizes, dtype), 0.3)
    check_attention(found, dtype, q, k, v, sizes, 0.3)


@triton
def test_the_kernel_of_the_guides_row():
    q, k, _, sizes = heads(torch.float32)
    rows = fused.attention_rows(q, k, size_bias(sizes, torch.float32), scale=0.3)[0].mean(dim=1).cpu()
    for b in range(2):
        q_b, k_b, s = (part[b].double().cpu() for part in (q, k, sizes))
        wanted = reference.semantic_value(reference.guide_of(q_b, s, PREFIX, "cls"), k_b, s, 0.3)
        torch.testing.assert_close(rows[b].double(), wanted, rtol=0, atol=1e-6)


@triton
@pytest.mark.parametrize("kind", ["alternate", "random"])
@pytest.mark.parametrize("order", ["partition", "spatial"])
@pytest.mark.parametrize("reduce", ["merge", "keep_norm", "prune"])
def test_the_kernels_of_one_merge(kind, order, reduce):
    """Most similar partners, degrees, the choice, and the merge, one after the other."""
    r, alpha = 11, 0.7
    x, features = randn(2, TOKENS, 24, seed=2), randn(2, TOKENS, 48, seed=3)
    A = randn(2, TOKENS, seed=4).softmax(dim=1)
    sizes = torch.randint(1, 6, (2, TOKENS), generator=torch.Generator().manual_seed(5)).float().to(DEVICE)
    windows = windows_of(TOKENS, PREFIX, kind)
    candidates, partners = (torch.tensor(half, device=DEVICE) for half in windows[0])
    partition = Partition(candidates, partners)
    redundancy, partner = fused.most_similar(features, partition)
    how = {"degree": "weighted_distance", "alpha": alpha, "seed": 0, "padding": None, "r": r}
    _, degree, (gone, into) = fused.rank(redundancy, partner, A, partition, 0, **how)
    slots = None
    if order == "partition":
        slots = torch.cat([torch.arange(PREFIX, device=DEVICE), candidates, partners]).argsort()
    merged, rows, _, merged_sizes, _ = kernels.merge_tokens(x, sizes, gone, into, slots, reduce)
    for b in range(2):
        R, nearest = reference.mutual_redundancy(features[b].double().cpu(), windows)
        s = sizes[b].double().cpu()
        E = reference.DEGREES["weighted_distance"](torch.stack(list(R.values())), A[b, list(R)].double().cpu(), alpha)
        best = [list(R)[i] for i in E.argsort(descending=True)[:r]]
        _, tokens, left, source = reference.merge(
            x[b].double().cpu(), s, {i: nearest[i] for i in best}, windows, order, reduce
        )
        torch.testing.assert_close(redundancy[b].double().cpu(), torch.stack(list(R.values())), rtol=0, atol=5e-6)
        torch.testing.assert_close(degree[b].double().cpu(), E, rtol=1e-5, atol=1e-5)
        assert sorted(gone[b].tolist()) == sorted(best)
        assert torch.equal(rows.view(2, TOKENS)[b].cpu() - b * (TOKENS - r), source)
        torch.testing.assert_close(merged_sizes[b].double().cpu(), left, rtol=1e-6, atol=0)
        torch.testing.assert_close(merged[b].double().cpu(), tokens, rtol=1e-5, atol=1e-5)


@pytest.fixture
def everything_on_the_kernels(monkeypatch):
    """As on a GPU, in every block of an encoder; all that ran on kernels, by name."""
    launched = []
    for name in ("attention_rows", "most_similar", "choose", "merge_tokens"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *args, name=name, kernel=kernel: (launched.append(name), kernel(*args))[1]
        )
    monkeypatch.setattr(block, "path_for", lambda x: fused)
    monkeypatch.setattr(kernels, "attends", lambda q, k, v: False)  # which float32 never is
    return launched


@triton
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"partition": "alternate", "order": "partition", "degree": "weighted_difference", "reduce": "merge"},
        {"similarity": "hidden", "reduce": "prune", "restore": "residual"},
        {"similarity": "queries", "guidance": "mean", "proportional": False},
    ],
    ids=["default", "published", "hidden and pruned", "queries and mean"],
)
def test_an_encoder_on_the_kernels(settings, everything_on_the_kernels):
    """In float32, against the reference of what goes into its first block."""
    exact, chosen = vit(2, 1, True), Chosen(r=(6, 5, 4), **settings)
    single = Timm(copy.deepcopy(exact.model).to(DEVICE, torch.float32))
    entered, trace, left = run(single, {"x": images(2, 6, 6, 0).to(DEVICE, torch.float32)}, chosen)
    for kernel in ("attention_rows", "most_similar", "choose", "merge_tokens"):
        assert everything_on_the_kernels.count(kernel) == 3
    for b, x in enumerate(entered.cpu().double()):
        with torch.no_grad():
            wanted = expected(exact, x, torch.ones(len(x)).double(), chosen)
        for entry, source in zip(trace, wanted.sources):
            assert torch.equal(entry.source[b].cpu(), source)
        for out, tokens in zip(left, wanted.outputs):
            torch.testing.assert_close(out[b].double().cpu(), tokens, rtol=0, atol=1e-4)


class Features(nn.Module):
    """What the last block hands on, normed."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model.forward_features(pixels)


def programs(features, pixels):
    """The encoder compiled and exported, by name."""
    torch._dynamo.reset()
    yield "compiled", torch.compile(features, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    yield "exported", torch.export.export(features, (pixels,)).module()


@torch.no_grad()
def test_compiled_and_exported():
    family, chosen, pixels = vit(2, 1, True), Chosen(r=(6, 5, 4), degree="weighted_difference"), images(2, 6, 6, 0)
    check(family, {"x": pixels}, chosen)
    entered = []
    hook = family.blocks[0].register_forward_pre_hook(lambda m, args: entered.append(args[0].clone()))
    family.model(pixels)
    hook.remove()
    ones = torch.ones(37).double()
    wanted = torch.stack([family.model.norm(expected(family, x, ones, chosen).outputs[-1]) for x in entered[0]])
    with chosen.apply(family.model, trace=False):
        for name, program in programs(Features(family.model), pixels):
            for _ in range(2):
                torch.testing.assert_close(program(pixels), wanted, rtol=0, atol=1e-10, msg=name)


@triton
@pytest.mark.parametrize("windows", [1, 3])
def test_the_kernel_of_all_pairs(windows):
    """Nobody is its own most similar one, and the path of kernels merges what the plain one does."""
    features, A = randn(2, TOKENS, 48, seed=6), randn(2, TOKENS, seed=7).softmax(dim=1)
    split = dataclasses.replace(partition_tokens(TOKENS, PREFIX, "all"), windows=windows)
    rankings = [rank_candidates(features, split, A, degree="weighted_distance", path=path) for path in (plain, fused)]
    for name in ("redundancy", "degree"):
        torch.testing.assert_close(*(getattr(each, name) for each in rankings), rtol=0, atol=1e-5)
    assert torch.equal(rankings[0].nearest, rankings[1].nearest)
    assert bool((rankings[0].nearest != torch.arange(TOKENS - PREFIX, device=DEVICE)).all())
    merges = [
        merge_ranked(ranking, 11, order="spatial", reduce="keep_norm", path=path)[0]
        for ranking, path in zip(rankings, (plain, fused))
    ]
    assert torch.equal(merges[0].source, merges[1].source)
