"""The tower's attention A: collected on the way through one of its blocks, and brought along with the features.

`get_image_features` runs the tower; the block that guides adds its attention row to what that call collects. The rows
become one number per visual token and travel with the library's outputs, `marks.ATTENTION`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.encoder.attention import attention_of_guide
from turbovlm.encoder.cross_attention import Merged, attach
from turbovlm.encoder.entrance import leaving_out
from turbovlm.encoder.layout import fetch
from turbovlm.encoder.state import STATE, State
from turbovlm.errors import StateError
from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.segments import shortened
from turbovlm.patching import Patch
from turbovlm.vlm.families import Packed, block_read, sum_cells
from turbovlm.vlm.marks import ATTENTION, GRIDS, STANDING
from turbovlm.vlm.pixels import mark_standing, standing_cells
from turbovlm.vlm.select import kept_count, reads_attention, select
from turbovlm.vlm.selection import Selection

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


def guide_forward(patch: Patch, block: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run the block that guides, accelerated where it is, and collect its row of A."""
    feature: ReadFeature = patch.feature  # type: ignore[assignment]
    out = original(*args, **kwargs)
    rows = _ENCODING.rows
    if rows is None:
        return out
    spelled = feature.family.packed if feature.layout is None else feature.layout
    assert spelled is not None
    hidden, *others = args if args else (kwargs.get("hidden_states", kwargs.get("hidden_state")),)
    arguments = {**dict(zip(spelled.arguments, others)), **kwargs}
    if isinstance(spelled, Packed):
        rows.append(Row(packed_row(block, spelled, hidden, arguments, feature.config.proportional)))
        return out
    config, guidance = feature.config, feature.guidance
    if getattr(hidden, STATE, None) is None:  # so that the mean query is that of the patches alone
        hidden = hidden.view_as(hidden)
        setattr(hidden, STATE, State(0, (), feature.prefix, feature.suffix))
    row = attention_of_guide(block, spelled, config, 0, guidance, hidden, arguments)
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
def packed_row(
    block: Any, spelled: Packed, hidden: Tensor, arguments: dict[str, Any], proportional: bool = True
) -> Tensor:
    """The mean query's attention row of one block of a packed tower, for each image of the sequence.

    Args:
        block: the block, `spelled` as its family has it.
        hidden: its input, `[patches of all images, width]`, or the same behind a batch of one; where some have merged,
            with the encoder's state.
        arguments: its arguments by name: `position_embeddings`, and where each image ends.
        proportional: whether merged patches are attended to by their number.

    Returns:
        `[patches of all images]`; sums to 1 over each image. Patches that have merged share what their token gets.
    """
    state: State = getattr(hidden, STATE, State(0, (), 0))
    hidden = (hidden if state.tokens is None else state.tokens).flatten(0, -2)
    attention, normed = fetch(block, spelled.attention), fetch(block, spelled.norm)(hidden)
    projected = torch.cat([fetch(attention, name)(normed) for name in spelled.project], dim=-1)
    heads = getattr(attention, "num_heads", None) or attention.config.num_attention_heads
    q, k, *_ = projected.view(len(normed), 2 if len(spelled.project) > 1 else 3, heads, -1).unbind(1)
    if spelled.norms:
        q, k = (fetch(attention, name)(values) for name, values in zip(spelled.norms, (q, k)))
    rotary, kept = arguments["position_embeddings"], None if state.positions is None else state.positions[0]
    rotary = rotary if kept is None else [angles[kept] for angles in rotary]
    q, k = getattr(sys.modules[type(block).__module__], spelled.rotate)(q, k, *rotary)
    sizes = q.new_ones(len(q), dtype=torch.float32) if state.sizes is None else state.sizes[0].float()
    if kept is None:
        lengths = _lengths(arguments, len(normed))
    else:
        lengths = list(shortened(arguments["cu_seqlens"], state.positions).lengths)
    rows = []
    for queries, keys, counts in zip(*(torch.split(each, lengths) for each in (q.float(), k.float(), sizes))):
        guide = torch.einsum("n,nhd->hd", counts / counts.sum(), queries) * attention.scaling
        scores = torch.einsum("hd,nhd->hn", guide, keys)
        scores = scores + counts.log() if proportional else scores
        rows.append(scores.softmax(dim=-1).mean(dim=0))
    row, source = torch.cat(rows), state.source()
    return row if source is None else (row / sizes)[source[0]]


def _lengths(arguments: dict[str, Any], patches: int) -> list[int]:
    """How many patches each image of a packed sequence has, by where it ends or by the mask between images."""
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if arguments.get(name) is not None:
            ends: list[int] = arguments[name].diff().tolist()
            return ends
    mask: Tensor = arguments["attention_mask"]  # 0 within an image, `[1, 1, patches, patches]`
    first = F.pad(torch.diagonal(mask[0, 0], offset=1) != 0, (1, 0), value=True).nonzero().squeeze(1)
    return F.pad(first, (0, 1), value=patches).diff().tolist()


def encode(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run `get_image_features` or `get_video_features`, and give their outputs A of every visual token.

    Raises:
        StateError: the features are of another block than the guide that was found when turbovlm was applied, or not
            of as many tokens as the guide has seen.
    """
    feature: ReadFeature = patch.feature  # type: ignore[assignment]
    if feature.family.guide is not None and reads_attention(feature.config):
        _check_guide(model, feature, inputs.get("vision_feature_layer"))
    standing = standing_cells(model, feature, inputs, patch.detail)
    with contextlib.nullcontext() if standing is None else leaving_out(standing):
        outputs, rows = _collect(original, **inputs)
    if isinstance(outputs, tuple):
        return outputs
    grids = _grids(inputs, patch.detail)
    if grids is None and not rows:
        return outputs
    lengths = [len(entry) for entry in getattr(outputs, feature.family.features)]
    if grids is not None and len(grids) == len(lengths):
        setattr(outputs, GRIDS, [grid.expand(n, 3) for grid, n in zip(grids, lengths)])
    if standing is not None:
        mark_standing(outputs, standing, lengths)
    if rows:
        row = torch.cat([each.values for each in rows])
        values = _of_tokens(model, feature, row, inputs, lengths)
        setattr(outputs, ATTENTION, list(torch.split(values, lengths)))
    return outputs


def _grids(inputs: dict[str, Any], modality: str) -> Tensor | None:
    """Frames, rows and columns of each image or video as its call says them, `[images, 3]`, 0 what it does not say."""
    grids: Tensor | None = inputs.get(f"{modality}_grid_thw")
    if grids is not None or modality != "video":
        return grids
    pixels, frames = inputs.get("pixel_values_videos"), inputs.get("num_frames_per_video")
    if frames is None and isinstance(pixels, Tensor) and pixels.ndim == 5:  # `[videos, frames, 3, height, width]`
        frames = torch.tensor([pixels.shape[1]] * len(pixels))
    return None if frames is None else F.pad(frames.unsqueeze(1), (0, 2))


def _check_guide(model: Any, feature: ReadFeature, layers: Any) -> None:
    if block_read(feature.family, model, feature.depth, layers) != feature.block:
        said = "the model's config" if layers is None else f"vision_feature_layer={layers}"
        raise StateError(
            f"{said}: the visual tokens are of another block than {feature.guide}, whose attention visual_keep was "
            "applied to go by: have the config say which before turbovlm.apply, or give visual_select='uniform', "
            "which goes by none"
        )


def _of_tokens(model: Any, feature: ReadFeature, row: Tensor, inputs: dict[str, Any], lengths: list[int]) -> Tensor:
    """A of every visual token, `[sum of lengths]`, from that of the tower's, encoded with `inputs`."""
    family = feature.family
    side, tokens = family.cell(model), sum(lengths)
    if family.rearrange and row.ndim == 1:  # rearranged; a token that separates videos ends each
        separated = len(row) == tokens - len(lengths)
        values = F.pad(row.view(len(lengths), -1), (0, 1)).flatten() if separated else row
    elif family.per_token is not None:
        values = family.per_token(model, row, inputs)
    elif family.packed is not None:
        values = row.view(-1, side * side).sum(dim=1)
        if family.order is not None:
            grid = next(inputs[name] for name in inputs if name.endswith("_grid_thw") and inputs[name] is not None)
            values = values[family.order(fetch(model, family.tower), grid)]
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
    """Run `_expand_multimodal_outputs`, on what is known of each image as on its features, in a row for each token."""
    found = {}
    for mark in (ATTENTION, GRIDS, STANDING):
        found[mark] = {
            modality: SimpleNamespace(pooler_output=_for_each_token(outputs, mark, patch.feature))
            for modality, outputs in inputs["mm_encoder_output"].items()
            if getattr(outputs, mark, None)
        }
        original(**{**inputs, "mm_encoder_output": found[mark]})
    repeated = original(**inputs)
    for mark, entries in found.items():
        for modality, beside in entries.items():
            values = [values[:1] if mark == GRIDS else values for values in beside.pooler_output]
            setattr(repeated[modality], mark, values)
    return repeated


def _for_each_token(outputs: Any, mark: str, feature: Any) -> list[Tensor]:
    """What stands beside each image, in as many rows as it has tokens."""
    values = getattr(outputs, mark)
    if mark != GRIDS:
        return list(values)
    counts = [len(entry) for entry in getattr(outputs, feature.family.features)]
    return [grid.expand(count, -1) for grid, count in zip(values, counts)]


def sizes_left(selection: Selection, sizes: Tensor) -> Tensor:
    """Sizes of the tokens that stay, `[images, k]`, of those of all, `[images, n]`; what is dropped does not count."""
    counted = sizes * (selection.weights > 0)
    return torch.zeros_like(sizes[:, : selection.kept.shape[1]]).scatter_add(1, selection.destination, counted)


def tower_forward(patch: Patch, tower: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run a tower whose tokens are read by cross-attention, and return those in front and the patches that stay."""
    feature: ReadFeature = patch.feature  # type: ignore[assignment]
    outputs, rows = _collect(original, *args, **kwargs)
    keep = feature.config.visual_keep
    assert keep is not None
    front, patches = outputs[0][:, : feature.prefix], outputs[0][:, feature.prefix :]
    semantic = rows[0].values[:, feature.prefix :] if reads_attention(feature.config) else None
    before = rows[0].sizes
    sizes = None if before is None else before[:, feature.prefix :]
    k = kept_count(keep, patches.shape[1], fewest=feature.config.min_visual_tokens)
    selection = select(patches.detach(), semantic, k, feature.config, sizes)
    feature.last = (selection,)
    left = torch.cat([front, selection.take(patches)], dim=1)
    if k < patches.shape[1] and (before is not None or feature.config.reduce == "merge"):
        sizes = outputs[0].new_ones(outputs[0].shape[:2], dtype=precise_dtype(left)) if before is None else before
        before = torch.cat([sizes[:, : feature.prefix], sizes_left(selection, sizes[:, feature.prefix :])], dim=1)
    attach(left, Merged.of(before, None, feature.config.proportional))
    if isinstance(outputs, tuple):
        return (left, *outputs[1:])
    outputs.last_hidden_state = left
    return outputs
