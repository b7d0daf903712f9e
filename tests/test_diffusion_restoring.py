"""What the positions get back: linear regression behind feed-forwards, and attention in proportion to sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import turbovlm
from denoisers import DENOISERS, Watch, noise, unet_inputs
from turbovlm.diffusion.restore import restore_linear as restored_by
from turbovlm.diffusion.restore import restore_update
from turbovlm.errors import ConfigError
from turbovlm.ops import host, merge_ranked, partition_tokens, plain, rank_candidates
from turbovlm.ops.restoring import linear_map

pytest.importorskip("diffusers")
BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"


def merge_of(x, r, reduce="merge"):
    split = partition_tokens(x.shape[1], kind="grid")
    ranking = rank_candidates(x, split, None, degree="redundancy")
    return merge_ranked(ranking, r, order="spatial", reduce=reduce)[0]


def restore_linear(merge, x, merged, out):
    return restored_by(merge, x, merged, out, plain)


@pytest.mark.parametrize("reduce", ["merge", "prune"])
@pytest.mark.parametrize("r", [12, 32, 48])
def test_a_linear_map_is_found(reduce, r, monkeypatch):
    """Of tokens that lie in fewer directions than the regression sees tokens."""
    monkeypatch.setattr("turbovlm.ops.restoring.RIDGE", 1e-9)
    torch.manual_seed(0)
    x = torch.randn(3, 64, 8).double() @ torch.randn(8, 24).double() + 1
    linear = torch.nn.Linear(24, 20).double().requires_grad_(False)
    merge = merge_of(x, r, reduce)
    merged = merge.merge(x)
    back = restore_linear(merge, x, merged, linear(merged))
    torch.testing.assert_close(back, linear(x), rtol=0, atol=1e-5)
    assert (merge.unmerge(linear(merged)) - linear(x)).abs().max() > 0.1


def test_the_map_is_that_of_ridge_regression():
    z, y = noise(0, 2, 20, 40).double(), noise(1, 2, 20, 5).double()
    across, weights = linear_map(z, y, 20)
    z, y = z - z.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    ridge = 0.3 * 20 * z.square().mean((1, 2)).view(-1, 1, 1) * torch.eye(40)
    torch.testing.assert_close(across @ weights, torch.linalg.solve(z.mT @ z + ridge, z.mT @ y))


def test_the_fewer_are_gone_the_fewer_are_seen(monkeypatch):
    """Restoring has to cost less than merging saved."""
    seen = []
    monkeypatch.setattr("turbovlm.ops.restoring.linear_map", lambda *a: seen.append(a[2]) or linear_map(*a))
    x = noise(0, 2, 64, 24)
    for r in (1, 5, 48):
        merge = merge_of(x, r)
        merged = merge.merge(x)
        restore_linear(merge, x, merged, merged)
    assert seen == [1, 5, 12]


@pytest.mark.parametrize("linear", [True, False])
def test_an_update_is_restored_beside_the_own_input(linear):
    """Against the formula, in which W comes of the normal equations."""
    torch.manual_seed(0)
    x, out = torch.randn(2, 64, 24).double(), torch.randn(2, 40, 24).double()
    merge = merge_of(x, 24)
    merged = merge.merge(x)
    back = restore_update(merge, x, merged, out, linear, plain)
    expected = x + merge.unmerge(out - merged)
    if linear:
        z, y = (
            (each - each.mean(1, keepdim=True)) for each in (merged[:, ::3][:, :12], (out - merged)[:, ::3][:, :12])
        )
        ridge = 0.3 * 12 * z.square().mean((1, 2)).view(-1, 1, 1) * torch.eye(24)
        expected += (x - merge.unmerge(merged)) @ torch.linalg.solve(z.mT @ z + ridge, z.mT @ y)
    torch.testing.assert_close(back, expected)
    alone = merge.sizes.gather(1, merge.source) == 1
    assert alone.any() and torch.equal(back[alone], merge.unmerge(out)[alone])


def test_half_precision_holds_long_tokens():
    """Products of tokens this long are beyond what float16 holds."""
    x = noise(0, 1, 64, 256) * 200 + 500
    merge = merge_of(x, 32)
    merged = merge.merge(x)
    out = merged + merged.roll(1, dims=2) / 4
    exact = restore_update(merge, x, merged, out, True, plain)
    low = restore_update(merge, *(each.half() for each in (x, merged, out)), True, plain)
    assert low.dtype == torch.float16 and (low - exact).abs().max() < 0.005 * exact.abs().max()


def test_equal_tokens_are_no_trouble():
    x = torch.ones(1, 64, 8)
    merge = merge_of(x, 32)
    torch.testing.assert_close(restore_linear(merge, x, merge.merge(x), merge.merge(2 * x)), 2 * x)


def test_an_image_that_is_not_finite_spoils_no_other():
    x = noise(0, 2, 64, 8)
    merge = merge_of(x, 32)
    merged = merge.merge(x)
    good = restore_linear(merge, x, merged, merged**2)
    x[0] = float("nan")
    merged = merge.merge(x)
    back = restore_linear(merge, x, merged, merged**2)
    assert back[0].isnan().all() and torch.equal(back[1], good[1])


def smooth(inputs):
    """A latent that differs little from pixel to pixel, or from token to token."""
    name = "sample" if "sample" in inputs else "hidden_states"
    latent = inputs[name]
    if latent.ndim == 4:
        return {**inputs, name: F.interpolate(latent[..., ::4, ::4], scale_factor=4, mode="bicubic")}
    tokens = latent.unflatten(1, (16, 16)).permute(0, 3, 1, 2)[..., ::4, ::4]
    return {**inputs, name: F.interpolate(tokens, scale_factor=4, mode="bicubic").flatten(2).transpose(1, 2)}


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "pixart"])
def test_a_smooth_feed_forward_drifts_less(name):
    """The families' own feed-forwards, on tokens that differ little, as neighbours of an image do."""
    model, inputs = DENOISERS[name](), smooth(DENOISERS[name].inputs(2, 32, 32))
    plain = model(**inputs, return_dict=False)[0]
    gap = {}
    for restore in ("copy", "linear"):
        with turbovlm.apply(model, keep=0.5, components=["ffn"], restore=restore):
            gap[restore] = float((model(**inputs, return_dict=False)[0] - plain).square().mean())
    assert gap["linear"] < 0.95 * gap["copy"]


def test_restore_is_checked():
    with pytest.raises(ConfigError, match="restore='blend': must be one of auto, copy, linear"):
        turbovlm.DenoiseConfig(keep=0.5, restore="blend")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    """The systems are solved in fp32, under autocast too, and what is read may be more precise than what comes out."""
    x = noise(0, 2, 256, 32) + 3
    merge, far = merge_of(x, 128), torch.finfo(dtype).eps * 8
    merged = merge.merge(x)
    out = F.gelu(merged @ noise(1, 32, 32) / 6)
    exact = restore_linear(merge, x, merged, out)
    with torch.autocast("cpu", dtype=dtype):
        cast = restore_linear(merge, x, merged, out.to(dtype))
    low = restore_linear(merge, x.to(dtype), merged.to(dtype), out.to(dtype))
    for other in (cast, low):
        assert other.dtype == dtype and (other - exact).abs().max() < far * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("proportional", [True, False])
def test_attention_in_proportion(proportional):
    """A merged token counts as many times as it stands for: like that many equal keys."""
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, 32, 32)
    attention, seen = model.get_submodule(f"{BLOCK}.attn1"), {}
    Watch(attention.to_k, lambda x, out: seen.update(keys=out))
    Watch(attention.to_v, lambda x, out: seen.update(values=out))
    Watch(attention.to_q, lambda x, out: seen.update(queries=out))
    Watch(attention.to_out[0], lambda x, out: seen.update(attended=x))
    with turbovlm.apply(model, keep=0.5, components=["attention"], proportional=proportional) as handle:
        model(**inputs)
        feature = handle.features[0]
        site = next(site for site in feature.sites if site.name == f"{BLOCK}.attn1")
        sizes = feature.last[site.key].merge.sizes
    assert sizes.shape == (1, 512) and sizes.sum() == 1024
    times = sizes[0].long() if proportional else torch.ones(512, dtype=torch.long)
    queries, keys, values = (
        seen[name].unflatten(-1, (attention.heads, -1)).transpose(1, 2) for name in ("queries", "keys", "values")
    )
    repeated = (value.repeat_interleave(times, dim=2) for value in (keys, values))
    expected = F.scaled_dot_product_attention(queries, *repeated).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["attended"], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_joint_attention_in_proportion(monkeypatch):
    """FLUX: of the image's keys only, not of the words'."""
    model, inputs = DENOISERS["flux"](), DENOISERS["flux"].inputs(2, 32, 32)
    biases, attend = [], host.attend
    watched = lambda q, k, v, bias, scale: (biases.append(bias), attend(q, k, v, bias, scale))[1]  # noqa: E731
    monkeypatch.setattr(host, "attend", watched)
    with turbovlm.apply(model, keep=0.5):
        model(**inputs)
    words, tokens = inputs["encoder_hidden_states"].shape[1], inputs["hidden_states"].shape[1]
    assert len(biases) == sum(name.endswith(".attn") for name, _ in model.named_modules())
    for bias in biases:
        assert bias.shape[-1] == words + tokens // 2
        assert not bias[..., :words].any()
        assert bias.shape[:3] == (2, 1, 1)
        assert (bias[..., words:].exp().sum(-1).round() == tokens).all()
