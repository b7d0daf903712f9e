"""Stands in for ComfyUI's module of this name, made of the layers of blocks of `diffusers`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def attend(q, k, v, pe, mask):
    q, k = rotated(q, pe), rotated(k, pe)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def rotated(x, pe):
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2)


def heads_of(attention, x, names, norms):
    made = [getattr(attention, name)(x).unflatten(-1, (attention.heads, -1)) for name in names]
    for i, norm in enumerate(norms):
        made[i] = getattr(attention, norm)(made[i])
    return [each.transpose(1, 2) for each in made]


IMAGE, WORDS = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


class DoubleStreamBlock(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.flipped_img_txt = False
        self.attn = own.attn
        self.norms = nn.ModuleList([own.norm1, own.norm2, own.norm1_context, own.norm2_context])
        self.ffs = nn.ModuleList([own.ff, own.ff_context])

    def forward(
        self,
        img,
        txt,
        vec,
        pe,
        attn_mask=None,
        modulation_dims_img=None,
        modulation_dims_txt=None,
        transformer_options={},  # noqa: B006
    ):
        attn, words = self.attn, txt.shape[1]
        n, *gates = self.norms[0](img, emb=vec)
        n_txt, *gates_txt = self.norms[2](txt, emb=vec)
        image = heads_of(attn, n, IMAGE, ("norm_q", "norm_k"))
        text = heads_of(attn, n_txt, WORDS, ("norm_added_q", "norm_added_k"))
        out = attend(*(torch.cat(both, dim=2) for both in zip(text, image)), pe, attn_mask)
        img = self._left(img, attn.to_out[0](out[:, words:]), gates, 0)
        return img, self._left(txt, attn.to_add_out(out[:, :words]), gates_txt, 1)

    def _left(self, x, out, gates, side):
        gate, shift, scale, gate_mlp = (each.unsqueeze(1) for each in gates)
        x = x + gate * out
        return x + gate_mlp * self.ffs[side](self.norms[2 * side + 1](x) * (1 + scale) + shift)


class SingleStreamBlock(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.attn, self.norm, self.act = own.attn, own.norm, own.act_mlp
        self.linear = nn.ModuleList([own.proj_mlp, own.proj_out])

    def forward(self, x, vec, pe, attn_mask=None, modulation_dims=None, transformer_options={}):  # noqa: B006
        n, gate = self.norm(x, emb=vec)
        out = attend(*heads_of(self.attn, n, IMAGE, ("norm_q", "norm_k")), pe, attn_mask)
        x += gate.unsqueeze(1) * self.linear[1](torch.cat([out, self.act(self.linear[0](n))], dim=2))
        return x
