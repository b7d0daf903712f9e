"""The feature that merges tokens in an encoder: every `"auto"` settled, its cost read off its modules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch.nn as nn
from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.encoder.attention import attention_forward
from turbovlm.encoder.block import block_forward
from turbovlm.encoder.cells import check_cells
from turbovlm.encoder.cross_attention import CrossAttention, check_cross_attention
from turbovlm.encoder.joint import joint_forward
from turbovlm.encoder.launches import LaunchWatch
from turbovlm.encoder.layout import Layout, fetch, path_of
from turbovlm.encoder.lookups import Lookups
from turbovlm.encoder.packed import packed_forward
from turbovlm.encoder.passed import Passed, check_adapters, of_effect, passed_by, through_module
from turbovlm.encoder.reading import reads_all, tower_forward
from turbovlm.encoder.schedule import (
    BlockSets,
    EncoderShape,
    Schedule,
    check_depth,
    is_sparse,
    literal_amounts,
    make_schedule,
    requested_amounts,
)
from turbovlm.encoder.state import STATE, State
from turbovlm.encoder.towers import Tower, check_readable, find_towers, matrix_entries
from turbovlm.encoder.verify import verify
from turbovlm.errors import ConfigError, StateError
from turbovlm.ops.degree import check_degree, needs_semantic
from turbovlm.ops.tracing import constant_in_graphs
from turbovlm.patching import Patch, check_forwards
from turbovlm.threads import Remembering

MOST_MERGES = 6
"""Blocks that merge by default at most, however deep an encoder is, as a merge costs the same launches and host time
whatever it merges: every second block of 12, which is what was judged (docs/defaults.md), and every fourth of 24."""
PARTITION_WORDS = {
    "all": "any patch into any other",
    "random": "random halves",
    "alternate": "even into odd",
    "grid": "one destination per 2×2 cell",
    "cells": "any square of patches into any other",
}


@dataclass(eq=False)
class EncoderFeature(Remembering[State]):
    """What the blocks of one accelerated encoder share.

    Attributes:
        config: the settings.
        layout: how its blocks are spelled.
        shape: what its cost depends on.
        tower: its path in the model; `names`: those of its blocks.
        native_tokens: tokens of an image of its native size, prefix and suffix included.
        own_blocks: those over which `blocks="auto"` spreads what is merged here, see `requested_amounts`.
        amounts: tokens asked of each block, where they are the same for every size of input; None where they are not.
        solved_by: all that they are solved by beside the input, as text: one for each answer of `solved_amounts`.
        guidance, similarity, partition: as in `TurboConfig`, settled.
        semantic: whether A is computed, for the degree or for the trace.
        how: how a position gets its token back, `"copy"` or `"residual"`.
        restore: the same, where every position gets it behind the last block; None where tokens are handed on merged.
        cross_attention: what cross-attends to its tokens, where these are handed on merged; None where nothing does.
        hands_out: whether blocks hand out every position where a call asks for it; not those of a tower that a
            vision-language model reads at one block.
        passed: modules of each block that its halves never call, see `turbovlm.encoder.passed`.
        reads_all: whether the tower's own pooling needs every position; `blocks_around`: how many blocks it has, those
            that nobody merges in included. Both as they were when turbovlm was applied.
        unknown_owner: the class of the module that reads the tower, where nothing is known of how.
        pair: whether attention returns its tokens and its map, rather than its tokens alone.
        plain_stem: whether the patch embedding is one projection, so that the cost of the whole encoder is known.
        implied: whether nobody asked for merges in it: it only leaves out what `pixel_tolerance` says.
        launches: whether a GPU waits for Python in its forwards; `lookups`: what these know of their blocks.
        removed, last: as in `turbovlm.patching.Feature`; `last` is the state that the last forward of this thread has
            come to.
    """

    config: TurboConfig
    layout: Layout
    shape: EncoderShape
    tower: str
    names: tuple[str, ...]
    native_tokens: int
    own_blocks: BlockSets
    amounts: tuple[int, ...] | None
    solved_by: str
    guidance: str
    similarity: str
    partition: str
    semantic: bool
    how: str
    restore: str | None
    cross_attention: CrossAttention | None
    hands_out: bool
    passed: Passed
    reads_all: bool
    blocks_around: int
    unknown_owner: str | None
    plain_stem: bool
    pair: bool = True
    implied: bool = False
    removed: bool = False
    launches: LaunchWatch = field(default_factory=LaunchWatch, repr=False)
    lookups: Lookups = field(default_factory=Lookups, repr=False)

    @constant_in_graphs
    def solved_amounts(self, tokens: int, prefix: int, solved_by: str) -> tuple[int, ...]:
        """How many tokens each block is asked to merge, of an input of `tokens` tokens.

        A method, as Dynamo of torch 2.11 wants constants for all arguments of such a function, but not for `self`. Its
        guards know these arguments alone: without `solved_by`, the feature's own, a graph of a block that was compiled
        by itself would serve other settings as well.
        """
        return requested_amounts(self.config, replace(self.shape, prefix=prefix), tokens, self.own_blocks)

    def patches(self, model: nn.Module) -> list[Patch]:
        """The forward of every block and of its attention, the tower's methods, and what joins text and image."""
        blocks = [model.get_submodule(name) for name in self.names]
        tower = model.get_submodule(self.tower)
        found = [Patch(tower, name, tower_forward, self) for name in self.layout.entries if hasattr(tower, name)]
        run = packed_forward if self.layout.packed else block_forward
        found += [Patch(block, "forward", run, self, index) for index, block in enumerate(blocks)]
        if self.layout.attention is not None:
            attentions = [fetch(block, self.layout.attention) for block in blocks]
            found += [Patch(attention, "forward", attention_forward, self) for attention in attentions]
        if self.layout.joint is not None:
            joint = fetch(tower, path_of(self.layout.family, tower, self.layout.joint))
            found.append(Patch(joint, "forward", joint_forward, self, by_name=True))
        return found

    def schedule(self, tokens: int | None = None) -> Schedule:
        """What every block does with an input of `tokens` tokens; of the native number if None."""
        tokens = tokens or self.native_tokens
        return make_schedule(self.config, self.shape, tokens, self.tower, self.names, self.own_blocks)

    def restored(self, tokens: Tensor, block: int | None = None) -> Tensor:
        """Every position of an input with its token's value; see `Handle.restore`.

        Raises:
            StateError: no forward has ended yet, or the tokens are not those of the last one.
            ConfigError: there is no such block.
        """
        if self.layout.packed and tokens.ndim == 2 and not hasattr(tokens, STATE):
            return self.restored(tokens.unsqueeze(0), block).squeeze(0)
        state: State | None = getattr(tokens, STATE, None)
        if state is not None:  # the very output of a block: it knows
            source = None if state.tokens is not None else state.source()
        else:
            source = self._source_of(tokens, block)
        if source is None:
            return tokens
        index = source.reshape(*source.shape, *(1,) * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
        return tokens.gather(1, index)

    def _source_of(self, tokens: Tensor, block: int | None) -> Tensor | None:
        """For every position of the last forward's input its place in `tokens`; None where they are the same."""
        state = self.last
        if state is None:
            raise StateError("nothing to restore yet: run the model first")
        lengths, depth = state.lengths, len(state.lengths) - 1
        if block is not None and (isinstance(block, bool) or not isinstance(block, int) or not 0 <= block <= depth):
            raise ConfigError(
                f"block={block!r}: must be an integer from 0 to {depth}, the number of blocks that have run"
            )
        allowed = {*lengths} if block is None else {lengths[0], lengths[block]}
        batch = state.merges[0].sizes.shape[0] if state.merges else None
        if tokens.ndim < 2 or tokens.shape[1] not in allowed or tokens.shape[0] != (batch or tokens.shape[0]):
            expected = " or ".join(str((batch, length)) for length in sorted(allowed))
            raise StateError(
                f"tokens of shape {tuple(tokens.shape)} are not the last forward's: expected {expected} in front "
                "(batch, tokens with CLS and registers)"
            )
        left = [lengths[0], *(merge.sizes.shape[1] for merge in state.merges)]
        return state.source(left.index(tokens.shape[1]))

    def describe(self) -> list[str]:
        """Tokens and multiply-accumulates of an input of native size, block by block, and of the last forward's."""
        if self.implied:
            found = f"  {self.tower}: cells of patches that another stands for are left out before {self.names[0]}"
            lengths = () if self.last is None else self.last.lengths
            return [found, *([f"    last forward: {lengths[0]} → {lengths[-1]} patches"] if lengths else [])]
        schedule = self.schedule()
        tokens, before, after = schedule.tokens, sum(schedule.macs_before), sum(schedule.macs_after)
        lines = [
            f"  {schedule.tower or 'model'}: {len(schedule.blocks)} blocks, {tokens[0]} → {tokens[-1]} tokens, "
            f"merged in {sum(r > 0 for r in schedule.merged)} of them, "
            f"{before / 1e9:.2f} → {after / 1e9:.2f} GMACs in the blocks, {schedule.ratio:.1%} of the encoder's left, "
            f"guided by {self.guidance}, similarity of {self.similarity}, {PARTITION_WORDS[self.partition]}"
        ]
        lines += [
            f"    {block}: {tokens[i]} → {tokens[i + 1]} tokens, "
            f"{schedule.macs_before[i] / 1e9:.3f} → {schedule.macs_after[i] / 1e9:.3f} GMACs"
            for i, block in enumerate(schedule.blocks)
        ]
        if self.restore:
            reader = f", as {self.unknown_owner} is not known to do without" if self.unknown_owner else ""
            lines.append(f"    after {schedule.blocks[-1]}: restored to {tokens[0]} tokens ({self.restore}){reader}")
        if self.cross_attention is not None and not self.restore:
            how = "in proportion to their sizes" if self.config.proportional else "all alike"
            reader = self.cross_attention.text_model
            lines.append(f"    after {schedule.blocks[-1]}: {reader} cross-attends to merged tokens, {how}")
        lines += self._describe_last()
        if not self.plain_stem:
            lines.append("    note: the convolutional network before the blocks is not counted")
        if schedule.note:
            lines.append(f"    note: {schedule.note}")
        return lines

    def _describe_last(self) -> list[str]:
        """What the last forward did, where its input was of another size."""
        state = self.last
        if state is None or state.lengths[0] == self.native_tokens:
            return []
        found, depth = f"    last forward: {state.lengths[0]} → {state.lengths[-1]} tokens", len(state.lengths) - 1
        if depth < len(self.names):
            return [f"{found} in its first {depth} blocks"]
        if self.config.thresholds is not None or self.layout.packed:  # of several images, each by its own size
            return [found]
        return [f"{found}, {self.schedule(state.lengths[0]).ratio:.1%} of the encoder's GMACs left"]


def find_encoders(model: nn.Module, config: TurboConfig) -> list[EncoderFeature]:
    """A feature for each encoder in `model`, once its blocks were found to do what their layout says.

    Raises:
        ConfigError: settings that one of the encoders cannot have.
        TurboError: a block's forward was replaced by another library.
        UnsupportedModelError: there is no encoder, or one that cannot lose tokens, or one that its layout is wrong of.
    """
    towers = find_towers(model)
    features = [plan_encoder(tower, config) for tower in towers]
    for tower, feature in zip(towers, features):
        check_forwards([(tower.name, tower.module)], one_device=False)
        check_forwards(tower.blocks)
        path = tower.layout.attention
        if path is not None:
            check_forwards([(f"{name}.{path}", fetch(block, path)) for name, block in tower.blocks], one_device=False)
        for name, block in tower.blocks:
            check_adapters(name, block, feature.passed)
        if feature.cross_attention is not None and not feature.cross_attention.restored:
            check_cross_attention(feature.cross_attention, model, config.proportional)
    for tower, feature in zip(towers, features):
        calls = verify(tower, feature.passed)
        feature.passed = of_effect(feature.passed, tower.blocks[0][1], calls)
        feature.pair = calls is None or calls.pair
        for name, block in tower.blocks:
            through_module(tower.layout, name, block, feature.passed)
    return features


def plan_encoder(tower: Tower, config: TurboConfig) -> EncoderFeature:
    """How an encoder that was found will merge.

    Raises:
        ConfigError: settings that this encoder cannot have.
    """
    check_depth(config, len(tower.blocks), tower.name)
    check_degree(config.degree, len(tower.blocks), next(tower.blocks[0][1].parameters()).device)
    if config.guidance == "cls" and not tower.cls:
        raise ConfigError(
            f"guidance='cls': {tower.title} ({tower.layout.family}) has no CLS token; use 'mean' or 'auto'"
        )
    if config.flops is not None and not tower.plain_stem:
        raise ConfigError(
            f"flops={config.flops}: {tower.title} begins with a convolutional network whose cost does not follow from "
            "its shape; use r or keep"
        )
    if config.partition == "grid" and tower.layout.line:
        raise ConfigError(
            f"partition='grid': the tokens of {tower.title} ({tower.layout.family}) follow each other in time, and lie "
            "on no grid; use 'random' or 'alternate'"
        )
    check_cells(tower, config)
    text = tower.layout.text
    similarity = ("hidden" if text else "heads") if config.similarity == "auto" else config.similarity
    own_blocks = own_blocks_of(tower, config)
    partition = config.partition
    if partition == "auto":
        is_image = not (text or tower.layout.line)
        is_few = bool(own_blocks) or is_sparse(config, len(tower.blocks))
        partition = "all" if is_image and is_few and config.order == "spatial" else "random"
    restore = ("copy" if tower.layout.norm_after_mlp else "residual") if config.restore == "auto" else config.restore
    shape, across = _shape(tower, similarity, partition), tower.cross_attention
    return EncoderFeature(
        config=config,
        layout=tower.layout,
        shape=shape,
        tower=tower.name,
        names=tuple(name for name, _ in tower.blocks),
        native_tokens=tower.tokens,
        own_blocks=own_blocks,
        amounts=literal_amounts(config, len(tower.blocks), own_blocks, shape.merging, shape.unit),
        solved_by=f"{config.amount}, {config.blocks}, {config.min_tokens}, {config.grid}, {own_blocks}, {shape}",
        guidance=("cls" if tower.cls else "mean") if config.guidance == "auto" else config.guidance,
        similarity=similarity,
        partition=partition,
        semantic=needs_semantic(config.degree) or config.trace,
        how=restore,
        restore=restore if tower.restore or config.dense else None,
        cross_attention=across and replace(across, restored=config.dense),
        hands_out=tower.hands_out,
        passed=passed_by(tower.layout, tower.blocks[0][1]),
        reads_all=reads_all(tower.layout, tower.module),
        blocks_around=tower.blocks_around,
        unknown_owner=tower.unknown_owner,
        plain_stem=tower.plain_stem,
    )


def own_blocks_of(tower: Tower, config: TurboConfig) -> BlockSets:
    """The sets of blocks in which this tower merges by itself; none where every block does, or the settings say which.

    Few blocks are better where any two patches may merge, and only there: neither in halves nor along a line.
    """
    layout, depth = tower.layout, len(tower.blocks)
    asked = config.blocks == "auto" and not isinstance(config.r, tuple)
    pairs = config.partition in ("auto", "all", "cells") and config.order == "spatial"
    if not asked or layout.text or layout.line or not pairs:
        return ()
    if layout.windows is not None:
        whole = tuple(block for block, window in enumerate(layout.windows(tower.module)) if window == 0)
        return tuple(blocks for blocks in (tuple(block for block in whole if block < depth - 1), whole) if blocks)
    shares = layout.blocks_at(tower.module) if callable(layout.blocks_at) else layout.blocks_at
    if not shares:
        return (tuple(range(0, depth, max(2, math.ceil(depth / MOST_MERGES)))),)
    return tuple(tuple(sorted({min(round(share * depth), depth - 1) for share in each})) for each in shares)


def _shape(tower: Tower, similarity: str, partition: str) -> EncoderShape:
    layout, widths = tower.layout, tower.attention_widths
    behind = (*layout.mlp, *(() if layout.end is None or callable(layout.project) else layout.calls))
    in_mlp = [
        sum(matrix_entries(fetch(block, path), f"{name}.{path}") for path in behind) for name, block in tower.blocks
    ]
    if not callable(layout.project):
        for name, block in tower.blocks:
            for path in layout.project:
                check_readable(fetch(block, path), f"{name}.{path}")
    everything = [matrix_entries(block, name) for name, block in tower.blocks]
    heads = [int(fetch(block, layout.heads)) for _, block in tower.blocks]
    if similarity == "hidden":
        compared = (tower.hidden_size,) * len(widths)
    else:
        compared = widths if similarity == "heads" else tuple(width // count for width, count in zip(widths, heads))
    return EncoderShape(
        attention_weights=tuple(whole - mlp for whole, mlp in zip(everything, in_mlp)),
        mlp_weights=tuple(in_mlp),
        attention_widths=widths,
        hidden_size=tower.hidden_size,
        similarity_width=compared,
        patch_weights=tower.patch_weights,
        prefix=tower.prefix,
        suffix=tower.suffix,
        partition=partition,
        unit=tower.cell**2 if partition == "cells" else 1,
        windows=() if layout.windows is None else layout.windows(tower.module),
    )
