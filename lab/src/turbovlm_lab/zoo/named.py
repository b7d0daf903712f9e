"""The zoo's models by name, for the commands of `turbovlm`: `zoo:clip`, `zoo:saliency` and others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from turbovlm.loading import AddedModel


def _saliency() -> Any:
    from turbovlm_lab.zoo.saliency import load_saliency_vit

    return load_saliency_vit().backbone


def _clip() -> Any:
    from turbovlm_lab.zoo.clip import load_clip

    return load_clip()


def _prepare_for_clip(images: Sequence[Any]) -> Tensor:
    from turbovlm_lab.zoo.clip import preprocess

    return preprocess(list(images))


def _pairs() -> Any:
    from turbovlm_lab.zoo.dual_encoder import load_dual_encoder

    return load_dual_encoder().vision


def _scenes() -> Any:
    from turbovlm_lab.zoo.reader import scene_encoder

    return scene_encoder()


def _emoji() -> Any:
    from turbovlm_lab.zoo.emoji import load_emoji_pipeline

    return load_emoji_pipeline()


def _drawings() -> Any:
    from turbovlm_lab.zoo.drawings import load_drawings_pipeline

    return load_drawings_pipeline()


def _moving() -> Any:
    from turbovlm_lab.zoo.moving import load_moving_pipeline

    return load_moving_pipeline()


def _prepare(images: Sequence[Any]) -> Tensor:
    from turbovlm_lab.zoo.saliency import preprocess

    return preprocess(list(images))


EMOJI_PROMPTS = (
    "red apple, noto, on a photo",
    "smiling cat, twemoji, on white",
    "sailboat, fluent, on a photo",
    "pizza, noto, on white",
)

MOVING_PROMPTS = (
    "red apple, on a photo, moving left",
    "penguin, on white, moving up",
    "frog, on a photo, moving right",
    "sunflower, on white, moving down",
)

MODELS = {
    "clip": AddedModel(_clip, _prepare_for_clip),
    "drawings": AddedModel(_drawings, prompts=EMOJI_PROMPTS),
    "emoji": AddedModel(_emoji, prompts=EMOJI_PROMPTS),
    "moving": AddedModel(_moving, prompts=MOVING_PROMPTS),
    "pairs": AddedModel(_pairs, _prepare),
    "saliency": AddedModel(_saliency, _prepare, any_size=True),
    "scenes": AddedModel(_scenes, _prepare),
}
"""What `turbovlm` finds by the entry point group `turbovlm.models`."""
