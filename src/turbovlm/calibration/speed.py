"""How much faster settings make a forward, on the model's device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn

from turbovlm.apply import apply
from turbovlm.config import Config
from turbovlm.profile.compare import twin
from turbovlm.profile.comparison import ratios
from turbovlm.profile.timing import interleaved

ROUNDS, WARMUP = 7, 1
"""Rounds that are timed, of which the median counts, and rounds before them, which do not."""


def measure_speedup(model: nn.Module, configs: tuple[Config, ...], forward: Callable[[nn.Module], object]) -> float:
    """The median of how many times faster `forward` is with the settings, both versions timed in turn."""
    plain, merged = twin(model), twin(model)
    apply(merged, *configs)

    def timed(version: nn.Module) -> object:
        with torch.inference_mode():
            return forward(version)

    device = next(model.parameters()).device
    clock, _ = interleaved([lambda: timed(plain), lambda: timed(merged)], device, ROUNDS, WARMUP, lambda _: None)
    return ratios(clock[0], clock[1]).median
