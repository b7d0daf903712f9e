"""The denoisers of `diffusers`, as data: their blocks, which parts can read merged tokens, and where the text is.

A part takes the image's tokens and gives as many back, to which the block adds what came before; so each part can
merge what it reads and restore what it gives. A new family is one `Denoiser`, often a copy of another with other paths
(`dataclasses.replace`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from turbovlm.diffusion.attend import Attending, plain_attention, rotary_attention


@dataclass(frozen=True)
class Part:
    """A module of a block whose forward takes the image's tokens first, `[batch, tokens, width]`.

    Args:
        path: name of the module in the block; a block may lack it.
        component: what it is, one of `turbovlm.config.COMPONENTS`. In cross-attention A is the attention that the text
            pays, elsewhere that of the image's own tokens.
        text_in_front: whether the text's tokens stand in front of the image's.
        restored: indices of those outputs that are of the image's tokens, where it gives several.
        attending: how its keys, which are merged tokens, count in proportion to their sizes; None where they cannot.
        smooth: whether it is a feed-forward, of one token at a time.
    """

    path: str
    component: str
    text_in_front: bool = False
    restored: tuple[int, ...] = (0,)
    attending: Attending | None = None
    smooth: bool = False


@dataclass(frozen=True)
class Block:
    """One kind of block.

    Args:
        path: dotted path of its class.
        guide: path, from the block, of the self-attention whose queries and keys say what matters.
        parts: in the order in which the block calls them.
    """

    path: str
    guide: str
    parts: tuple[Part, ...]

    @property
    def library(self) -> str:
        """What the dotted paths of the modules and processors begin with that treat tokens alike wherever they lie."""
        return ".".join(self.path.split(".")[:-1][:2])


@dataclass(frozen=True)
class Denoiser:
    """One family of denoisers.

    Args:
        family: name for people.
        holders: dotted paths of the classes that have the blocks, directly or in lists, and know how tokens lie.
        blocks: the kinds of blocks in them.
        positions: name of the holder's argument that says where each token stands, `[tokens, 3]`, for holders that are
            given tokens; None for those that are given images, `[batch, channels, rows, columns]`.
        refused: dotted paths of pipelines that give it the tokens of several images in one sequence.
    """

    kind: ClassVar[str] = "denoiser"

    family: str
    holders: tuple[str, ...]
    blocks: tuple[Block, ...]
    positions: str | None = None
    refused: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Dotted paths of the blocks, by which a family is recognised."""
        return tuple(block.path for block in self.blocks)


MODELS = "diffusers.models"
TRANSFORMERS = f"{MODELS}.transformers"
PROCESSORS = f"{MODELS}.attention_processor"

PLAIN = Attending(
    plain_attention, (f"{PROCESSORS}.AttnProcessor2_0", f"{PROCESSORS}.FusedAttnProcessor2_0"), mask_axes=3
)
ROTARY = Attending(rotary_attention, (f"{TRANSFORMERS}.transformer_flux.FluxAttnProcessor",), mask_axes=4)
FEED_FORWARD = Part("ff", "ffn", smooth=True)

BASIC = Denoiser(
    "UNets, PixArt and DiT",
    holders=(
        f"{TRANSFORMERS}.transformer_2d.Transformer2DModel",
        f"{TRANSFORMERS}.pixart_transformer_2d.PixArtTransformer2DModel",
        f"{TRANSFORMERS}.dit_transformer_2d.DiTTransformer2DModel",
    ),
    blocks=(
        Block(
            f"{MODELS}.attention.BasicTransformerBlock",
            guide="attn1",
            parts=(Part("attn1", "attention", attending=PLAIN), Part("attn2", "cross_attention"), FEED_FORWARD),
        ),
    ),
)
SD3 = Denoiser(
    "Stable Diffusion 3",
    holders=(f"{TRANSFORMERS}.transformer_sd3.SD3Transformer2DModel",),
    blocks=(
        Block(
            f"{MODELS}.attention.JointTransformerBlock",
            guide="attn",
            parts=(Part("attn", "attention"), Part("attn2", "attention"), FEED_FORWARD),
        ),
    ),
)
FLUX_DOUBLE = Block(
    f"{TRANSFORMERS}.transformer_flux.FluxTransformerBlock",
    guide="attn",
    parts=(Part("attn", "attention", restored=(0, 2), attending=ROTARY), FEED_FORWARD),
)
FLUX_SINGLE = Block(
    f"{TRANSFORMERS}.transformer_flux.FluxSingleTransformerBlock",
    guide="attn",
    parts=(
        Part("proj_mlp", "ffn", text_in_front=True),
        Part("attn", "attention", text_in_front=True, attending=ROTARY),
        Part("proj_out", "ffn", text_in_front=True),
    ),
)
FLUX = Denoiser(
    "FLUX",
    holders=(f"{TRANSFORMERS}.transformer_flux.FluxTransformer2DModel",),
    blocks=(FLUX_DOUBLE, FLUX_SINGLE),
    positions="img_ids",
    refused=(
        "diffusers.pipelines.flux.pipeline_flux_kontext.FluxKontextPipeline",
        "diffusers.pipelines.flux.pipeline_flux_kontext_inpaint.FluxKontextInpaintPipeline",
    ),
)
FAMILIES = (BASIC, SD3, FLUX)
