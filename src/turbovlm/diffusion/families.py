"""The blocks of `diffusers`' denoisers, as data: which of their parts can read merged tokens, and where the text is.

A part takes the image's tokens and gives as many back, to which the block adds what came before; so each part can
merge what it reads and restore what it gives. A new family is a new `Block`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Part:
    """A module of a block whose forward takes the image's tokens first, `[batch, tokens, width]`.

    Args:
        path: of the module, from the block; a block may lack it.
        component: what it is, one of `turbovlm.config.COMPONENTS`.
        text_in_front: whether the text's tokens stand in front of the image's.
        restored: which of its outputs are of the image's tokens, where it gives several.
        bias: how many axes a bias on its keys has, `[batch, …, keys]`, which it takes as `attention_mask`; 0 if none.
        smooth: whether it is a feed-forward, of one token at a time.
    """

    path: str
    component: str
    text_in_front: bool = False
    restored: tuple[int, ...] = (0,)
    bias: int = 0
    smooth: bool = False

    @property
    def by_text(self) -> bool:
        """Whether A is the attention that the text pays, and not that of the image's own tokens."""
        return self.component == "cross_attention"


@dataclass(frozen=True)
class Block:
    """One kind of block.

    Args:
        family: name for people.
        block: dotted path of its class.
        guide: path of the self-attention, whose queries and keys say what matters.
        parts: in the order in which the block calls them.
    """

    kind: ClassVar[str] = "denoiser"

    family: str
    block: str
    guide: str
    parts: tuple[Part, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """By which blocks are recognised."""
        return (self.block,)


DIFFUSERS = "diffusers.models"

BASIC = Block(
    "transformer block of UNets, PixArt and DiT",
    f"{DIFFUSERS}.attention.BasicTransformerBlock",
    "attn1",
    (Part("attn1", "attention", bias=3), Part("attn2", "cross_attention"), Part("ff", "ffn", smooth=True)),
)
SD3 = Block(
    "Stable Diffusion 3's joint block",
    f"{DIFFUSERS}.attention.JointTransformerBlock",
    "attn",
    (Part("attn", "attention"), Part("attn2", "attention"), Part("ff", "ffn", smooth=True)),
)
FLUX = Block(
    "FLUX's joint block",
    f"{DIFFUSERS}.transformers.transformer_flux.FluxTransformerBlock",
    "attn",
    (Part("attn", "attention", restored=(0, 2), bias=4), Part("ff", "ffn", smooth=True)),
)
FLUX_SINGLE = Block(
    "FLUX's single block",
    f"{DIFFUSERS}.transformers.transformer_flux.FluxSingleTransformerBlock",
    "attn",
    (
        Part("proj_mlp", "ffn", text_in_front=True),
        Part("attn", "attention", text_in_front=True, bias=4),
        Part("proj_out", "ffn", text_in_front=True),
    ),
)
FAMILIES = (BASIC, SD3, FLUX, FLUX_SINGLE)
