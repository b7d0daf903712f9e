"""A model by its name, and pictures as it takes them: for the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from turbovlm.loading import Where, added_models, loading, with_processor

Prepare = Callable[[Sequence[Any]], Any]
"""Pictures to what the model takes."""


def load(where: Where) -> tuple[Any, Prepare]:
    """A model in eval mode, and what prepares pictures for it.

    Raises:
        ConfigError: no such model among those of another package.
        TurboError: it cannot be loaded.
    """
    added = added_models(where.library)
    if added is not None:
        model, preprocess = added.load_encoder_for_pictures(where.name)
        return model.to(where.device, where.dtype), lambda pictures: _there(preprocess(list(pictures)), where)
    if where.library == "timm":
        return _of_timm(where)
    with loading(where):
        import transformers

        names = transformers.AutoConfig.from_pretrained(where.name).architectures or []
    kind = getattr(transformers, names[0], transformers.AutoModel) if names else transformers.AutoModel
    model, processor = with_processor(where, kind)
    images = getattr(processor, "image_processor", processor)

    def prepare(pictures: Sequence[Any]) -> Any:
        made = images(images=list(pictures), return_tensors="pt")
        return {name: _there(value, where) for name, value in made.items()}

    return model, prepare


def _of_timm(where: Where) -> tuple[Any, Prepare]:
    with loading(where):
        import timm

        model = timm.create_model(where.name, pretrained=True).eval().to(where.device, where.dtype)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return model, lambda pictures: _there(torch.stack([transform(picture) for picture in pictures]), where)


def _there(value: torch.Tensor, where: Where) -> torch.Tensor:
    return value.to(where.device, where.dtype) if value.is_floating_point() else value.to(where.device)
