"""Every way of attending gives the same result, and the fastest is chosen where it may be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import turbovlm
from turbovlm import TurboConfig
from turbovlm.ops import fused, plain, size_bias
from turbovlm.profile import macs


def masked_attention(q, k, v, bias, scale):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


ROUTES = [masked_attention, plain.stored_attention]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 4e-2}


def heads(tokens=50, head_dim=16, dtype=torch.float32, seed=0):
    """Queries, keys and values as one projection gives them."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(2, tokens, 3, 3, head_dim, generator=generator).to(dtype)
    return flat.permute(2, 0, 3, 1, 4).unbind(0)


def with_padding(tokens=50):
    sizes = torch.randint(1, 9, (2, tokens), generator=torch.Generator().manual_seed(1)).float()
    sizes[1, -7:] = 0
    return sizes


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
@pytest.mark.parametrize("biased", [True, False])
def test_all_routes_lead_to_one_result(route, dtype, biased):
    q, k, v = heads(dtype=dtype)
    bias = size_bias(with_padding(), dtype) if biased else None
    exact_bias = None if bias is None else bias.double()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=exact_bias, scale=0.3)
    attended = route(q, k, v, bias, 0.3)
    assert attended.dtype == dtype
    torch.testing.assert_close(attended.double(), exact, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_padding_is_attended_by_nobody(route):
    q, k, v = heads()
    bias = size_bias(with_padding(), q.dtype)
    attended = route(q[1:], k[1:], v[1:], bias[1:], 0.25)
    torch.testing.assert_close(attended, route(q[1:], k[1:, :, :-7], v[1:, :, :-7], bias[1:, ..., :-7], 0.25))


@pytest.mark.parametrize("limit", [1, 60, 50 * 50, 2 * 50 * 50, 1 << 20])
def test_stored_gives_the_same_however_little_it_holds(limit, monkeypatch):
    q, k, v = heads(head_dim=64)
    bias = size_bias(with_padding(), q.dtype)
    monkeypatch.setattr(plain, "STORED_SCORES", limit)
    torch.testing.assert_close(plain.stored_attention(q, k, v, bias, 0.25), masked_attention(q, k, v, bias, 0.25))
    torch.testing.assert_close(plain.stored_attention(q, k, v, None, 0.25), masked_attention(q, k, v, None, 0.25))


def test_stored_never_holds_more_scores_than_its_limit(monkeypatch):
    held = []
    product = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: held.append(product(*a, **k)) or held[-1])
    monkeypatch.setattr(plain, "STORED_SCORES", 600)
    q, k, v = heads()
    plain.stored_attention(q, k, v, size_bias(with_padding(), q.dtype), 0.25)
    assert held and max(scores.numel() for scores in held) <= 600


def test_stored_is_a_proper_operator():
    q, k, v = heads()
    torch.library.opcheck(plain.stored_attention_operator, (q, k, v, size_bias(with_padding(), q.dtype), 0.25))
    torch.library.opcheck(plain.stored_attention_operator, (q, k, v, None, 0.25))


def test_stored_is_counted_as_attention_is():
    class Attention(torch.nn.Module):
        def __init__(self, route):
            super().__init__()
            self.route = route

        def forward(self, q, k, v):
            return self.route(q, k, v, None, 0.25)

    q, k, v = heads()
    for attend in ROUTES:
        assert macs(Attention(attend), q, k, v) == 2 * 2 * 3 * 50 * 50 * 16


@pytest.fixture
def fast_products(monkeypatch):
    monkeypatch.setattr(plain, "FAST_BFLOAT16_PRODUCTS", True)


def test_the_fastest_by_dtype_and_gradient(fast_products, monkeypatch):
    stored = []
    monkeypatch.setattr(plain, "stored_attention", lambda q, *rest: stored.append(q) or q)

    def stores(q, k, v, dropout_p=0.0):
        """Whether attention takes plain products, on either path."""
        for attend in (plain.attend, fused.attend):
            stored.clear()
            attend(q, k, v, None, 0.25, dropout_p)
            yield bool(stored)

    low = heads(dtype=torch.bfloat16)
    assert all(stores(*low))
    assert not any(stores(*low, dropout_p=0.1))
    assert not any(stores(*heads()))
    assert not any(stores(*heads(dtype=torch.float16)))
    assert not any(stores(*(t.to("meta") for t in low)))
    differentiable = [t.clone().requires_grad_() for t in low]
    assert not any(stores(*differentiable))
    with torch.no_grad():
        assert all(stores(*differentiable))
    monkeypatch.setattr(plain, "FAST_BFLOAT16_PRODUCTS", False)
    assert not any(stores(*low))


@pytest.fixture
def vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    settings = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0}
    return timm.models.VisionTransformer(**settings).eval()


def test_an_encoder_in_bf16_on_plain_products(vit, monkeypatch):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with turbovlm.apply(vit, TurboConfig(r=6)), torch.no_grad():
        exact = vit(images)
        vit.bfloat16()
        found = {}
        for fast in (True, False):
            monkeypatch.setattr(plain, "FAST_BFLOAT16_PRODUCTS", fast)
            found[fast] = 1 - torch.cosine_similarity(vit(images.bfloat16()).float(), exact, dim=-1)
        monkeypatch.setattr(plain, "FAST_BFLOAT16_PRODUCTS", True)
        compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images.bfloat16()), vit(images.bfloat16()), rtol=0, atol=1e-2)
    assert not torch.equal(found[True], found[False])
    assert found[True].max() < 1e-2 and found[False].max() < 1e-2
