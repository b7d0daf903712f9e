"""The bias of sizes goes through the kernel where there is one, and through PyTorch's attention elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from denoisers import DENOISERS

pytest.importorskip("triton")

import turbovlm
from turbovlm.diffusion import biasing
from turbovlm.ops import kernels
from turbovlm.ops.tracing import wants_gradient


class Interpreted:
    """The kernels as if this device had them; in the interpreter they take float32, too."""

    def __init__(self, *dtypes):
        self.dtypes, self.calls = dtypes, 0

    def attends(self, q, k, v):
        return q.dtype in self.dtypes and q.shape[-1] <= 128

    def biased_attention(self, *args):
        self.calls += 1
        return kernels.biased_attention(*args)


@pytest.fixture
def interpreted(monkeypatch):
    found = Interpreted(torch.bfloat16)
    monkeypatch.setattr(biasing, "kernels_for", lambda x, *rest: None if wants_gradient(*rest) else found)
    return found


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_merged_self_attention_runs_on_the_kernel(name, monkeypatch):
    denoiser = DENOISERS[name]
    model, given, found = denoiser().eval(), denoiser.inputs(2, 16, 16), Interpreted(torch.float32)
    with turbovlm.apply(model, keep=0.5, restore="copy"), torch.no_grad():
        plain = model(**given)[0]
        monkeypatch.setattr(biasing, "kernels_for", lambda x, *differentiated: found)
        fused = model(**given)[0]
    assert found.calls > 0
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_what_the_kernel_does_not_take_is_left_to_pytorch(interpreted):
    q, k, v = torch.randn(3, 2, 4, 10, 16)
    halves = [t.bfloat16() for t in (q, k, v)]
    bias = torch.randn(2, 1, 1, 10)
    square = torch.randn(2, 1, 10, 10).bfloat16()
    with biasing.biased_attention_on(q):
        for tensors, mask in (((q, k, v), bias), (halves, None), (halves, square), (halves, bias > 0)):
            expected = scaled_dot_product_attention(*tensors, attn_mask=mask)
            assert torch.equal(scaled_dot_product_attention(*tensors, mask), expected)
        assert interpreted.calls == 0
        masks = [bias.bfloat16(), bias[:1].bfloat16(), torch.randn(2, 4, 1, 10).bfloat16()]
        outs = [scaled_dot_product_attention(*halves, attn_mask=mask, scale=0.2) for mask in masks]
        assert interpreted.calls == 3
    for mask, out in zip(masks, outs):
        expected = scaled_dot_product_attention(*halves, attn_mask=mask, scale=0.2)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.005)
    assert interpreted.calls == 3


def test_gradients_go_through_pytorch(interpreted):
    q, k, v = torch.randn(3, 2, 4, 10, 16).bfloat16().requires_grad_()
    with biasing.biased_attention_on(q):
        scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(2, 1, 1, 10).bfloat16()).sum().backward()
    assert interpreted.calls == 0
