"""What a port to SGLang takes, tried: Qwen3-VL with fewer visual tokens, by the hooks of SGLang's plug-ins.

No part of turbovlm: one family, by selections that need no attention, and nothing is refused. `compare.py` runs it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turbovlm.config import ReadConfig
from turbovlm.engines.vllm.positions import PLANES, ImagePlace, resolve, split_offsets, unresolved, with_offsets
from turbovlm.vlm.select import kept_count, select

SETTINGS = "TURBOVLM_SGLANG"
"""The variable with the settings, as JSON; SGLang hands plug-ins none."""
_found: list[tuple[Tensor, Tensor]] = []
"""Of the forward that runs: which columns are of images, and the offsets of their tokens."""


def register() -> None:
    """Hook into SGLang, in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    targets = {
        "sglang.srt.multimodal.processors.qwen_vl.QwenVLImageProcessor.process_mm_data_async": shorten,
        "sglang.srt.models.qwen3_vl.Qwen3VLForConditionalGeneration.get_image_feature": encode_fewer,
        "sglang.srt.managers.mm_schedule.get_embedding_and_mask": take_offsets,
        "sglang.srt.managers.mm_utils.prepare_mm_inputs": resolve_positions,
    }
    for target, hook in targets.items():
        HookRegistry.register(target, hook, HookType.AROUND)


def reading() -> ReadConfig:
    return ReadConfig(**json.loads(os.environ[SETTINGS]))


def kept(tokens: int) -> int:
    config = reading()
    assert config.visual_keep is not None
    return kept_count(config.visual_keep, tokens, fewest=config.min_visual_tokens)


async def shorten(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """A processed prompt with fewer placeholders, whose positions are those of the full prompt."""
    out = await original(self, *args, **kwargs)
    places, columns, behind, dropped = [], [], 0, 0
    for item in sorted(out.mm_items, key=lambda item: item.offsets[0]):
        ((first, last),) = item.offsets
        n = last - first + 1
        k = kept(n)
        columns += range(behind, first + k)
        places.append(ImagePlace(first - dropped, k, n))
        item.offsets = [(first - dropped, first - dropped + k - 1)]
        behind, dropped = last + 1, dropped + n - k
    columns += range(behind, len(out.input_ids))
    out.input_ids = [out.input_ids[column] for column in columns]
    out.padded_input_ids = type(out).build_padded_input_ids(out.input_ids, out.mm_items)
    out.mrope_positions = unresolved(out.mrope_positions, len(columns), places)
    out.mrope_position_delta = out.mrope_position_delta + dropped
    return out


def encode_fewer(original: Callable[..., Tensor], self: Any, items: list[Any]) -> Tensor:
    """The features of the tokens that are left of each image, their offsets behind them; this is what SGLang caches."""
    features = original(self, items)
    side, width = self.config.vision_config.spatial_merge_size, self.config.text_config.hidden_size
    grids = [(h // side, w // side) for _, h, w in torch.cat([item.image_grid_thw for item in items]).tolist()]
    fewer = []
    for image, (rows, across) in zip(features.split([rows * across for rows, across in grids]), grids):
        n = rows * across
        selection = select(image[None, :, :width], None, kept(n), reading())
        tokens = torch.arange(n, device=image.device)
        offsets = torch.stack([torch.zeros_like(tokens), tokens // across, tokens % across])
        fewer.append(with_offsets(selection.take(image[None])[0], offsets[:, selection.kept[0]]))
    return torch.cat(fewer)


def take_offsets(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Features of a step without their offsets, which are kept for `resolve_positions`."""
    embedding, mask, ids = original(*args, **kwargs)
    if embedding is not None:
        embedding, offsets = split_offsets(embedding)
        _found.append((mask.flatten(), offsets))
    return embedding, mask, ids


def resolve_positions(
    original: Callable[..., Any], ids: Tensor, batch: Any, language_model: Any, kwargs: dict[str, Any], *args: Any
) -> Any:
    """Embed a step's inputs, and give the tokens of images their positions."""
    _found.clear()
    embedded = original(ids, batch, language_model, kwargs, *args)
    positions = kwargs["positions"]
    offsets = positions.new_zeros(PLANES, positions.shape[1])
    for columns, found in _found:
        offsets[:, columns] = found.to(offsets)
    resolve(positions, offsets)
    return embedded
