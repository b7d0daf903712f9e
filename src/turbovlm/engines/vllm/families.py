"""The models that the vLLM plug-in shortens, as data."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    architecture: str
    grid: str | None = None
    vision: tuple[str, ...] = ()


FAMILIES = (
    ServedFamily("LlavaForConditionalGeneration", vision=("clip_vision_model", "siglip_vision_model")),
    ServedFamily("Qwen2_5_VLForConditionalGeneration", grid="image_grid_thw"),
)


def served(architecture: str) -> ServedFamily | None:
    """The family of that architecture, or None."""
    return next((family for family in FAMILIES if family.architecture == architecture), None)
