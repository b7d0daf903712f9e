"""The models that the vLLM plug-in shortens, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.vlm.families.family import sum_cells

MODELS = "turbovlm.engines.vllm.models"
"""The module with the subclasses of vLLM's models, one for each family, by the name of its architecture."""


@dataclass(frozen=True)
class ServedFamily:
    """One architecture of vLLM's.

    Args:
        architecture: the name of its class, in vLLM and in the model's config.
        guide: `(model)`: the attention inside the block of its tower whose row is A: the last that the features pass.
        per_token: `(model, rows, tokens, shape)`: A of an image's tokens, `[tokens]`, from that of the patches of each
            of its tiles, and the image's `shape`.
        shape: the processor's output that says how patches of an image lie.
        packed: whether the tower runs all images as one sequence, whose lengths `shape` says; such images have rotary
            positions of three planes. Elsewhere a token's position is its column.
        tiles: `(outputs)`: of how many tiles each image is, by the processor's outputs; one each if None.
        apart: whether tokens of each tile are chosen from by themselves.
        vision: values of the vision config's `model_type` that it is known with; empty for all.
        cls: `(config)`: whether the tower has a CLS token in front, which guides; else the mean query does.
        merges: path of the tower, where tokens can be merged inside it (`encoders.LAYOUTS`); None where not.
    """

    architecture: str
    guide: Callable[[Any], Any]
    per_token: Callable[[Any, list[Tensor], int, Tensor | None], Tensor]
    shape: str | None = None
    packed: bool = False
    tiles: Callable[[Mapping[str, Any]], list[int]] | None = None
    apart: bool = False
    vision: tuple[str, ...] = ()
    cls: Callable[[Any], bool] | None = None
    merges: str | None = None


def _last_built(model: Any) -> Any:
    """vLLM builds the tower up to the block that the projector reads."""
    return model.vision_tower.vision_model.encoder.layers[-1].self_attn.attn


def _has_cls(config: Any) -> bool:
    return bool(config.vision_config.model_type == "clip_vision_model")


def _handed_on(model: Any, rows: list[Tensor], tokens: int, shape: Tensor | None) -> Tensor:
    """What is left out, CLS, stands in front."""
    return rows[0][len(rows[0]) - tokens :]


def _of_tiles(model: Any, rows: list[Tensor], tokens: int, shape: Tensor | None) -> Tensor:
    """As the model puts the features of tiles together; A of newlines is 0."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    each = torch.stack([row[-side * side :] for row in rows]).unsqueeze(-1)
    if len(each) == 1:
        return F.pad(each.flatten(), (0, tokens - each.numel()))
    newline = each.new_zeros(1)
    merged: Tensor = model._merge_image_patch_embeddings(shape, each, image_newline=newline, strategy="spatial_unpad")
    return merged.flatten()


def _of_shuffled(model: Any, rows: list[Tensor], tokens: int, shape: Tensor | None) -> Tensor:
    """The sum over squares of each tile's patches."""
    side = round(1 / model.config.downsample_ratio)
    patches = tokens // len(rows) * side * side
    return sum_cells(torch.stack([row[-patches:] for row in rows]), side).flatten()


def _last_full_attention(model: Any) -> Any:
    """The last block that sees whole images."""
    return model.visual.blocks[max(model.visual.fullatt_block_indexes)].attn.attn


def _of_squares(model: Any, rows: list[Tensor], tokens: int, shape: Tensor | None) -> Tensor:
    """The sum over squares of patches, which stand together."""
    return rows[0].view(tokens, -1).sum(dim=1)


def _out_of_windows(model: Any, rows: list[Tensor], tokens: int, shape: Tensor | None) -> Tensor:
    """The same, in the order of the image and not of the tower's windows."""
    assert shape is not None
    order, _ = model.visual.get_window_index_thw(*shape.tolist())
    return _of_squares(model, rows, tokens, shape)[order.argsort().to(rows[0].device)]


CLIP_OR_SIGLIP = ("clip_vision_model", "siglip_vision_model")
FAMILIES = (
    ServedFamily(
        "LlavaForConditionalGeneration",
        _last_built,
        _handed_on,
        vision=CLIP_OR_SIGLIP,
        cls=_has_cls,
        merges="vision_tower",
    ),
    ServedFamily(
        "LlavaOnevisionForConditionalGeneration",
        _last_built,
        _of_tiles,
        shape="image_sizes",
        tiles=lambda outputs: [len(pixels) for pixels in outputs["pixel_values"]],
        vision=CLIP_OR_SIGLIP,
        cls=_has_cls,
        merges="vision_tower",
    ),
    ServedFamily(
        "Qwen2_5_VLForConditionalGeneration",
        _last_full_attention,
        _out_of_windows,
        shape="image_grid_thw",
        packed=True,
    ),
    ServedFamily(
        "Qwen3VLForConditionalGeneration",
        lambda model: model.visual.blocks[-1].attn.attn,
        _of_squares,
        shape="image_grid_thw",
        packed=True,
    ),
    ServedFamily(
        "InternVLForConditionalGeneration",
        lambda model: model.vision_tower.encoder.layer[-1].attention.attn,
        _of_shuffled,
        tiles=lambda outputs: outputs["image_num_patches"].tolist(),
        apart=True,
        cls=lambda config: True,
    ),
)


def served(architecture: str) -> ServedFamily | None:
    """The family of that architecture, or None."""
    return next((family for family in FAMILIES if family.architecture == architecture), None)
