"""Stands in for ComfyUI's module of this name: a FLUX of `diffusers`, of latents and words."""

from __future__ import annotations

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from torch import nn


class Flux(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.patch_size = 2
        self.double_blocks = nn.ModuleList(map(DoubleStreamBlock, own.transformer_blocks))
        self.single_blocks = nn.ModuleList(map(SingleStreamBlock, own.single_transformer_blocks))
        self.ends = nn.ModuleList([own.x_embedder, own.context_embedder, own.norm_out, own.proj_out])
        self.about = nn.ModuleList([own.time_text_embed, own.pos_embed])

    def forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options={},  # noqa: B006
        **kwargs,
    ):
        images = [x, *(ref_latents or ())]
        img = self.ends[0](torch.cat([packed(each) for each in images], dim=1))
        ids = torch.cat([torch.zeros(context.shape[1], 3), *(places(each, i) for i, each in enumerate(images))])
        cos, sin = (each[:, ::2] for each in self.about[1](ids))
        pe = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[None, None]
        vec, txt = self.about[0](1000 * timestep, y), self.ends[1](context)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=None, transformer_options=transformer_options)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe, attn_mask=None, transformer_options=transformer_options)
        img = img[:, txt.shape[1] :][:, : x.shape[2] * x.shape[3] // 4]
        out = self.ends[3](self.ends[2](img, vec)).unflatten(-1, (-1, 2, 2)).unflatten(1, (x.shape[2] // 2, -1))
        return out.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def packed(latent):
    """`[batch, tokens, channels of a patch of two by two]`."""
    patches = latent.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def places(latent, index):
    """Where each token stands, and in which image."""
    found = torch.zeros(latent.shape[2] // 2, latent.shape[3] // 2, 3)
    found[..., 0], found[..., 1] = index, torch.arange(found.shape[0])[:, None]
    found[..., 2] = torch.arange(found.shape[1])
    return found.flatten(0, 1)
