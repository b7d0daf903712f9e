"""The layouts of vLLM's towers, on blocks that are spelled as vLLM's are; which need no vLLM."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import turbovlm
from turbovlm.encoder import variant
from turbovlm.encoder.attention import attention_of_guide
from turbovlm.engines.vllm import encoders
from turbovlm.engines.vllm.tower import rows_of_merged
from turbovlm.registry import register, unregister

CONFIG = {"image_size": 48, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48}
CONFIG |= {"num_hidden_layers": 4, "num_attention_heads": 4}


class Linear(nn.Module):
    """As vLLM's: packs its weight, says its sizes in its own words, and returns a bias beside the output."""

    def __init__(self, *layers):
        super().__init__()
        self.packed = [torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])]
        self.output_size, self.input_size = self.packed[0].shape
        self.weight = nn.Parameter(torch.empty(0))

    def forward(self, x):
        return nn.functional.linear(x, *self.packed), None


class Attention(nn.Module):
    def __init__(self, theirs):
        super().__init__()
        self.qkv_proj = Linear(theirs.q_proj, theirs.k_proj, theirs.v_proj)
        self.out_proj = Linear(theirs.out_proj)
        self.num_heads_per_partition, self.scale = theirs.num_heads, theirs.scale
        self.attn = nn.Identity()

    def forward(self, x):
        q, k, v = (
            each.unflatten(-1, (self.num_heads_per_partition, -1)).transpose(1, 2)
            for each in self.qkv_proj(x)[0].chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(self.attn(q), k, v, scale=self.scale)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))[0], None


class Block(nn.Module):
    pair = False

    def __init__(self, theirs):
        super().__init__()
        self.self_attn, self.mlp = Attention(theirs.self_attn), theirs.mlp
        self.layer_norm1, self.layer_norm2 = theirs.layer_norm1, theirs.layer_norm2

    def forward(self, hidden_states):
        x = hidden_states + self.self_attn(self.layer_norm1(hidden_states))[0]
        x = x + self.mlp(self.layer_norm2(x))
        return (x, None) if self.pair else x


class PairBlock(Block):
    pair = True


class Tower(nn.Module):
    def __init__(self, theirs, block):
        super().__init__()
        self.config, self.embeddings = theirs.config, theirs.embeddings
        self.norm = getattr(theirs, "pre_layrnorm", nn.Identity())
        self.layers = nn.ModuleList([block(layer) for layer in theirs.encoder.layers])

    def forward(self, pixel_values):
        x = self.norm(self.embeddings(pixel_values))
        for layer in self.layers:
            x = layer(x)
            if layer.pair:
                x, _ = x
        return x


@pytest.fixture(params=["CLIP", "SIGLIP"])
def towers(request):
    """A tower of `transformers`, and one of the same weights that is spelled as vLLM's."""
    torch.manual_seed(0)
    if request.param == "CLIP":
        model, block = CLIPVisionModel(CLIPVisionConfig(**CONFIG)).eval(), Block
    else:
        model, block = SiglipVisionModel(SiglipVisionConfig(**CONFIG)).eval(), PairBlock
    theirs = getattr(model, "vision_model", model)
    layout = variant(
        getattr(encoders, request.param),
        family=f"blocks spelled as of {request.param}",
        block=f"{__name__}.{block.__name__}",
        towers=(f"{__name__}.Tower",),
    )
    register(layout)
    yield theirs, Tower(theirs, block).eval()
    unregister(layout)


@pytest.mark.parametrize("settings", [{"r": 3}, {"keep": 0.3, "blocks": "every", "restore": "copy"}, {"flops": 0.7}])
def test_tokens_merge_as_in_transformers(towers, settings):
    theirs, ours = towers
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        unmerged = ours(pixels)
        handle = turbovlm.apply(ours, **settings)
        merged = ours(pixels)
        expected = turbovlm.apply(theirs, dense=True, **settings)
        torch.testing.assert_close(merged, theirs(pixels, output_hidden_states=True).hidden_states[-1])
    assert handle.schedules[0].merged == expected.schedules[0].merged
    assert handle.schedules[0].ratio == expected.schedules[0].ratio
    assert merged.shape == unmerged.shape and not torch.allclose(merged, unmerged)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(ours(pixels), unmerged)


def test_the_row_of_merged_tokens_is_that_of_transformers(towers):
    theirs, ours = towers
    pixels, reading, seen = torch.randn(2, 3, 48, 48), turbovlm.ReadConfig(0.5), []
    handle = turbovlm.apply(ours, r=3)
    rows = rows_of_merged(ours, handle.features[0], reading)
    turbovlm.apply(theirs, r=3, dense=True)
    (feature,) = turbovlm.get_handle(theirs).features
    block = theirs.encoder.layers[-1]

    def see(block, args):
        seen.append(attention_of_guide(block, feature.layout, reading, 0, feature.guidance, args[0], {}))

    block.register_forward_pre_hook(see)
    with torch.no_grad():
        ours(pixels), theirs(pixels)
    prefix = seen[0].shape[1] - 36
    (first,), (second,) = rows.of_images([1, 1])
    torch.testing.assert_close(torch.stack([first, second]), seen[0][:, prefix:])
    assert feature.last.merges
