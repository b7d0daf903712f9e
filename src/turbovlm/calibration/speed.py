"""How much faster settings make a forward, on the model's device, and in words which device that is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from turbovlm.apply import apply
from turbovlm.config import Config
from turbovlm.profile.comparison import describe_device, ratios
from turbovlm.profile.timing import interleaved
from turbovlm.sharing import twin

WARMUP = 1
"""Rounds before those that are timed."""


def measure_speedups(
    model: nn.Module, versions: Sequence[tuple[Config, ...]], forward: Callable[[nn.Module], object], rounds: int
) -> list[float]:
    """The median over the rounds of how many times faster `forward` is with each of several settings.

    All of them and the model itself are timed in turn, so that a drift of the machine hits all alike.
    """
    twins = [twin(model) for _ in range(len(versions) + 1)]
    for merged, configs in zip(twins[1:], versions):
        apply(merged, *configs)

    def timed(version: nn.Module) -> object:
        with torch.inference_mode():
            return forward(version)

    forwards = [functools.partial(timed, version) for version in twins]
    device = next(model.parameters()).device
    (plain, *others), _ = interleaved(forwards, device, rounds, WARMUP, lambda _: None)
    return [ratios(plain, other).median for other in others]


def device_in_words(model: nn.Module) -> str:
    """What a model runs on: `"NVIDIA H200, bfloat16"`, or `"x86_64 CPU, 2 threads, float32"`."""
    weights = next(model.parameters())
    count = torch.get_num_threads()
    threads = f", {count} thread{'' if count == 1 else 's'}" if weights.device.type == "cpu" else ""
    return f"{describe_device(weights.device)}{threads}, {str(weights.dtype).removeprefix('torch.')}"
