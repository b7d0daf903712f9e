"""The demo's second part: what merging costs where every position counts, by a ViT-S/14 that finds what stands out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from turbovlm_lab.demo.photos import Photo
from turbovlm_lab.demo.result import Saliency, SaliencyExample, SaliencyRow, Settings
from turbovlm_lab.demo.versions import Encoder, Run, Version, costs, in_turn, timing_of, versions_of
from turbovlm_lab.zoo import saliency as zoo

if TYPE_CHECKING:
    from PIL.Image import Image

    from turbovlm_lab.zoo.saliency import SaliencyViT

SALIENT = 0.5
"""A pixel is salient where the heat map is at least this share of its largest value."""
SHOWN = 4
"""Photographs whose heat maps are drawn, at most."""


def measure_saliency(
    model: SaliencyViT, photos: Sequence[Photo], settings: Settings, advance: Callable[[str], None]
) -> Saliency:
    """Run the second part.

    Args:
        advance: called with the name of the stage, two times more than `in_turn` calls its own.
    """
    encoder = Encoder(model.backbone, zoo.IMAGE_SIZE, zoo.PATCH_SIZE, _encode)
    versions = versions_of(encoder, settings.shares)
    advance("saliency, versions of equal cost")
    images = [photo.image for photo in photos]
    pixels = {side: zoo.preprocess(images, side) for side in {version.side for version in versions}}
    finish = functools.partial(region_of, model)
    runs = in_turn(versions, pixels, _encode, finish, settings, lambda: advance("saliency, in turn"))
    examples = _examples(model, versions, pixels, photos[: min(SHOWN, settings.shown)])
    advance("saliency, drawings")
    return Saliency(timing_of(runs), _rows(runs), examples)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of regions, `[batch, height, width]` bool each → `[batch]`; 1 where both are empty."""
    union = (a | b).sum(dim=(1, 2))
    return torch.where(union == 0, 1.0, (a & b).sum(dim=(1, 2)) / union.clamp(min=1))


def salient_region(heat: Tensor) -> Tensor:
    """Where a heat map `[batch, 1, height, width]` reaches half its largest value → `[batch, height, width]`."""
    return (heat >= SALIENT * heat.amax(dim=(2, 3), keepdim=True))[:, 0]


def heat_of(model: SaliencyViT, version: Version, tokens: Tensor) -> Tensor:
    """The heat map that the head makes of a version's tokens, brought back to the full grid, at 224 pixels."""
    full = tokens if version.handle is None else version.handle.restore(tokens)
    heat: Tensor = model.head(full[:, 1:])
    return F.interpolate(heat, size=(zoo.IMAGE_SIZE, zoo.IMAGE_SIZE), mode="bilinear", align_corners=False)


def region_of(model: SaliencyViT, version: Version, tokens: Tensor) -> Tensor:
    """`salient_region` of `heat_of`."""
    return salient_region(heat_of(model, version, tokens))


def _encode(backbone: nn.Module, pixels: Tensor) -> Tensor:
    tokens: Tensor = backbone(pixel_values=pixels).last_hidden_state
    return tokens


def _rows(runs: dict[Version, Run]) -> tuple[SaliencyRow, ...]:
    whole, rows = next(iter(runs.values())).output, []
    for cost, region in costs(runs):
        iou = overlap(region, whole)
        rows.append(SaliencyRow(cost, iou.mean().item(), iou.median().item(), iou.min().item()))
    return tuple(rows)


def _examples(
    model: SaliencyViT, versions: Sequence[Version], pixels: dict[int, Tensor], shown: Sequence[Photo]
) -> tuple[SaliencyExample, ...]:
    """By every method at the first of its shares."""
    from turbovlm.visualize import heatmap

    heats: dict[str, Tensor] = {}
    for version in versions:
        if version.method.key not in heats:
            tokens = _encode(version.model, pixels[version.side][: len(shown)])
            heats[version.method.key] = heat_of(model, version, tokens)
    regions = {key: salient_region(heat) for key, heat in heats.items()}
    whole = regions[versions[0].method.key]
    iou = {key: overlap(region, whole) for key, region in regions.items()}

    def drawn(place: int, photo: Photo) -> dict[str, Image]:
        return {key: heatmap(heat[place, 0], photo.image, high=1.0, outline=SALIENT) for key, heat in heats.items()}

    return tuple(
        SaliencyExample(photo, drawn(place, photo), {key: float(each[place]) for key, each in iou.items()})
        for place, photo in enumerate(shown)
    )
