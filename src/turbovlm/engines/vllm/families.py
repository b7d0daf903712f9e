"""The models that the vLLM plug-in shortens, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MODELS = "turbovlm.engines.vllm.models"
"""The module with the subclasses of vLLM's models, one for each family, by the name of its architecture."""


@dataclass(frozen=True)
class ServedFamily:
    """One architecture of vLLM's.

    Args:
        architecture: the name of its class, in vLLM and in the model's config.
        grid: the processor's output with frames, rows and columns of each image, where rotary positions have three
            planes; None where a token's position is its column.
        vision: values of the vision config's `model_type` that it is known with; empty for all.
        guide: `(model)`: the attention inside the block of its tower whose row is A: the last that the features pass.
        cls: `(config)`: whether the tower has a CLS token in front, which guides; else the mean query does.
        per_token: `(model, row, tokens, grid)`: A of an image's tokens, `[tokens]`, from that of what its tower sees.
    """

    architecture: str
    guide: Callable[[Any], Any]
    per_token: Callable[[Any, Tensor, int, Tensor | None], Tensor]
    grid: str | None = None
    vision: tuple[str, ...] = ()
    cls: Callable[[Any], bool] | None = None


def _handed_on(model: Any, row: Tensor, tokens: int, grid: Tensor | None) -> Tensor:
    """What is left out, CLS, stands in front."""
    return row[len(row) - tokens :]


def _last_full_attention(model: Any) -> Any:
    """vLLM builds all blocks; those with full attention see whole images."""
    return model.visual.blocks[max(model.visual.fullatt_block_indexes)].attn.attn


def _out_of_windows(model: Any, row: Tensor, tokens: int, grid: Tensor | None) -> Tensor:
    """Of squares of patches, in the order of the image and not of the tower's windows."""
    assert grid is not None
    order, _ = model.visual.get_window_index_thw(*grid.tolist())
    return row.view(tokens, -1).sum(dim=1)[order.argsort().to(row.device)]


FAMILIES = (
    ServedFamily(
        "LlavaForConditionalGeneration",
        # vLLM builds the tower up to the block that the projector reads
        guide=lambda model: model.vision_tower.vision_model.encoder.layers[-1].self_attn.attn,
        per_token=_handed_on,
        vision=("clip_vision_model", "siglip_vision_model"),
        cls=lambda config: config.vision_config.model_type == "clip_vision_model",
    ),
    ServedFamily(
        "Qwen2_5_VLForConditionalGeneration",
        guide=_last_full_attention,
        per_token=_out_of_windows,
        grid="image_grid_thw",
    ),
)


def served(architecture: str) -> ServedFamily | None:
    """The family of that architecture, or None."""
    return next((family for family in FAMILIES if family.architecture == architecture), None)
