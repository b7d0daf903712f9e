"""Thresholds instead of numbers: pictures with more redundancy lose more tokens, at the same cost on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from turbovlm.apply import apply
from turbovlm.calibration.drift import Subject
from turbovlm.calibration.search import Encoder
from turbovlm.config import TurboConfig

NEVER = 1e9
"""A threshold that no degree is above."""


def with_thresholds(subject: Subject, config: TurboConfig, images: Sequence[int]) -> TurboConfig:
    """The thresholds at which each block merges, on average over these images, as many as `config.r` says.

    Block by block: what a block sees depends on the thresholds of those before it.
    """
    assert isinstance(config.r, tuple)
    found: list[float] = []
    for block, r in enumerate(config.r):
        rest = [NEVER] * (len(config.r) - block)
        degrees = [each[block] for each in _degrees(subject, replace(config, thresholds=(*found, *rest)), images)]
        ranked = torch.cat(degrees).sort(descending=True).values
        found.append(ranked[min(r * len(images), len(ranked) - 1)].item())
    return replace(config, thresholds=tuple(found))


def mean_ratio(subject: Subject, encoder: Encoder, config: TurboConfig, images: Sequence[int]) -> float:
    """Share of the multiply-accumulates left, on average over images one at a time."""
    full = encoder.shape.macs((encoder.tokens,) * (encoder.shape.depth + 1))
    total = 0.0
    with apply(subject.model, replace(config, trace=True)) as handle:
        for image in images:
            subject.look([image])
            total += encoder.shape.macs((encoder.tokens, *(entry.sizes.shape[1] for entry in handle.trace))) / full
    return total / len(images)


def _degrees(subject: Subject, config: TurboConfig, images: Sequence[int]) -> list[list[torch.Tensor]]:
    """E of the candidates, per image and block, one image at a time."""
    seen = []
    with apply(subject.model, replace(config, trace=True)) as handle:
        for image in images:
            subject.look([image])
            seen.append([entry.degree[~entry.degree.isnan()] for entry in handle.trace])
    return seen
