"""Stands in for ComfyUI's module of this name: its blocks' names, arguments and places for other extensions' functions.

They are made of the layers of a UNet of `diffusers`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class CrossAttention(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.heads = own.heads
        self.to_q, self.to_k, self.to_v, self.to_out = own.to_q, own.to_k, own.to_v, nn.Sequential(*own.to_out)

    def forward(self, x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006
        context = x if context is None else context
        given = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in given)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.net = own.net

    def forward(self, x):
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.disable_self_attn = self.switch_temporal_ca_to_sa = self.ff_in = False
        self.attn1, self.attn2, self.ff = CrossAttention(own.attn1), CrossAttention(own.attn2), FeedForward(own.ff)
        self.norm1, self.norm2, self.norm3 = own.norm1, own.norm2, own.norm3

    def forward(self, x, context=None, transformer_options={}):  # noqa: B006
        patches = transformer_options.get("patches", {})
        n = self.norm1(x)
        keys, values = n, n
        for function in patches.get("attn1_patch", ()):
            n, keys, values = function(n, keys, values, transformer_options)
        replaced = transformer_options.get("patches_replace", {}).get("attn1", {})
        block = transformer_options.get("block")
        place = (*block, transformer_options["block_index"])
        if block in replaced or place in replaced:
            function = replaced.get(place, replaced.get(block))
            made = self.attn1.to_q(n), self.attn1.to_k(keys), self.attn1.to_v(values)
            x = x + self.attn1.to_out(function(*made, transformer_options))
        else:
            x = x + self.attn1(n, context=keys, value=values, transformer_options=transformer_options)
        x += self.attn2(self.norm2(x), context=context, transformer_options=transformer_options)
        x += self.ff(self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = own.norm, own.proj_in, own.proj_out
        self.transformer_blocks = nn.ModuleList(map(BasicTransformerBlock, own.transformer_blocks))

    def forward(self, x, context=None, transformer_options={}):  # noqa: B006
        rows, columns = x.shape[2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2).contiguous()
        for index, block in enumerate(self.transformer_blocks):
            transformer_options["block_index"] = index
            h = block(h, context=context, transformer_options=transformer_options)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (rows, columns)).contiguous())


class Residual(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x, emb):
        return self.own(x, emb)


class Downsample(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x):
        return self.own(x)


class Upsample(Downsample):
    pass


class Row(nn.Module):
    """A UNet, of a latent and words, with all its blocks in a row."""

    def __init__(self, own):
        super().__init__()
        self.embed = nn.ModuleList([own.time_proj, own.time_embedding])
        rows = [nn.ModuleList([own.conv_in])]
        for stage in own.down_blocks:
            rows += [nn.ModuleList(each) for each in _layers(stage)]
            rows += [nn.ModuleList([Downsample(each)]) for each in stage.downsamplers or ()]
        self.input_blocks = nn.ModuleList(rows)
        before, behind = own.mid_block.resnets
        middle = SpatialTransformer(own.mid_block.attentions[0])
        self.middle_block = nn.ModuleList([Residual(before), middle, Residual(behind)])
        rows = []
        for stage in own.up_blocks:
            layers = _layers(stage)
            layers[-1] += [Upsample(each) for each in stage.upsamplers or ()]
            rows += [nn.ModuleList(each) for each in layers]
        self.output_blocks = nn.ModuleList(rows)
        self.out = nn.Sequential(own.conv_norm_out, own.conv_act, own.conv_out)

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        made, learned = self.embed
        emb, kept = learned(made(timesteps).to(x.dtype)), []
        for index, entry in enumerate(self.input_blocks):
            transformer_options["block"] = ("input", index)
            x = _through(entry, x, emb, context, transformer_options)
            kept.append(x)
        transformer_options["block"] = ("middle", 0)
        x = _through(self.middle_block, x, emb, context, transformer_options)
        for index, entry in enumerate(self.output_blocks):
            transformer_options["block"] = ("output", index)
            x = _through(entry, torch.cat([x, kept.pop()], dim=1), emb, context, transformer_options)
        return self.out(x)


def _layers(stage):
    """Each residual block of a stage, with the transformer behind it."""
    behind = [[SpatialTransformer(each)] for each in getattr(stage, "attentions", ())]
    return [[Residual(block), *each] for block, each in zip(stage.resnets, behind or [[]] * len(stage.resnets))]


def _through(entry, x, emb, context, transformer_options):
    for layer in entry:
        if isinstance(layer, Residual):
            x = layer(x, emb)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, context, transformer_options)
        else:
            x = layer(x)
    return x
