"""Inputs of native size for an encoder that was found in a model."""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.encoder.towers import Tower
from turbovlm.errors import UnsupportedModelError


def example_inputs(tower: Tower) -> dict[str, Tensor | None]:
    """One input of native size for a tower's forward, by argument name; see `Layout.inputs`.

    Raises:
        UnsupportedModelError: the family does not say how to run it.
    """
    if tower.layout.inputs is None:
        raise UnsupportedModelError(f"{tower.layout.family}: give its Layout `inputs`, which say how to run it")
    return tower.layout.inputs(tower.module)


def random_inputs(tower: Tower, batch: int, dtype: torch.dtype, device: str | torch.device) -> dict[str, Tensor | None]:
    """`example_inputs` of a batch of images, with seeded noise for what has no values."""
    generator = torch.Generator().manual_seed(0)

    def filled(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if value.device.type != "meta":
            return value.expand(batch, *value.shape[1:]).to(device)
        return torch.randn(batch, *value.shape[1:], generator=generator).to(device, dtype)

    return {name: filled(value) for name, value in example_inputs(tower).items()}
