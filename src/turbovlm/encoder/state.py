"""What one forward carries from block to block.

The state is an attribute of the hidden-state tensor itself, so it travels through every library's loop over its blocks
and belongs to one forward: threads and re-entrant calls never share it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turbovlm.ops.merging import Merge, Ranking
from turbovlm.ops.partition import positions
from turbovlm.ops.segments import Segments

STATE = "_turbovlm"
"""Name of the attribute of the hidden states that carries the state."""
ASKED = "_turbovlm_asked"
"""Name of the attribute of a packed tower's first hidden states that says what the call asks of its blocks."""
MERGED = "_turbovlm_merged"
"""Name of the attribute of the tokens that an encoder hands on: `turbovlm.encoder.cross_attention.Merged`."""
PREFIX = "_turbovlm_prefix"
"""Name of the attribute of an encoder's input that says how many tokens in front never merge, where that varies."""


@dataclass(frozen=True)
class BlockTrace:
    """What one block of the last forward did.

    Attributes:
        name: the block's path in the model; `block`: its index in its encoder.
        prefix: CLS, distillation and register tokens at the front.
        suffix: tokens behind the patches that never merge.
        source: for every token of the encoder's input, the token it is part of after this block, `[batch, N0]`.
        sizes: patches that each token stands for after this block, `[batch, M]`.
        redundancy: R, `[batch, N]` over the tokens before the merge; NaN for tokens that are no candidates.
        semantic: A, `[batch, N]`.
        degree: E, `[batch, N]`; NaN for tokens that are no candidates.
    """

    name: str
    block: int
    prefix: int
    suffix: int
    source: Tensor
    sizes: Tensor
    redundancy: Tensor
    semantic: Tensor
    degree: Tensor


@dataclass(frozen=True)
class State:
    """What the tokens of one forward have become after some of the blocks.

    Attributes:
        block: the block that comes next.
        amounts: tokens asked of each block.
        prefix: tokens in front that are never merged; `suffix`: those behind the patches.
        sizes: patches each token stands for, `[batch, tokens]`; None while every token counts as one.
        logs: `log_sizes` of them, where they are known.
        merges: one per merge so far; `lost`: what each has lost (`Merge.lost`), where it is to be given back, None of
            one whose loss is not.
        positions: the input patch in whose place each patch token stands, `[batch, patches]`, for rotary positions;
            None before the first merge. `entered`: the same in front of the first block; None where all are.
        destinations: where the fixed destinations of `partition="grid"` are, `[batch, destinations]`; None before the
            first merge.
        cells: the tokens of each square of patches that merges as one, `[batch, cells, tokens of a cell]`; None before
            the first merge, and in packed sequences, where they lie together.
        segments: which tokens of a packed sequence attend to each other in this block; None of a batch of images.
            `spare`: how many each segment is to give up.
        traces: one per block so far, with `trace=True`.
        padded: whether some tokens are padding, of size 0.
        whole: indices of the blocks that are asked for every position; see `turbovlm.encoder.reading`.
        maps: whether attention maps are asked for.
        lengths: tokens of the input, and behind each block so far.
        hooked: whether hooks on the block behind may have replaced what it handed on.
        tokens: the merged tokens, `[batch, M, width]`, where what was handed on is restored to every position; else
            None. `version`: how often what was handed on had been changed in place by then, where that is counted.
    """

    block: int
    amounts: tuple[int, ...]
    prefix: int
    suffix: int = 0
    sizes: Tensor | None = None
    logs: Tensor | None = None
    merges: tuple[Merge, ...] = ()
    lost: tuple[Tensor | None, ...] = ()
    positions: Tensor | None = None
    entered: Tensor | None = None
    destinations: Tensor | None = None
    cells: Tensor | None = None
    segments: Segments | None = None
    spare: tuple[int, ...] = ()
    traces: tuple[BlockTrace, ...] = ()
    padded: bool = False
    whole: frozenset[int] = frozenset()
    maps: bool = False
    lengths: tuple[int, ...] = ()
    hooked: bool = False
    tokens: Tensor | None = None
    version: int | None = None

    def changed(self, **changes: Any) -> State:
        """`dataclasses.replace`, without its detours where no compiler traces it: every block asks."""
        if torch.compiler.is_compiling():
            return replace(self, **changes)
        new = object.__new__(State)
        new.__dict__.update(self.__dict__)
        new.__dict__.update(changes)
        return new

    def restored(self, x: Tensor) -> Tensor:
        """Every position of the input with its token's row of `x`, `[batch, M, width]`, and what merges have lost."""
        lost = self.lost or (None,) * len(self.merges)
        for merge, apart in zip(reversed(self.merges), reversed(lost)):
            x = merge.unmerge(x, apart)
        return x

    def source(self, merges: int | None = None) -> Tensor | None:
        """For every token of the input, the token it is part of now, `[batch, N0]`; None before the first merge.

        Args:
            merges: how many of the merges count; all if None.
        """
        counted = self.merges[:merges]
        if not counted:
            return None
        source = counted[0].source
        for merge in counted[1:]:
            source = merge.source.gather(1, source)
        return source


def traced(name: str, state: State, x: Tensor, ranking: Ranking, semantic: Tensor) -> BlockTrace:
    """What the block that has just merged did, by `ranking`, to what is `x`, `[batch, M, width]`, now."""
    batch, device, tokens = x.shape[0], x.device, ranking.tokens
    candidates = positions(ranking.partition.candidates, device).expand(batch, -1)

    def everywhere(values: Tensor) -> Tensor:
        return values.new_full((batch, tokens), torch.nan).scatter(1, candidates, values)

    source = state.source()
    if source is None:
        source = torch.arange(tokens, device=device).expand(batch, -1)
    sizes = state.sizes
    if sizes is None:
        sizes = torch.ones(batch, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=device)
    return BlockTrace(
        name=name,
        block=state.block,
        prefix=state.prefix,
        suffix=state.suffix,
        source=source,
        sizes=sizes,
        redundancy=everywhere(ranking.redundancy),
        semantic=semantic,
        degree=everywhere(ranking.degree),
    )
