"""Triton's kernels of denoisers (books, what is restored) against the plain path: compiled, or interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("diffusers")

import turbovlm
from denoisers import DENOISERS
from turbovlm.diffusion import denoiser, rank
from turbovlm.ops import fused, kernels, plain, restoring
from turbovlm.ops.kernels.common import Kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def drawn(batch, tokens, r, destinations):
    """Sources and destinations, distinct, of which `destinations` are used."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    into = torch.randint(0, destinations, (batch, r), generator=generator)
    return order[:, :r].to(DEVICE), order[:, r:].gather(1, into).to(DEVICE)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "r", "destinations"), [(2, 70, 30, 9), (1, 300, 200, 50), (2, 64, 1, 1)])
def test_the_books_are_those_of_the_plain_path(batch, tokens, r, destinations, prune):
    src, dst = drawn(batch, tokens, r, destinations)
    how = src, dst, tokens, torch.float32, None, None, "prune" if prune else "merge"
    rows, weights, sizes, bags = fused.merge_books(*how)
    expected = plain.merge_books(*how)
    assert torch.equal(rows, expected[0]) and torch.equal(sizes, expected[2])
    torch.testing.assert_close(weights, expected[1])
    bag, starts, shares = bags
    assert torch.equal(starts, expected[3][1]) and torch.equal(bag.sort().values, torch.arange(len(bag)).to(bag))
    assert torch.equal(rows[bag].sort().values, rows[bag]), "each bag has its own tokens"
    torch.testing.assert_close(shares, weights.flatten()[bag])


def test_the_books_of_many_tokens_are_the_plain_path_s(monkeypatch):
    src, dst = drawn(2, 70, 30, 9)
    how = src, dst, 70, torch.float32, None, None, "merge"
    monkeypatch.setattr("turbovlm.ops.kernels.books.MOST_BOOKED", 69)
    found, expected = fused.merge_books(*how), plain.merge_books(*how)
    assert all(map(torch.equal, (*found[:3], *found[3]), (*expected[:3], *expected[3])))


def operands(dtype, batch=2, tokens=37, left=21, width=72, out_width=72):
    x = randn(batch, tokens + 3, width, dtype=dtype)[:, 3:] + 2
    merged, out = randn(batch, left, width, seed=1, dtype=dtype) + 2, randn(batch, left, out_width, seed=2, dtype=dtype)
    rows = torch.randint(0, left, (batch, tokens), generator=torch.Generator().manual_seed(3))
    rows[:, :left] = torch.arange(left)
    x[:, :left] = merged  # tokens that nothing joined
    return x, merged, out, (rows + left * torch.arange(batch).unsqueeze(1)).flatten().to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("update", "out_width", "samples"), [(True, 72, 0), (True, 72, 1), (True, 72, 20), (False, 40, 17), (False, 72, 0)]
)
def test_what_is_restored_is_that_of_the_plain_path(update, out_width, samples, dtype):
    x, merged, out, rows = operands(dtype, out_width=out_width)
    found = fused.restore(x, merged, out, rows, update, samples)
    expected = restoring.restore(x.double(), merged.double(), out.double(), rows, update, samples)
    bound = 2 * torch.finfo(dtype).eps + 1e-5
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=4 * bound)
    assert torch.equal(found[:, :21], out), "a token that nothing joined gets its result, bit for bit"


def test_an_update_has_the_dtype_of_the_sum():
    x, merged, out, rows = operands(torch.float32)
    assert fused.restore(x, merged, out.bfloat16(), rows, True, 20).dtype == torch.float32
    assert fused.restore(x, merged, out.bfloat16(), rows, False, 20).dtype == torch.bfloat16


def test_equal_tokens_are_restored():
    x, merged, _, rows = operands(torch.float32)
    same = torch.ones_like(x), torch.ones_like(merged)
    torch.testing.assert_close(fused.restore(*same, 2 * same[1], rows, True, 20), 2 * same[0])


def test_gradients_and_float64_take_the_plain_path(monkeypatch):
    monkeypatch.setattr(kernels, "restore", None)
    for dtype, wanted in ((torch.float64, False), (torch.float32, True)):
        x, merged, out, rows = operands(dtype)
        out.requires_grad_(wanted)
        found = fused.restore(x, merged, out, rows, True, 20)
        assert found.dtype == dtype and found.requires_grad == wanted


def test_the_operators_keep_to_their_contracts():
    x, merged, out, rows = operands(torch.float32, batch=1, tokens=17, left=9, width=16, out_width=16)
    for update, samples in ((True, 8), (False, 0)):
        torch.library.opcheck(kernels.restore.operator, (x, merged, out, rows, update, samples, 0.3))
    src, dst = drawn(1, 17, 8, 3)
    torch.library.opcheck(kernels.merge_books.operator, (src, dst, 17, False))


@torch.no_grad()
@pytest.mark.parametrize(("name", "scope"), [("flux", "stack"), ("pixart", "part")])
def test_a_denoiser_on_the_kernels_is_that_on_the_plain_path(name, scope, monkeypatch):
    model, inputs = DENOISERS[name]().to(DEVICE), DENOISERS[name].inputs(1, 16, 16)
    outputs, launched = [], []
    launch = Kernel.__getitem__
    monkeypatch.setattr(
        Kernel, "__getitem__", lambda self, grid: launched.append(self.kernel.fn.__name__) or launch(self, grid)
    )
    for path in (fused, plain):
        monkeypatch.setattr(denoiser, "path_for", lambda x, path=path: path)
        monkeypatch.setattr(rank, "path_for", lambda x, path=path: path)
        with turbovlm.apply(model, keep=0.5, scope=scope, restore="linear"):
            outputs.append(model(**inputs, return_dict=False)[0])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    assert {"_most_similar", "_choose", "_merge_books", "_mean_of_bags", "_linear_maps", "_restore"} == set(launched)
