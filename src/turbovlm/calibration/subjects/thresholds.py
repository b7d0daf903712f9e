"""Thresholds instead of numbers: images with more redundancy lose more tokens, at the same cost on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from turbovlm.apply import apply
from turbovlm.calibration.bound import upper_bound
from turbovlm.calibration.drift import clearly_less
from turbovlm.calibration.result import Calibration
from turbovlm.calibration.subject import Found
from turbovlm.calibration.subjects.encoder import EncoderSubject
from turbovlm.config import TurboConfig

NEVER = 1e9
"""A threshold that no degree is above."""


def with_thresholds_if_better(
    subject: EncoderSubject, found: Found, calibration: Calibration, searched: Sequence[int], held: Sequence[int]
) -> Calibration:
    """The same calibration with thresholds, where these are clearly better on the images that were searched on.

    Its cost is the mean over the images held out; its curve stays that of numbers.
    """
    config = with_thresholds(subject, found.config, searched)
    if not clearly_less(subject.drift(config, searched), found.drift):
        return calibration
    drift = subject.drift(config, held)
    bound = upper_bound(drift.tolist())
    return replace(
        calibration,
        config=subject.finished(config),
        flops=mean_cost(subject, config, held),
        drift=drift.mean().item(),
        bound=bound.value,
        coverage=bound.coverage,
    )


def with_thresholds(subject: EncoderSubject, config: TurboConfig, images: Sequence[int]) -> TurboConfig:
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


def mean_cost(subject: EncoderSubject, config: TurboConfig, images: Sequence[int]) -> float:
    """Share of the multiply-accumulates left, on average over images one at a time."""
    encoder = subject.encoder
    full = encoder.shape.macs((encoder.tokens,) * (encoder.shape.depth + 1))
    total = 0.0
    with apply(subject.model, replace(config, trace=True)) as handle:
        for image in images:
            subject.run([image], 1)
            total += encoder.shape.macs((encoder.tokens, *(entry.sizes.shape[1] for entry in handle.trace))) / full
    return total / len(images)


def _degrees(subject: EncoderSubject, config: TurboConfig, images: Sequence[int]) -> list[list[torch.Tensor]]:
    """E of the candidates, per image and block, one image at a time."""
    seen = []
    with apply(subject.model, replace(config, trace=True)) as handle:
        for image in images:
            subject.run([image], 1)
            seen.append([entry.degree[~entry.degree.isnan()] for entry in handle.trace])
    return seen
