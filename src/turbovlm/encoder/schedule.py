"""How many tokens each block gives up.

A list of `r` is taken as it is. An integer is a mean over the encoder's blocks, so it says a total; `keep` and `flops`
are solved for one. A total is spread evenly over the blocks that merge. Every amount is then clamped as in the paper:
at most half of the tokens that may merge, and nothing in a block that starts with fewer than `min_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from turbovlm.config import TurboConfig
from turbovlm.errors import ConfigError
from turbovlm.ops.partition import window_count

BlockSets = tuple[tuple[int, ...], ...]
"""Sets of blocks, counted from 0, of which one is to merge; in order of preference."""

FLOPS_TOLERANCE = 0.01
"""How far a share of the multiply-accumulates may be from the one asked for before it is called out of reach."""


@dataclass(frozen=True)
class EncoderShape:
    """What the cost of one encoder depends on, read off its modules. All counts are per image.

    Args:
        attention_weights: entries of the projection matrices before the merge, per block.
        mlp_weights: entries of the MLP's matrices, after the merge, per block.
        attention_widths: heads × head_dim, per block.
        hidden_size: width of a token.
        similarity_width: width of the features compared (head_dim for keys, hidden_size for hidden), per block.
        patch_weights: entries of the patch embedding's kernel.
        prefix: CLS, distillation and register tokens at the front, which are never merged.
        suffix: tokens behind the patches, which are never merged.
        partition: as in `TurboConfig`, settled: who is compared with whom.
        unit: tokens that merge together: those of a square of patches for `partition="cells"`.
        windows: for each block, tokens of a window that it attends within, 0 where it attends to whole images, and
            only there tokens merge; empty where all blocks do. They are counted as if nothing had merged in them.
    """

    attention_weights: tuple[int, ...]
    mlp_weights: tuple[int, ...]
    attention_widths: tuple[int, ...]
    hidden_size: int
    similarity_width: tuple[int, ...]
    patch_weights: int
    prefix: int
    suffix: int = 0
    partition: str = "alternate"
    unit: int = 1
    windows: tuple[int, ...] = ()

    @property
    def merging(self) -> Sequence[int]:
        """The blocks that may merge."""
        return [block for block in range(self.depth) if not self.windows or self.windows[block] == 0]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.attention_weights)

    @property
    def protected(self) -> int:
        """Number of tokens that are never merged."""
        return self.prefix + self.suffix

    def block_macs(self, block: int, before: int, after: int) -> int:
        """Multiply-accumulates of one block: projections, attention, similarity, MLP, and norms."""
        width = self.attention_widths[block]
        seen = min(before, self.windows[block] or before) if self.windows else before
        macs = before * self.attention_weights[block] + 2 * before * seen * width
        macs += after * self.mlp_weights[block] + 5 * self.hidden_size * (before + after)
        if after < before:
            macs += self._pairs((before - self.protected) // self.unit) * self.similarity_width[block] * self.unit
        return macs

    def _pairs(self, patches: int) -> int:
        """How many pairs of patches a merge compares."""
        pairs = patches**2 if self.partition in ("all", "cells") else patches // 2 * (patches - patches // 2)
        return pairs // (window_count(patches) if self.partition in ("random", "all", "cells") else 1)

    def macs(self, tokens: Sequence[int]) -> int:
        """Multiply-accumulates of the encoder with `tokens[l]` tokens before block l and `tokens[-1]` at its end."""
        blocks = sum(self.block_macs(i, tokens[i], tokens[i + 1]) for i in range(self.depth))
        return blocks + (tokens[0] - self.protected) * self.patch_weights + 5 * self.hidden_size * tokens[-1]


@dataclass(frozen=True)
class Schedule:
    """What one encoder does with a number of tokens.

    Attributes:
        tower: path of the encoder in the model; empty where it is the model itself.
        blocks: paths of its blocks.
        tokens: tokens before the first block, then after each block.
        macs_before: multiply-accumulates of each block without merging.
        macs_after: the same with merging.
        ratio: share of the encoder's multiply-accumulates left, patch embedding and final norm included.
        asked: the amount asked for, such as `"keep=0.25"` or `"r=16 per block on average"`.
        note: empty, or which part of what was asked for was not possible.
    """

    tower: str
    blocks: tuple[str, ...]
    tokens: tuple[int, ...]
    macs_before: tuple[int, ...]
    macs_after: tuple[int, ...]
    ratio: float
    asked: str
    note: str

    @property
    def merged(self) -> tuple[int, ...]:
        """Tokens merged in each block."""
        return tuple(a - b for a, b in zip(self.tokens, self.tokens[1:]))


def clamp(r: int, tokens: int, protected: int, min_tokens: int, unit: int = 1) -> int:
    """Tokens that a block with `tokens` tokens can give up when asked for `r`: at most half of those that may merge.

    `protected` tokens, prefix and suffix, never merge. The others merge in cells of `unit` tokens.
    """
    if tokens < min_tokens:
        return 0
    if unit == 1:
        return min(r, max(tokens - protected, 0) // 2)
    return min(r // unit, (tokens - protected) // unit // 2) * unit


def token_counts(
    amounts: Sequence[int], tokens: int, protected: int, min_tokens: int, fixed: int = 0, unit: int = 1
) -> tuple[int, ...]:
    """Tokens before the first block and after each, when block l is asked for `amounts[l]`, in cells of `unit`.

    `fixed` tokens beside the protected ones can never merge: the destinations of `partition="grid"`.
    """
    counts = [tokens]
    for r in amounts:
        left = counts[-1]
        counts.append(left - min(clamp(r, left, protected, min_tokens, unit), left - protected - fixed))
    return tuple(counts)


def fixed_destinations(config: TurboConfig, patches: int) -> int:
    """Patches that are destinations in every block: one per 2×2 cell with `partition="grid"`, else none."""
    if config.partition != "grid":
        return 0
    rows, columns = config.grid or (math.isqrt(patches), math.isqrt(patches))
    return min((rows + 1) // 2 * ((columns + 1) // 2), patches)


def spread(total: int, depth: int) -> tuple[int, ...]:
    """`total` tokens over `depth` blocks, as evenly as integers allow."""
    return tuple((i + 1) * total // depth - i * total // depth for i in range(depth))


def spread_over(total: int, blocks: Sequence[int], depth: int, unit: int = 1) -> tuple[int, ...]:
    """`total` tokens over some of `depth` blocks, as evenly as cells of `unit` allow; nothing in the others."""
    return _placed([unit * cells for cells in spread(total // unit, len(blocks))], blocks, depth)


def _placed(amounts: Sequence[int], blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """Amounts of some blocks as amounts of all `depth` blocks."""
    shares = dict(zip(blocks, amounts))
    return tuple(shares.get(block, 0) for block in range(depth))


def check_depth(config: TurboConfig, depth: int, tower: str) -> None:
    """See that a list of `r` has a number for every block, and that there are all of `blocks`.

    Raises:
        ConfigError: saying how many blocks there are.
    """
    where = f" in {tower!r}" if tower else ""
    if isinstance(config.r, tuple) and not isinstance(config.blocks, tuple) and len(config.r) != depth:
        raise ConfigError(f"r has {len(config.r)} entries, but the encoder{where} has {depth} blocks")
    if isinstance(config.blocks, tuple) and config.blocks[-1] >= depth:
        raise ConfigError(
            f"blocks={list(config.blocks)}: the encoder{where} has {depth} blocks, counted from 0 to {depth - 1}"
        )


def is_sparse(config: TurboConfig, depth: int) -> bool:
    """Whether some blocks are asked to merge by name or by `r`, and at most half of them."""
    amounts = literal_amounts(config, depth)
    if amounts is not None:
        return 0 < sum(amount > 0 for amount in amounts) <= depth / 2
    return isinstance(config.blocks, tuple) and len(config.blocks) <= depth / 2


def literal_amounts(
    config: TurboConfig, depth: int, own: BlockSets = (), merging: Sequence[int] | None = None, unit: int = 1
) -> tuple[int, ...] | None:
    """Tokens asked of each block where an input of any size is asked for the same; None where they hang on its size.

    Args:
        own: as in `requested_amounts`.
        merging, unit: as in `EncoderShape`.
    """
    if config.r is None or (own and config.blocks == "auto" and not isinstance(config.r, tuple)):
        return None
    if isinstance(config.r, tuple):
        return _placed(config.r, config.blocks if isinstance(config.blocks, tuple) else range(depth), depth)
    every = range(depth) if merging is None else merging
    blocks = config.blocks if isinstance(config.blocks, tuple) else every
    return spread_over(cast(int, config.r) * depth, blocks, depth, unit)


@lru_cache(maxsize=1024)
def requested_amounts(config: TurboConfig, shape: EncoderShape, tokens: int, own: BlockSets = ()) -> tuple[int, ...]:
    """Tokens asked of each block, before clamping, for an input of `tokens` tokens.

    Args:
        own: the blocks over which `blocks="auto"` spreads a total in this family: the first of these sets whose blocks
            all have their share to give; for `keep` and `flops` else the last, if it comes near; or else every block.
    """
    depth, unit = shape.depth, shape.unit
    literal = literal_amounts(config, depth, own, shape.merging, unit)
    if literal is not None:
        return literal
    if config.r is not None:
        total = cast(int, config.r) * depth
        shared = [spread_over(total, blocks, depth, unit) for blocks in (*own, shape.merging)]
        return next((each for each in shared if _has_enough(config, shape, tokens, each)), shared[-1])
    if isinstance(config.blocks, tuple):
        return _closest(config, shape, tokens, config.blocks)[0]
    for blocks in own if config.blocks == "auto" else ():
        found, is_near = _closest(config, shape, tokens, blocks)
        if is_near and (blocks == own[-1] or _has_enough(config, shape, tokens, found)):
            return found
    return _closest(config, shape, tokens, shape.merging)[0]


def _has_enough(config: TurboConfig, shape: EncoderShape, tokens: int, amounts: Sequence[int]) -> bool:
    """Whether every block can give what it is asked for."""
    fixed = fixed_destinations(config, tokens - shape.protected)
    counts = token_counts(amounts, tokens, shape.protected, config.min_tokens, fixed, shape.unit)
    return all(before - after == r for before, after, r in zip(counts, counts[1:], amounts))


def _closest(
    config: TurboConfig, shape: EncoderShape, tokens: int, blocks: Sequence[int]
) -> tuple[tuple[int, ...], bool]:
    """The amounts, evenly spread over blocks, that come closest to the aim, and whether they meet it.

    Of equals, those that merge the fewest tokens.
    """
    cost, target, tolerance = _aim(config, shape, tokens)
    best, best_gap = spread(0, shape.depth), abs(cost((tokens,) * (shape.depth + 1)) - target)
    previous: tuple[int, ...] = ()
    fixed = fixed_destinations(config, tokens - shape.protected)
    for total in range(shape.unit, len(blocks) * (tokens // 2) + 1, shape.unit):
        amounts = spread_over(total, blocks, shape.depth, shape.unit)
        counts = token_counts(amounts, tokens, shape.protected, config.min_tokens, fixed, shape.unit)
        if counts == previous:
            continue
        previous = counts
        gap = abs(cost(counts) - target)
        if gap < best_gap:
            best, best_gap = amounts, gap
    return best, best_gap <= tolerance


def _aim(
    config: TurboConfig, shape: EncoderShape, tokens: int
) -> tuple[Callable[[tuple[int, ...]], int], float, float]:
    """What is to come to which value, the tokens left or the multiply-accumulates, and how near is near enough."""
    if config.keep is not None:
        return lambda counts: counts[-1], max(round(config.keep * tokens), shape.protected), shape.unit
    assert config.flops is not None
    full = shape.macs((tokens,) * (shape.depth + 1))
    return shape.macs, config.flops * full, FLOPS_TOLERANCE * full


def make_schedule(
    config: TurboConfig,
    shape: EncoderShape,
    tokens: int,
    tower: str,
    blocks: tuple[str, ...],
    own: BlockSets = (),
) -> Schedule:
    """The schedule for an input of `tokens` tokens, with what could not be reached in its `note`."""
    amounts = requested_amounts(config, shape, tokens, own)
    fixed = fixed_destinations(config, tokens - shape.protected)
    counts = token_counts(amounts, tokens, shape.protected, config.min_tokens, fixed, shape.unit)
    full = (tokens,) * (shape.depth + 1)
    ratio = shape.macs(counts) / shape.macs(full)
    return Schedule(
        tower=tower,
        blocks=blocks,
        tokens=counts,
        macs_before=tuple(shape.block_macs(i, tokens, tokens) for i in range(shape.depth)),
        macs_after=tuple(shape.block_macs(i, counts[i], counts[i + 1]) for i in range(shape.depth)),
        ratio=ratio,
        asked=f"{config.amount} per block on average" if isinstance(config.r, int) else config.amount,
        note=_shortfall(config, amounts, counts, ratio, shape.unit),
    )


def _shortfall(config: TurboConfig, amounts: Sequence[int], counts: Sequence[int], ratio: float, unit: int) -> str:
    if config.r is not None:
        short = [i for i, r in enumerate(amounts) if counts[i] - counts[i + 1] < r]
        if not short:
            return ""
        merging = sum(r > 0 for r in amounts)
        return (
            f"{config.amount} is more than {len(short)} of {merging} merging blocks have to give "
            f"(from block {short[0]} on): half of a block's tokens at most, none below min_tokens={config.min_tokens}"
        )
    if config.keep is not None:
        reached = counts[-1] / counts[0]
        missed = abs(counts[-1] - config.keep * counts[0]) > unit
        return f"keep={config.keep} is out of reach: {reached:.3f} of the tokens are left" if missed else ""
    assert config.flops is not None
    missed = abs(ratio - config.flops) > FLOPS_TOLERANCE
    return f"flops={config.flops} is out of reach: {ratio:.3f} is the closest" if missed else ""
