"""The kernel of greedy choices against PyTorch's steps: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

pytest.importorskip("triton")

from turbovlm.ops import kernels  # noqa: E402
from turbovlm.ops.greedy import LAST, RIDGE, STATES, TIE, take_in_turn  # noqa: E402


@pytest.mark.parametrize("by", STATES)
@pytest.mark.parametrize(("until", "fewest"), [(None, 1), (0.4, 3)])
def test_takes_what_pytorch_takes(by, until, fewest):
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(3, 40, 24, generator=generator) + 0.5, dim=-1)
    x[2, 34:] = 0  # padding
    log_weights = torch.randn(3, 40, generator=generator) * 0.5 * (by != "diversity")
    sizes = torch.randint(1, 4, (3, 40), generator=generator).float()
    sizes[2, 34:] = 0
    cosines = x @ x.transpose(1, 2)
    wanted = take_in_turn(cosines, log_weights, sizes, 12, by, until, fewest)
    inputs = [each.to(DEVICE) for each in (cosines, log_weights.masked_fill(sizes <= 0, LAST), sizes)]
    state = STATES[by](inputs[0], inputs[2], 12)
    found = kernels.take_in_turn(*inputs, state.value, 12, by, until, fewest, state.least or 0.0, TIE, RIDGE)
    order, nearest, counts = (each.cpu() for each in found)
    assert torch.equal(counts, wanted[2])
    for image, count in enumerate(counts.tolist()):
        assert torch.equal(order[image, :count], wanted[0][image, :count])
    assert torch.equal(nearest, wanted[1])


@pytest.mark.parametrize("by", STATES)
def test_of_equal_tokens_takes_the_first(by):
    cosines = torch.block_diag(*[torch.ones(3, 3)] * 4).unsqueeze(0).to(DEVICE)
    state, even = STATES[by](cosines, cosines.new_ones(1, 12), 4), cosines.new_zeros(1, 12)
    order, *_ = kernels.take_in_turn(
        cosines, even, even + 1, state.value, 4, by, None, 1, state.least or 0.0, TIE, RIDGE
    )
    assert order[0].tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize("by", STATES)
def test_of_copies_but_for_rounding_takes_the_first(by):
    generator, found = torch.Generator().manual_seed(0), []
    of = torch.randint(0, 16, (48,), generator=generator)
    x, log_weights = torch.randn(16, 32, generator=generator)[of] + 0.5, torch.randn(1, 16, generator=generator)[:, of]
    log_weights = log_weights.to(DEVICE) * (by != "diversity")
    sizes = torch.ones_like(log_weights)
    for noise in (0.0, 1e-6):
        y = F.normalize(x + noise * torch.randn(x.shape, generator=generator), dim=-1).to(DEVICE)
        cosines = (y @ y.T).unsqueeze(0)
        state = STATES[by](cosines, sizes, 32)
        steps = (32, by, None, 1, state.least or 0.0, TIE, RIDGE)
        found.append(kernels.take_in_turn(cosines, log_weights, sizes, state.value, *steps)[0].cpu())
        found.append(take_in_turn(cosines.cpu(), log_weights.cpu(), sizes.cpu(), 32, by, None, 1)[0])
    assert all(torch.equal(order, found[0]) for order in found)
    assert len({*found[0][0].tolist()}) == 32
