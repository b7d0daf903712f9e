"""The feature that merges tokens in an encoder: every `"auto"` settled, its cost read off its modules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn as nn
from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.encoder.block import block_forward
from turbovlm.encoder.joint import joint_forward
from turbovlm.encoder.layout import Layout, fetch, path_of
from turbovlm.encoder.schedule import EncoderShape, Schedule, check_depth, make_schedule, requested_amounts
from turbovlm.encoder.state import State
from turbovlm.encoder.towers import Tower, check_readable, find_towers, matrix_entries
from turbovlm.encoder.verify import verify
from turbovlm.errors import ConfigError, StateError
from turbovlm.ops.degree import needs_semantic
from turbovlm.ops.tracing import constant_in_graphs
from turbovlm.patching import Patch, check_forwards


@dataclass(eq=False)
class EncoderFeature:
    """What the blocks of one accelerated encoder share.

    Attributes:
        config: the settings.
        layout: how its blocks are spelled.
        shape: what its cost depends on.
        tower: its path in the model; `names`: those of its blocks.
        native_tokens: tokens of an image of its native size, prefix and suffix included.
        guidance, similarity: as in `TurboConfig`, settled.
        semantic: whether A is computed, for the degree or for the trace.
        restore: how every position gets its token back behind the last block, `"copy"` or `"residual"`; None where
            tokens are handed on merged.
        plain_stem: whether the patch embedding is one projection, so that the cost of the whole encoder is known.
        removed, last: as in `turbovlm.patching.Feature`; `last` is the state at the end of the last forward.
    """

    config: TurboConfig
    layout: Layout
    shape: EncoderShape
    tower: str
    names: tuple[str, ...]
    native_tokens: int
    guidance: str
    similarity: str
    semantic: bool
    restore: str | None
    plain_stem: bool
    removed: bool = False
    last: State | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    @constant_in_graphs
    def solved_amounts(self, tokens: int, prefix: int) -> tuple[int, ...]:
        """How many tokens each block is asked to merge, of an input of `tokens` tokens.

        A method, as Dynamo of torch 2.11 wants constants for all arguments of such a function, but not for `self`.
        """
        return requested_amounts(self.config, replace(self.shape, prefix=prefix), tokens)

    def patches(self, model: nn.Module) -> list[Patch]:
        """The forward of every block, and of what joins text and image where the layout has it."""
        blocks = [model.get_submodule(name) for name in self.names]
        found = [Patch(block, "forward", block_forward, self, index) for index, block in enumerate(blocks)]
        if self.layout.joint is not None:
            tower = model.get_submodule(self.tower)
            joint = fetch(tower, path_of(self.layout.family, tower, self.layout.joint))
            found.append(Patch(joint, "forward", joint_forward, self, by_name=True))
        return found

    def schedule(self, tokens: int | None = None) -> Schedule:
        """What every block does with an input of `tokens` tokens; of the native number if None."""
        return make_schedule(self.config, self.shape, tokens or self.native_tokens, self.tower, self.names)

    def restored(self, tokens: Tensor) -> Tensor:
        """Every position of the last forward's input with its token's value; see `Handle.restore`.

        Raises:
            StateError: no forward has ended yet, or the tokens are not those of the last one.
        """
        if self.last is None:
            raise StateError("nothing to restore yet: run the model first")
        source = self.last.source()
        if source is None or (self.restore and tokens.shape[:2] == source.shape):
            return tokens
        merged = self.last.merges[-1].sizes.shape
        if tokens.ndim < 2 or tokens.shape[:2] != merged:
            raise StateError(
                f"tokens of shape {tuple(tokens.shape)} are not the last forward's: expected {tuple(merged)} in front "
                "(batch, tokens with CLS and registers)"
            )
        index = source.reshape(*source.shape, *(1,) * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
        return tokens.gather(1, index)

    def describe(self) -> list[str]:
        """Tokens and multiply-accumulates, block by block."""
        schedule = self.schedule()
        tokens, before, after = schedule.tokens, sum(schedule.macs_before), sum(schedule.macs_after)
        lines = [
            f"  {schedule.tower or 'model'}: {len(schedule.blocks)} blocks, {tokens[0]} → {tokens[-1]} tokens, "
            f"{before / 1e9:.2f} → {after / 1e9:.2f} GMACs in the blocks, {schedule.ratio:.1%} of the encoder's left, "
            f"guided by {self.guidance}, similarity of {self.similarity}"
        ]
        lines += [
            f"    {block}: {tokens[i]} → {tokens[i + 1]} tokens, "
            f"{schedule.macs_before[i] / 1e9:.3f} → {schedule.macs_after[i] / 1e9:.3f} GMACs"
            for i, block in enumerate(schedule.blocks)
        ]
        if self.restore:
            lines.append(f"    after {schedule.blocks[-1]}: restored to {tokens[0]} tokens ({self.restore})")
        if not self.plain_stem:
            lines.append("    note: the convolutional network before the blocks is not counted")
        if schedule.note:
            lines.append(f"    note: {schedule.note}")
        return lines


def find_encoders(model: nn.Module, config: TurboConfig) -> list[EncoderFeature]:
    """A feature for each encoder in `model`, once its blocks were found to do what their layout says.

    Raises:
        ConfigError: settings that one of the encoders cannot have.
        TurboError: a block's forward was replaced by another library.
        UnsupportedModelError: there is no encoder, or one that cannot lose tokens, or one that its layout is wrong of.
    """
    towers = find_towers(model)
    features = [plan_encoder(tower, config) for tower in towers]
    for tower in towers:
        check_forwards(tower.blocks)
    for tower in towers:
        verify(tower)
    return features


def plan_encoder(tower: Tower, config: TurboConfig) -> EncoderFeature:
    """How an encoder that was found will merge.

    Raises:
        ConfigError: settings that this encoder cannot have.
    """
    check_depth(config, len(tower.blocks), tower.name)
    if config.guidance == "cls" and not tower.cls:
        raise ConfigError(
            f"guidance='cls': {tower.title} ({tower.layout.family}) has no CLS token; use 'mean' or 'auto'"
        )
    if config.flops is not None and not tower.plain_stem:
        raise ConfigError(
            f"flops={config.flops}: {tower.title} begins with a convolutional network whose cost does not follow from "
            "its shape; use r or keep"
        )
    text = tower.layout.text
    similarity = ("hidden" if text else "heads") if config.similarity == "auto" else config.similarity
    restore = ("copy" if text else "residual") if config.restore == "auto" else config.restore
    return EncoderFeature(
        config=config,
        layout=tower.layout,
        shape=_shape(tower, config, similarity),
        tower=tower.name,
        names=tuple(name for name, _ in tower.blocks),
        native_tokens=tower.tokens,
        guidance=("cls" if tower.cls else "mean") if config.guidance == "auto" else config.guidance,
        similarity=similarity,
        semantic=needs_semantic(config.degree) or config.trace,
        restore=restore if tower.restore or config.dense else None,
        plain_stem=tower.plain_stem,
    )


def _shape(tower: Tower, config: TurboConfig, similarity: str) -> EncoderShape:
    layout, widths = tower.layout, tower.attention_widths
    in_mlp = [
        sum(matrix_entries(fetch(block, path), f"{name}.{path}") for path in layout.mlp) for name, block in tower.blocks
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
        windowed=config.partition == "random",
    )
