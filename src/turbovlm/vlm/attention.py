"""The tower's attention A, taken down on the way through one of its blocks and handed on with the features.

`get_image_features` runs the tower; the block that guides adds its attention row to what that call collects. The rows
become one number per visual token and travel as one more plane of `deepstack_features`, which the library repeats for
beams as it does the features themselves.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm.encoder.block import attention_of_guide
from turbovlm.encoder.layout import fetch
from turbovlm.encoder.state import STATE, State
from turbovlm.vlm.families import cells, packed_row
from turbovlm.vlm.plan import ReadingPlan, arguments_by_name
from turbovlm.vlm.select import kept_count, needs_attention, select

SCORES = "_turbovlm_scores"
"""Attribute of the library's outputs: A, `[tokens]` per entry of `pooler_output`."""


@dataclass(frozen=True)
class Row:
    """A of each image's patches, `[images, patches]`, or of a packed sequence of them, `[patches]`.

    Of a tower that hands on merged tokens, A of those, and the patches that each stands for, `[images, M]`.
    """

    values: Tensor
    sizes: Tensor | None = None


_ROWS: ContextVar[list[Row] | None] = ContextVar("rows", default=None)
"""What the encoding under way in this thread has collected."""


def guiding_forward(block: nn.Module, plan: ReadingPlan, inner: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of the tower's block that guides: its own (`inner`, where it is accelerated), and its row of A."""
    out = type(block).forward(block, hidden, *args, **kwargs) if inner is None else inner(hidden, *args, **kwargs)
    rows = _ROWS.get()
    if rows is not None:
        row = _row(block, plan, hidden, args, kwargs)
        state = getattr(out[0] if isinstance(out, tuple) else out, STATE, None)
        rows.append(Row(row) if state is None else _of_merged(row, plan.prefix, state))
    return out


def _of_merged(row: Tensor, prefix: int, state: State) -> Row:
    """A of the tokens that an accelerated tower hands on, from that of every patch, `[images, patches]`."""
    source = state.source()
    if source is None or state.sizes is None:
        return Row(row)
    sizes = state.sizes[:, prefix:]
    return Row(row.new_zeros(sizes.shape).scatter_add(1, source[:, prefix:] - prefix, row), sizes)


def _row(block: Any, plan: ReadingPlan, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if plan.spelling is None:
        return packed_row(block, hidden, kwargs)
    arguments = {**dict(zip(plan.spelling.arguments, args)), **kwargs}
    return attention_of_guide(block, plan.spelling, plan.config, plan.prefix, plan.guidance, hidden, arguments)


def encoding(model: Any, plan: ReadingPlan, modality: str, *args: Any, **kwargs: Any) -> Any:
    """`get_image_features` or `get_video_features`, with A as one more plane of features."""
    method = getattr(type(model), f"get_{modality}_features")
    rows: list[Row] = []
    token = _ROWS.set(rows)
    try:
        outputs = method(model, *args, **kwargs)
    finally:
        _ROWS.reset(token)
    if rows and not isinstance(outputs, tuple):
        attach(outputs, _scores(model, plan, modality, torch.cat([row.values for row in rows]), outputs, args, kwargs))
    return outputs


def reading_across(tower: Any, plan: ReadingPlan, *args: Any, **kwargs: Any) -> Any:
    """The forward of a tower whose tokens are read by cross-attention: those in front, and the patches that stay."""
    rows: list[Row] = []
    token = _ROWS.set(rows)
    try:
        outputs = type(tower).forward(tower, *args, **kwargs)
    finally:
        _ROWS.reset(token)
    tokens, keep = outputs[0], plan.config.visual_keep
    assert keep is not None
    front, patches = tokens[:, : plan.prefix], tokens[:, plan.prefix :]
    semantic = rows[0].values if needs_attention(plan.config) else None
    k = kept_count(keep, patches.shape[1])
    selection = select(patches.detach(), semantic, k, plan.config, rows[0].sizes)
    plan.last = (selection,)
    left = torch.cat([front, selection.take(patches)], dim=1)
    if isinstance(outputs, tuple):
        return (left, *outputs[1:])
    outputs.last_hidden_state = left
    return outputs


def rearranging(model: Any, plan: ReadingPlan, name: str, features: Any, *args: Any, **kwargs: Any) -> Any:
    """A method that rearranges features after the projector; what A has been collected is rearranged alike."""
    method = getattr(type(model), name)
    rows = _ROWS.get()
    if rows:
        collected = torch.cat([row.values for row in rows]).unsqueeze(-1)
        alone = {k: (v.new_zeros(1) if k == "image_newline" and v is not None else v) for k, v in kwargs.items()}
        if isinstance(features, Tensor):
            rows[:] = [Row(method(model, collected, *args, **alone).squeeze(-1))]
        else:
            packed, _ = method(model, torch.split(collected, [len(feature) for feature in features]), *args, **alone)
            rows[:] = [Row(values.squeeze(-1)) for values in packed]
    return method(model, features, *args, **kwargs)


def attach(outputs: Any, scores: list[Tensor]) -> None:
    """Add A, one tensor `[tokens]` per entry of `pooler_output`."""
    setattr(outputs, SCORES, scores)


def detach(outputs: Any) -> tuple[list[Any], list[Tensor] | None]:
    """The planes that the library made itself, and A, `[tokens]` per entry, or None where there is none."""
    return list(getattr(outputs, "deepstack_features", None) or []), getattr(outputs, SCORES, None)


def expanding(owner: Any, plan: ReadingPlan, *args: Any, **kwargs: Any) -> Any:
    """`_expand_multimodal_outputs`: the library repeats A for beams as it does planes of features."""
    method = type(owner)._expand_multimodal_outputs
    inputs = arguments_by_name(method, owner, args, kwargs)
    scored = [outputs for outputs in inputs["mm_encoder_output"].values() if getattr(outputs, SCORES, None)]
    for outputs in scored:
        planes = getattr(outputs, "deepstack_features", None) or []
        outputs.deepstack_features = [*planes, [values.unsqueeze(-1) for values in getattr(outputs, SCORES)]]
    found = method(owner, **inputs)
    for outputs in scored:
        *planes, last = outputs.deepstack_features
        setattr(outputs, SCORES, [values.squeeze(-1) for values in last])
        outputs.deepstack_features = planes or None
    return found


def _scores(
    model: Any,
    plan: ReadingPlan,
    modality: str,
    rows: Tensor,
    outputs: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Tensor]:
    """A of every visual token, `[tokens]` per entry of `pooler_output`."""
    reader, lengths = plan.reader, [len(entry) for entry in outputs.pooler_output]
    side = reader.cell(model)
    if reader.packed:
        values = rows.view(-1, side * side).sum(dim=1)
        if reader.order is not None:
            method = getattr(type(model), f"get_{modality}_features")
            grid = inspect.signature(method).bind(model, *args, **kwargs).arguments[f"{modality}_grid_thw"]
            values = values[reader.order(fetch(model, tuple(reader.tower.split("."))), grid)]
    else:
        values = (cells(rows, side) if side > 1 else rows).flatten()
    if len(values) != sum(lengths):  # a token that separates videos ends each
        values = F.pad(values.view(len(lengths), -1), (0, 1)).flatten()
    return list(torch.split(values, lengths))
