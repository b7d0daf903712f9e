"""Counting, against the formulas of the paper and its printed numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import turbovlm
from families import FAMILIES
from turbovlm import TurboConfig
from turbovlm.adapters import find_towers
from turbovlm.profile import macs
from turbovlm.profile.paper import ROWS, paper_costs


def test_plain_modules():
    assert macs(nn.Linear(8, 5), torch.zeros(3, 8)) == 3 * 8 * 5
    assert macs(nn.Conv2d(3, 4, 2, 2), torch.zeros(1, 3, 8, 8)) == 16 * 4 * 3 * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("sizes", [False, True])
def test_attention_counts_on_every_device(device, sizes):
    class Attention(nn.Module):
        def forward(self, q):
            bias = torch.ones(2, 50, device=device) if sizes else None
            return turbovlm.functional.proportional_attention(q, q, q, bias)

    assert macs(Attention(), torch.zeros(2, 3, 50, 16, device=device)) == 2 * 3 * 2 * 50 * 50 * 16


def test_the_fused_multihead_attention_is_counted_and_left_on():
    attention = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    x = torch.zeros(1, 50, 32)
    assert macs(attention, x, x, x, need_weights=False) == 50 * 32 * 32 * 4 + 2 * 50 * 50 * 32
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises((RuntimeError, AssertionError)):
        macs(attention, x, x, torch.zeros(50, 1, 3))
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("settings", [{"r": 0}, {"r": 5}, {"r": 5, "similarity": "hidden"}, {"flops": 0.7}], ids=str)
def test_the_schedules_cost_is_the_counted_one(name, settings):
    """What `print(handle)` says of the blocks, norms aside, against what running them counts."""
    family = FAMILIES[name]
    model = family.make()
    with turbovlm.apply(model, **settings) as handle:
        schedule, shape = handle.schedules[0], handle._plans[0].shape
        counts = []
        for _, block in find_towers(model)[0].blocks:
            block.forward = Counted(block.forward, counts)
        model.eval()(**family.inputs(1))
        for _, block in find_towers(model)[0].blocks:
            del block.forward
    norms = sum(5 * shape.hidden_size * (a + b) for a, b in zip(schedule.tokens, schedule.tokens[1:]))
    assert sum(counts) == pytest.approx(sum(schedule.macs_after) - norms, rel=0.003)


class Counted:
    """A forward that appends its own count."""

    def __init__(self, forward, counts):
        self.own, self.counts = forward, counts

    def __call__(self, *args, **kwargs):
        outs = []

        class Once(nn.Module):
            def forward(once):
                outs.append(self.own(*args, **kwargs))

        self.counts.append(macs(Once()))
        return outs[0]


def test_a_whole_encoder_costs_what_the_method_says():
    """Per block 4ND² + 2N²D + ⌈N/2⌉⌊N/2⌋d + 2N'·D·D_mlp, and the guide's row ND; plus the patch embedding."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_384", num_classes=0).eval()
    image = torch.empty(1, 3, 384, 384, device="meta")
    for r in (0, 35):
        total, n = 576 * 3 * 256 * 768, 577
        for _ in range(12):
            after = n - r
            total += 4 * n * 768**2 + 2 * n * n * 768 + 2 * after * 768 * 3072
            total += ((n + 1) // 2 * (n // 2) * 64 + n * 768) if r else 0
            n = after
        with turbovlm.apply(model, TurboConfig.paper(r)):
            assert macs(model, image) == pytest.approx(total, rel=0.001)


def test_flops_setting_is_met_by_the_count():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_384", num_classes=0).eval()
    image = torch.empty(1, 3, 384, 384, device="meta")
    full = macs(model, image)
    for share in (0.9, 0.6, 0.45):
        with turbovlm.apply(model, flops=share):
            assert macs(model, image) / full == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("encoder", ["blip-384", "blip-480", "blip2-364"])
def test_published_encoder_costs(encoder):
    rows = [row for row in ROWS if row.encoder == encoder]
    for cost in paper_costs(rows):
        if "r=39" not in cost.row.remark:
            assert abs(cost.difference) < 0.008, cost


def test_published_speedups_are_below_the_arithmetic():
    for cost in paper_costs([row for row in ROWS if row.encoder in ("augreg-s", "swag-b")]):
        assert cost.row.printed_speedup <= cost.full_gmacs / cost.gmacs < 1.25 * cost.row.printed_speedup
