"""The zoo's models by name, for the commands of `turbovlm`: `zoo:saliency`, `zoo:pairs`, `zoo:scenes`, `zoo:emoji`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn as nn

from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.zoo.emoji import load_emoji_pipeline
from turbovlm_lab.zoo.saliency import load_saliency_vit, preprocess


def load_encoder(name: str, image_size: int | None, pretrained: bool) -> nn.Module:
    """An encoder to be inspected or timed.

    Args:
        name: `"saliency"`.
        image_size: pixels a side, instead of the model's own.
        pretrained: must be True: there is no config without weights.

    Raises:
        TurboError: another name, or not `pretrained`.
    """
    if name != "saliency":
        raise TurboError(f"'zoo:{name}': there is zoo:saliency, and zoo:emoji for turbovlm bench")
    if not pretrained:
        raise TurboError("'zoo:saliency' is a pretrained model: give --pretrained")
    model: Any = load_saliency_vit()
    if image_size is not None:
        model.backbone.config.image_size = image_size
    return cast(nn.Module, model.backbone)


def load_encoder_for_pictures(name: str) -> tuple[nn.Module, Callable[..., Any]]:
    """An encoder, and what makes its input of a list of pictures.

    Raises:
        ConfigError: no such model.
    """
    if name == "saliency":
        model: Any = load_saliency_vit().backbone
    elif name == "pairs":
        from turbovlm_lab.zoo.dual_encoder import load_dual_encoder

        model = load_dual_encoder().vision
    elif name == "scenes":
        from turbovlm_lab.zoo.reader import scene_encoder

        model = scene_encoder()
    else:
        raise ConfigError(f"zoo:{name}: of the zoo, saliency, pairs and scenes have an encoder to calibrate")
    return model, preprocess


def load_pipeline(name: str, pretrained: bool) -> Any:
    """A pipeline for image generation.

    Raises:
        TurboError: another name than `"emoji"`, or not `pretrained`.
    """
    if name != "emoji":
        raise TurboError(f"'zoo:{name}': there is zoo:emoji for image generation")
    if not pretrained:
        raise TurboError("'zoo:emoji' is a pretrained model: give --pretrained")
    return load_emoji_pipeline()
