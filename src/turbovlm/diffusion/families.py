"""The denoisers of `diffusers`, as data: their blocks, which parts can read merged tokens, and where the text is.

A block takes the image's tokens and gives as many back, and so does each of its parts, to which the block adds what
came before; so tokens can be merged before any of them and restored behind it. A new family is one `Denoiser`, often a
copy of another with other paths (`dataclasses.replace`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from turbovlm.diffusion.attend import Attending
from turbovlm.diffusion.positions import Cut


@dataclass(frozen=True)
class Part:
    """A module of a block whose forward takes the image's tokens first, `[batch, tokens, width]`.

    Args:
        path: name of the module in the block; a block may lack it.
        component: what it is, one of `turbovlm.config.COMPONENTS`. In cross-attention A is the attention that the text
            pays, elsewhere that of the image's own tokens.
        text: where the text's tokens stand in the sequence of the image's: `"front"` or `"behind"`; None where it is
            apart, or there is none.
        restored: indices of those outputs that are of the image's tokens, where it gives several.
        attending: how its keys, which are merged tokens, count in proportion to their sizes; None where it has none.
        cuts: what it is given of every token.
        one_layer: whether it is one layer, of one token at a time, which quantisers and adapters replace.
    """

    path: str
    component: str
    text: str | None = None
    restored: tuple[int, ...] = (0,)
    attending: Attending | None = None
    cuts: tuple[Cut, ...] = ()
    one_layer: bool = False


@dataclass(frozen=True)
class Block:
    """One kind of block.

    Args:
        path: dotted path of its class.
        guide: path, from the block, of the self-attention whose queries and keys say what matters.
        parts: in the order in which the block calls them.
        output: index of the image's tokens in what it gives; None where it gives nothing else.
        cuts: what it is given of every token.
        text: where the text's tokens stand in the sequence of the image's: `"front"` or `"behind"`; None where it is
            apart, or there is none.
        words: the argument that has the text's tokens, where they are apart.
        whole_if: its attributes and arguments that make it treat positions differently, where they are not None.
    """

    path: str
    guide: str
    parts: tuple[Part, ...]
    output: int | None = None
    cuts: tuple[Cut, ...] = ()
    text: str | None = None
    words: str = "encoder_hidden_states"
    whole_if: tuple[str, ...] = ()

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
        between: arguments of the holder's that add something to tokens between blocks, or skip blocks.
    """

    kind: ClassVar[str] = "denoiser"

    family: str
    holders: tuple[str, ...]
    blocks: tuple[Block, ...]
    positions: str | None = None
    refused: tuple[str, ...] = ()
    between: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Dotted paths of the blocks, by which a family is recognised."""
        return tuple(block.path for block in self.blocks)


MODELS = "diffusers.models"
TRANSFORMERS = f"{MODELS}.transformers"

ALONE, TEXT_FIRST = Attending(mask_axes=3, keys_apart=True), Attending("front", mask_axes=4)
TEXT_LAST = Attending("behind")
ROTARY = Cut("image_rotary_emb", text="front", heads=2)
FEED_FORWARD = Part("ff", "ffn")

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
            parts=(Part("attn1", "attention", attending=ALONE), Part("attn2", "cross_attention"), FEED_FORWARD),
            whole_if=("pos_embed", "fuser", "attention_mask", "_chunk_size"),
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
            parts=(
                Part("attn", "attention", attending=TEXT_LAST),
                Part("attn2", "attention", attending=TEXT_LAST),
                FEED_FORWARD,
            ),
            output=1,
            whole_if=("_chunk_size",),
        ),
    ),
    between=("block_controlnet_hidden_states", "skip_layers"),
)
FLUX_DOUBLE = Block(
    f"{TRANSFORMERS}.transformer_flux.FluxTransformerBlock",
    guide="attn",
    parts=(Part("attn", "attention", restored=(0, 2), attending=TEXT_FIRST, cuts=(ROTARY,)), FEED_FORWARD),
    output=1,
    cuts=(ROTARY,),
)
FLUX_SINGLE = Block(
    f"{TRANSFORMERS}.transformer_flux.FluxSingleTransformerBlock",
    guide="attn",
    parts=(
        Part("proj_mlp", "ffn", text="front", one_layer=True),
        Part("attn", "attention", text="front", attending=TEXT_FIRST, cuts=(ROTARY,)),
        Part("proj_out", "ffn", text="front", one_layer=True),
    ),
    output=1,
    cuts=(ROTARY,),
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
    between=("controlnet_block_samples", "controlnet_single_block_samples"),
)
FAMILIES = (BASIC, SD3, FLUX)
