"""Quantised, pruned and adapted models: accelerated as they are, with the costs that they have, and given back."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import turbovlm
from turbovlm import UnsupportedModelError
from turbovlm.profile import macs

PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=64, patch_size=8, **size)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def timm_vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 0}
    return timm.models.VisionTransformer(**size).eval()


class Packed(nn.Module):
    """Eight integers of 4 bits in each of 32, as GPTQ's checkpoints have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scales", linear.weight.detach().abs().amax(1, keepdim=True) / 7)
        whole = (linear.weight / self.scales).round().long() + 8
        shifts = 4 * torch.arange(8)
        packed = (whole.unflatten(1, (-1, 8)) << shifts).sum(-1)
        self.register_buffer("qweight", packed.to(torch.int64).detach())
        self.bias = linear.bias

    def forward(self, x):
        whole = (self.qweight.unsqueeze(-1) >> (4 * torch.arange(8))) & 15
        return F.linear(x, (whole.flatten(1) - 8) * self.scales, self.bias)


class Unknown(nn.Module):
    """Packed, and it does not say how wide it is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = [Packed(linear)]
        self.blob = nn.Parameter(torch.zeros(8, 4, dtype=torch.int32), requires_grad=False)

    def forward(self, x):
        return self.inner[0](x)


def replaced(model, kind, only=""):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("layers.") and name.endswith(only):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, kind(module))
    return model


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def weight_only(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def in_bitsandbytes(make):
    """Its layers in place of `nn.Linear`; they quantise when they are moved."""

    def quantised(model):
        pytest.importorskip("bitsandbytes")
        return replaced(model, lambda linear: _loaded(make(linear), linear)).to("cpu").eval()

    return quantised


def _loaded(layer, linear):
    layer.load_state_dict(linear.state_dict())
    return layer


def eight_bits(linear):
    from bitsandbytes.nn import Linear8bitLt

    return Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)


def four_bits(linear):
    from bitsandbytes.nn import Linear4bit

    return Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4")


def adapted(model):
    peft = pytest.importorskip("peft")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()
    return lora.base_model.model


QUANTISED = {
    "packed": lambda m: replaced(m, Packed),
    "int8": dynamic,
    "weights only": weight_only,
    "LLM.int8()": in_bitsandbytes(eight_bits),
    "NF4": in_bitsandbytes(four_bits),
}
COMPRESSED = {**QUANTISED, "LoRA": adapted}


@torch.inference_mode()
def out(model):
    found = model(PIXELS)
    return found if isinstance(found, torch.Tensor) else found.last_hidden_state


def saved(model):
    """Of a copy: on CPUs with AVX512-BF16 bitsandbytes packs 4 bits anew, and rounds their scales, when it saves."""
    return {name: str(value) for name, value in copy.deepcopy(model).state_dict().items()}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_models_merge_and_come_back(kind):
    model = COMPRESSED[kind](vit())
    own, before = out(model), saved(model)
    with turbovlm.apply(model, r=0):
        assert torch.equal(out(model), own)
    with turbovlm.apply(model, flops=0.7, dense=True) as handle:
        merged, schedule = out(model), handle.schedules[0]
    assert merged.shape == own.shape and not torch.allclose(merged, own, atol=1e-3)
    assert schedule.ratio == pytest.approx(0.7, abs=0.02)
    assert torch.equal(out(model), own)
    assert saved(model) == before


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_layers_cost_what_they_cost_unpacked(kind):
    model = vit()
    with turbovlm.apply(model, r=8) as handle:
        expected = handle.schedules
    with turbovlm.apply(COMPRESSED[kind](model), r=8) as handle:
        assert handle.schedules == expected


@pytest.mark.parametrize("kind", ["LLM.int8()", "NF4"])
def test_the_products_of_bitsandbytes_are_counted(kind):
    whole = macs(vit(), PIXELS)
    model = COMPRESSED[kind](vit())
    out(model)
    assert macs(model, PIXELS) == whole


def test_low_rank_matrices_are_counted():
    model = vit()
    with turbovlm.apply(model, r=8) as handle:
        plain = handle.schedules[0].macs_before[0]
    with turbovlm.apply(adapted(model), r=8) as handle:
        more = handle.schedules[0].macs_before[0] - plain
    assert more == 65 * 4 * (4 * (64 + 64) + 2 * (64 + 128))


@pytest.mark.parametrize("only", ["", "q_proj", "o_proj", "fc1"])
def test_a_format_that_says_nothing_is_refused(only):
    model = vit()
    model = replaced(model, Unknown, only)
    before = out(model)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.\S+: .*not know, Unknown"):
        turbovlm.apply(model, r=8)
    assert torch.equal(out(model), before)


def shorter(linear: nn.Linear, rows: list[int] | None = None, columns: list[int] | None = None) -> nn.Linear:
    """A linear layer without some of what it gives or takes."""
    weight, bias = linear.weight.data, linear.bias.data
    weight, bias = (weight[rows], bias[rows]) if rows else (weight, bias)
    weight = weight[:, columns] if columns else weight
    new = nn.Linear(weight.shape[1], weight.shape[0])
    new.weight.data, new.bias.data = weight, bias
    return new


def test_blocks_of_different_widths_cost_what_they_are():
    """Heads and hidden units are gone, as many as structured pruning has left in each block."""
    model = timm_vit()
    for block, heads, hidden in zip(model.blocks, (4, 2, 3), (256, 96, 160)):
        attention, width = block.attn, 16 * heads
        rows = [part * 64 + column for part in range(3) for column in range(width)]
        attention.qkv, attention.proj = shorter(attention.qkv, rows), shorter(attention.proj, None, list(range(width)))
        attention.num_heads = heads
        attention.attn_dim = width
        block.mlp.fc1 = shorter(block.mlp.fc1, list(range(hidden)))
        block.mlp.fc2 = shorter(block.mlp.fc2, None, list(range(hidden)))
    own = out(model)
    with turbovlm.apply(model, flops=0.7) as handle:
        schedule = handle.schedules[0]
        assert schedule.ratio == pytest.approx(0.7, abs=0.02)
        counted = macs(model, PIXELS[:1])
    norms = sum(5 * 64 * (a + b) for a, b in zip(schedule.tokens, schedule.tokens[1:]))
    assert sum(schedule.macs_after) - norms + 64 * 64 * 192 == pytest.approx(counted, rel=0.01)
    assert schedule.macs_before[0] > schedule.macs_before[2] > schedule.macs_before[1]
    assert torch.equal(out(model), own)


def test_pruned_heads_keep_the_scale_that_they_were_trained_with():
    """As many heads, but each narrower, as UPop leaves them: attention still divides by the old width's root."""
    model = vit()
    for block, width in zip(model.layers, (16, 6, 10)):
        attention = block.attention
        kept = [head * 16 + column for head in range(4) for column in range(width)]
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, shorter(getattr(attention, name), kept))
        attention.o_proj, attention.head_dim = shorter(attention.o_proj, None, kept), width
    own = out(model)
    with turbovlm.apply(model, r=8, trace=True) as handle:
        merged = out(model)
        weights = [entry.semantic.nansum(1) for entry in handle.trace]
    assert not torch.allclose(merged[:, 0], own[:, 0], atol=1e-4)
    assert torch.equal(out(model), own)
    with turbovlm.apply(model, r=(1, 0, 0), order="spatial", reduce="prune", proportional=False):
        assert out(model).shape[1] == own.shape[1] - 1
    assert all(weight.max() < 1.001 for weight in weights)
    model.layers[1].attention.scaling = 1.0
    with turbovlm.apply(model, r=8):
        pass
    model.layers[1].attention.num_attention_heads = 3
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 .* differ from its own forward"):
        turbovlm.apply(model, r=8)
