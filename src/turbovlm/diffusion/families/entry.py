"""What a family of denoisers is: its blocks, which parts can read merged tokens, and where the text is.

A block takes the image's tokens and gives as many back, and so does each of its parts, to which the block adds what
came before; so tokens can be merged before any of them and restored behind it. A new family is one `Denoiser`, often a
copy of another with other paths (`dataclasses.replace`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from turbovlm.diffusion.attend import Attending
from turbovlm.diffusion.grids import GridReader, OfLatent
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
        guide: path, from the block, of the self-attention whose queries and keys say what matters; empty where their
            projections have other names than `to_q` and `to_k`.
        parts: in the order in which the block calls them.
        output: index of the image's tokens in what it gives; None where it gives nothing else.
        cuts: what it is given of every token.
        text: where the text's tokens stand in the sequence of the image's: `"front"` or `"behind"`; None where it is
            apart, or there is none.
        words: the argument that has the text's tokens, where they are apart.
        by_parts: whether its parts can also merge by themselves.
        whole_if: its attributes and arguments that make it treat positions differently, where they are neither None nor
            False.
        attending: how it attends, where no module of it does; its `added` is an argument of the block.
        reason: what says of its arguments, by name, why it has to read all tokens; None where it need not.
        in_place: whether it writes to what it is given.
    """

    path: str
    guide: str
    parts: tuple[Part, ...]
    output: int | None = None
    cuts: tuple[Cut, ...] = ()
    text: str | None = None
    words: str = "encoder_hidden_states"
    by_parts: bool = True
    whole_if: tuple[str, ...] = ()
    attending: Attending | None = None
    reason: Callable[[Mapping[str, Any]], str | None] | None = None
    in_place: bool = False

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
        grid: how the holders' tokens lie, one of `turbovlm.diffusion.grids`.
        refused: dotted paths of pipelines that give it images and text in turn, in one sequence.
        between: arguments of the holder's that add something to tokens between blocks, or skip blocks.
        mixing: dotted paths of those holders that have other blocks between these, as those of time: each of these is a
            stack by itself.
        beside: dotted paths of classes with blocks of the same kind whose tokens are no image's, but those of one place
            in all frames: these blocks stay whole.
        frames: by dotted paths of denoisers, the axis of their latent that is of frames, where each frame goes through
            the blocks as an image of its own.
        lists: names of the lists of blocks that the image's tokens go through, where others of the same class have the
            text's; empty for all.
        roots: dotted paths of the denoisers, where they are no models of `diffusers`.
    """

    kind: ClassVar[str] = "denoiser"

    family: str
    holders: tuple[str, ...]
    blocks: tuple[Block, ...]
    grid: GridReader = field(default_factory=OfLatent)
    refused: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    mixing: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    frames: tuple[tuple[str, int], ...] = ()
    lists: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Dotted paths of the blocks, by which a family is recognised."""
        return tuple(block.path for block in self.blocks)
