"""The block that a projector reads, where tokens merge inside the tower: it may not be one that hands on fewer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from turbovlm.errors import StateError
from turbovlm.patching import Feature, Patch
from turbovlm.registry import family_of
from turbovlm.vlm.families import PIXELS, VlmFamily, states_read

if TYPE_CHECKING:
    from turbovlm.encoder.feature import EncoderFeature


def layer_checks(model: nn.Module, encoders: Iterable[Feature]) -> list[Patch]:
    """Patches of the methods whose `vision_feature_layer` says which block of an accelerated tower is read."""
    by_tower: dict[str, Any] = {feature.tower: feature for feature in encoders}  # type: ignore[attr-defined]
    found = []
    for name, part in model.named_modules():
        family: VlmFamily | None = family_of("vlm", part)
        if family is None or not family.merges_inside or not hasattr(part.config, "vision_feature_layer"):
            continue
        tower = by_tower.get(f"{name}.{family.tower}".lstrip("."))
        for modality in PIXELS if tower is not None else ():
            method = f"get_{modality}_features"
            if tower is not None and hasattr(type(part), method):
                found.append(Patch(part, method, check_layer, tower, tower.schedule().tokens, by_name=True))
    return found


def check_layer(patch: Patch, model: Any, original: Any, /, **inputs: Any) -> Any:
    """Run a method that reads a block of the tower, as long as that block hands on every position.

    Raises:
        StateError: tokens have merged by then, and are restored behind a later block.
    """
    feature: EncoderFeature = patch.feature  # type: ignore[assignment]
    given, merged, depth = inputs.get("vision_feature_layer"), patch.detail, len(feature.names)
    for state in states_read(model, feature.blocks_around, given):
        if 0 <= state < depth and merged[state] < merged[0]:
            tower = feature.names[0].rpartition(".")[0]
            read = model.config.vision_feature_layer if given is None else given
            raise StateError(
                f"vision_feature_layer={read}: the tokens of {tower} are merged there ({feature.config.amount}), and "
                f"restored behind {feature.names[-1]} alone, which was to be read when turbovlm was applied: have the "
                "model's config say which block is read before turbovlm.apply"
            )
    return original(**inputs)
