"""How far what a model hands on drifts from its own, image by image, under a setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.apply import apply
from turbovlm.calibration.handing import Measure, features_of, some_of
from turbovlm.config import TurboConfig
from turbovlm.errors import TurboError


@dataclass(eq=False)
class Subject:
    """A model and images, with what it hands on unmerged.

    Attributes:
        model: left as it is by every call.
        inputs: the images, as the model takes them; `count` of them.
        measure: what is compared.
        batch: images in a forward.
        on_images: told how many more have gone through the model.
        own: what the model hands on, per part `[images, tokens, width]`, their mean over the images taken off.
        means: that mean.
    """

    model: nn.Module
    inputs: Any
    count: int
    measure: Measure
    batch: int
    on_images: Callable[[int], object]
    own: list[Tensor] = field(init=False, repr=False)
    means: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = self.look(range(self.count))
        for part in parts:
            if not part.isfinite().all():
                raise TurboError("the model's own outputs are NaN or infinite on these images; nothing was calibrated")
        self.means = [part.mean(dim=0) for part in parts]
        self.own = [part - mean for part, mean in zip(parts, self.means)]

    def drift(self, config: TurboConfig, images: Sequence[int]) -> Tensor:
        """1 − cosine to the model's own, with the mean image taken off both, `[len(images)]`.

        The mean over tokens, then over the parts: CLS and the patches count alike.

        Raises:
            TurboError: the outputs are NaN, or of another shape than the model's own.
        """
        with apply(self.model, replace(config, dense=True)):
            parts = self.look(images, 1 if config.thresholds else self.batch)
        places = torch.as_tensor(list(images), device=self.own[0].device)
        found = torch.zeros(len(places), device=self.own[0].device)
        for part, own, mean in zip(parts, self.own, self.means):
            if part.shape[1:] != own.shape[1:]:
                raise TurboError(
                    f"measure: gave {tuple(part.shape[1:])} per image with merging and {tuple(own.shape[1:])} without"
                )
            found += (1 - torch.cosine_similarity(part - mean, own[places], dim=-1)).mean(dim=1) / len(parts)
        if not found.isfinite().all():
            raise TurboError(f"the model's outputs are NaN or infinite with {config.amount}; nothing was calibrated")
        return found

    @torch.inference_mode()
    def look(self, images: Sequence[int], batch: int | None = None) -> list[Tensor]:
        """What the model, as it is now, hands on: per part `[len(images), tokens, width]`."""
        size = batch or self.batch
        chunks = [images[start : start + size] for start in range(0, len(images), size)]
        seen = []
        for chunk in chunks:
            seen.append(features_of(self.measure, self.model, some_of(self.inputs, chunk)))
            self.on_images(len(chunk))
        return [torch.cat(parts) for parts in zip(*seen)]
