"""The tower's attention A: collected on the way through one of its blocks, and brought along with the features.

`get_image_features` runs the tower; the block that guides adds its attention row to what that call collects. The rows
become one number per visual token and travel with the library's outputs, `marks.ATTENTION`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.encoder.attention import attention_of_guide
from turbovlm.encoder.layout import fetch
from turbovlm.encoder.state import STATE, State
from turbovlm.errors import StateError
from turbovlm.ops.segments import shortened
from turbovlm.patching import Patch
from turbovlm.vlm.families import block_read, sum_cells
from turbovlm.vlm.marks import ATTENTION
from turbovlm.vlm.select import kept_count, needs_attention, select

if TYPE_CHECKING:
    from turbovlm.vlm.install import ReadFeature


@dataclass(frozen=True)
class Row:
    """A of each image's tokens in the tower, `[images, tokens]`, those in front of the patches included.

    Of a packed sequence of patches, and once they were rearranged, `[tokens]`. Where the tower returns merged tokens,
    A of those, and the patches that each stands for, `[images, M]`.
    """

    values: Tensor
    sizes: Tensor | None = None


class _Encoding(threading.local):
    """What the encoding under way in this thread has collected; None outside of one."""

    rows: list[Row] | None = None


_ENCODING = _Encoding()


def _collect(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[Row]]:
    """Run what runs the tower, and collect the rows of its guide."""
    rows: list[Row] = []
    outer, _ENCODING.rows = _ENCODING.rows, rows
    try:
        return call(*args, **kwargs), rows
    finally:
        _ENCODING.rows = outer


def guide_forward(patch: Patch, block: Any, original: Any, /, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run the block that guides, accelerated where it is, and collect its row of A."""
    feature: ReadFeature = patch.feature  # type: ignore[assignment]
    out = original(hidden, *args, **kwargs)
    rows = _ENCODING.rows
    if rows is None:
        return out
    if feature.layout is None:
        rows.append(Row(packed_row(block, hidden, kwargs, feature.config.proportional)))
        return out
    arguments = {**dict(zip(feature.layout.arguments, args)), **kwargs}
    config, guidance = feature.config, feature.guidance
    if getattr(hidden, STATE, None) is None:  # so that the mean query is that of the patches alone
        hidden = hidden.view_as(hidden)
        setattr(hidden, STATE, State(0, (), feature.prefix))
    row = attention_of_guide(block, feature.layout, config, 0, guidance, hidden, arguments)
    state = getattr(out[0] if isinstance(out, tuple) else out, STATE, None)
    rows.append(Row(row) if state is None or state.tokens is not None else _of_merged(row, state))
    return out


def _of_merged(row: Tensor, state: State) -> Row:
    """A of the tokens that an accelerated tower returns, from that of every position, `[images, tokens]`."""
    source = state.source()
    if source is None or state.sizes is None:
        return Row(row)
    sizes = state.sizes[:, : state.sizes.shape[1] - state.suffix]
    return Row(row.new_zeros(sizes.shape).scatter_add(1, source[:, : row.shape[1]], row), sizes)


@torch.no_grad()
def packed_row(block: Any, hidden: Tensor, arguments: dict[str, Any], proportional: bool = True) -> Tensor:
    """The mean query's attention row of one block of a Qwen tower, for each image of the packed sequence.

    Args:
        block: a block with `norm1` and `attn.qkv`.
        hidden: the block's input, `[patches of all images, width]`; where some have merged, with the encoder's state.
        arguments: the block's keyword arguments: `cu_seqlens`, where each image ends, and `position_embeddings`.
        proportional: whether merged patches are attended to by their number.

    Returns:
        `[patches of all images]`; sums to 1 over each image. Patches that have merged share what their token gets.
    """
    attention = block.attn
    state: State = getattr(hidden, STATE, State(0, (), 0))
    hidden = hidden if state.tokens is None else state.tokens.squeeze(0)
    q, k, _ = attention.qkv(block.norm1(hidden)).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
    rotary = arguments["position_embeddings"]
    kept = None if state.positions is None else state.positions[0]
    rotate = sys.modules[type(block).__module__].apply_rotary_pos_emb_vision
    q, k = rotate(q, k, *(rotary if kept is None else [angles[kept] for angles in rotary]))
    sizes = q.new_ones(len(q), dtype=torch.float32) if state.sizes is None else state.sizes[0].float()
    lengths = list(shortened(arguments["cu_seqlens"], kept).lengths)
    rows = []
    for queries, keys, counts in zip(*(torch.split(each, lengths) for each in (q.float(), k.float(), sizes))):
        guide = torch.einsum("n,nhd->hd", counts / counts.sum(), queries) * attention.scaling
        scores = torch.einsum("hd,nhd->hn", guide, keys)
        scores = scores + counts.log() if proportional else scores
        rows.append(scores.softmax(dim=-1).mean(dim=0))
    row, source = torch.cat(rows), state.source()
    return row if source is None else (row / sizes)[source[0]]


def encode(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run `get_image_features` or `get_video_features`, and give their outputs A of every visual token.

    Raises:
        StateError: the features are of another block than the guide that was found when turbovlm was applied, or not
            of as many tokens as the guide has seen.
    """
    feature: ReadFeature = patch.feature  # type: ignore[assignment]
    if needs_attention(feature.config):
        _check_guide(model, feature, inputs.get("vision_feature_layer"))
    outputs, rows = _collect(original, **inputs)
    if rows and not isinstance(outputs, tuple):
        grid = inputs.get(f"{patch.detail}_grid_thw")
        lengths = [len(entry) for entry in outputs.pooler_output]
        row = torch.cat([each.values for each in rows])
        setattr(outputs, ATTENTION, list(torch.split(_of_tokens(model, feature, row, grid, lengths), lengths)))
    return outputs


def _check_guide(model: Any, feature: ReadFeature, layers: Any) -> None:
    if block_read(feature.family, model, feature.depth, layers) != feature.block:
        said = "the model's config" if layers is None else f"vision_feature_layer={layers}"
        raise StateError(
            f"{said}: the visual tokens are of another block than {feature.guide}, whose attention visual_keep was "
            "applied to go by: have the config say which before turbovlm.apply, or give visual_select='uniform', "
            "which goes by none"
        )


def _of_tokens(model: Any, feature: ReadFeature, row: Tensor, grid: Tensor | None, lengths: list[int]) -> Tensor:
    """A of every visual token, `[sum of lengths]`, from that of the tower's."""
    family = feature.family
    side, tokens = family.cell(model), sum(lengths)
    if family.packed:
        values = row.view(-1, side * side).sum(dim=1)
        if family.order is not None:
            assert grid is not None
            values = values[family.order(fetch(model, family.tower), grid)]
    elif row.ndim == 1:  # rearranged; a token that separates videos ends each
        separated = len(row) == tokens - len(lengths)
        values = F.pad(row.view(len(lengths), -1), (0, 1)).flatten() if separated else row
    else:
        handed_on = _handed_on(row, tokens * side * side // len(row))
        values = (sum_cells(handed_on, side) if side > 1 else handed_on).flatten()
    if len(values) != tokens:
        raise StateError(
            f"{family.family} made {tokens} visual tokens of {row.numel()} whose attention {feature.guide} knows: it "
            "cannot be told which is which; visual_select='uniform' goes by no attention"
        )
    return values


def _handed_on(row: Tensor, tokens: int) -> Tensor:
    """A of the tokens that a tower hands on, `[images, tokens]`: those left out, such as CLS, stand in front."""
    return row[:, max(row.shape[1] - tokens, 0) :]


def rearrange(patch: Patch, model: Any, original: Any, /, features: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a method that rearranges features after the projector, on what was collected of A as well."""
    rows = _ENCODING.rows
    if rows:
        each = features if isinstance(features, Tensor) else features[0]  # `[images or tiles, tokens, width]`
        collected = _handed_on(torch.cat([row.values for row in rows]), each.shape[1]).unsqueeze(-1)
        alone = {k: (v.new_zeros(1) if k == "image_newline" and v is not None else v) for k, v in kwargs.items()}
        if isinstance(features, Tensor):
            rows[:] = [Row(original(collected, *args, **alone).flatten())]
        else:
            packed, _ = original(torch.split(collected, [len(feature) for feature in features]), *args, **alone)
            rows[:] = [Row(values.squeeze(-1)) for values in packed]
    return original(features, *args, **kwargs)


def repeat_for_beams(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run `_expand_multimodal_outputs`, which repeats A as it does planes of features."""
    with_attention = [outputs for outputs in inputs["mm_encoder_output"].values() if getattr(outputs, ATTENTION, None)]
    for outputs in with_attention:
        planes = getattr(outputs, "deepstack_features", None) or []
        outputs.deepstack_features = [*planes, [values.unsqueeze(-1) for values in getattr(outputs, ATTENTION)]]
    repeated = original(**inputs)
    for outputs in with_attention:
        *planes, last = outputs.deepstack_features
        setattr(outputs, ATTENTION, [values.squeeze(-1) for values in last])
        outputs.deepstack_features = planes or None
    return repeated


def tower_forward(patch: Patch, tower: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a tower whose tokens are read by cross-attention, and return those in front and the patches that stay."""
    feature: ReadFeature = patch.feature  # type: ignore[assignment]
    outputs, rows = _collect(original, *args, **kwargs)
    keep = feature.config.visual_keep
    assert keep is not None
    front, patches = outputs[0][:, : feature.prefix], outputs[0][:, feature.prefix :]
    semantic = rows[0].values[:, feature.prefix :] if needs_attention(feature.config) else None
    sizes = None if rows[0].sizes is None else rows[0].sizes[:, feature.prefix :]
    k = kept_count(keep, patches.shape[1])
    selection = select(patches.detach(), semantic, k, feature.config, sizes)
    feature.last = (selection,)
    left = torch.cat([front, selection.take(patches)], dim=1)
    if isinstance(outputs, tuple):
        return (left, *outputs[1:])
    outputs.last_hidden_state = left
    return outputs
