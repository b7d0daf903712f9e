"""Figures 3 and 6: what the blocks of an encoder say about their tokens, and which patches become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import turbovlm
from turbovlm.config import TurboConfig
from turbovlm.encoder.state import BlockTrace
from turbovlm.visualize import groups
from turbovlm_lab.evaluate.run import batches
from turbovlm_lab.evaluate.settings import by_method
from turbovlm_lab.reproduce.declared import DEFAULT_SHARE
from turbovlm_lab.reproduce.running import Progress, Source

if TYPE_CHECKING:
    from PIL.Image import Image

TOP = 0.1
"""Of the patches: those whose share of attention says how concentrated it is."""
SHOWN, CELL = 5, 14
SHOWN_METHODS = ("turbovlm", "paper", "ToMe", "random")


@dataclass(frozen=True)
class Blocks:
    """Figure 3, for each block: mean over images and standard deviation.

    Attributes:
        redundancy: R, over the candidates.
        concentration: the share of A, over patches, that falls on a tenth of them.
    """

    redundancy: tuple[tuple[float, float], ...]
    concentration: tuple[tuple[float, float], ...]


def by_block(source: Source, images: int, on_progress: Progress) -> Blocks:
    """R and A before every block, nothing merged."""
    found: list[list[BlockTrace]] = []
    samples = source.data.samples[:images]
    with turbovlm.apply(source.predictor.model, r=0, blocks="every", trace=True) as handle:
        for prepared in batches(source.predictor, samples, None, source.batch, 0):
            source.predictor.predict(prepared)
            found.append(_first_tower(handle.trace))
            on_progress(len(prepared))
    every = list(zip(*found))
    return Blocks(
        tuple(_spread([t.redundancy.nanmean(dim=1) for t in traces]) for traces in every),
        tuple(_spread([concentration(_of_patches(t)) for t in traces]) for traces in every),
    )


def _of_patches(trace: BlockTrace) -> Tensor:
    """A of the patches alone, `[batch, patches]`."""
    return trace.semantic[:, trace.prefix : trace.semantic.shape[1] - trace.suffix]


def concentration(semantic: Tensor) -> Tensor:
    """The share of A, `[batch, patches]`, that falls on the tenth of the patches with most of it, `[batch]`."""
    most = max(1, round(TOP * semantic.shape[1]))
    return semantic.topk(most, dim=1).values.sum(dim=1) / semantic.sum(dim=1)


def merged_images(source: Source, on_progress: Progress) -> tuple[Image, Sequence[str]]:
    """Figure 6: a row per image, the image itself and its groups after the last block by each method.

    Returns:
        The sheet, and the names of its columns.
    """
    from PIL import Image

    from turbovlm_lab.zoo.saliency import centre_square

    count = len(source.data.samples)
    samples = [source.data.samples[i * count // SHOWN] for i in range(min(SHOWN, count))]
    shown = [centre_square(sample.images[0].open()).resize((224, 224)) for sample in samples]
    columns = [shown]
    for method in SHOWN_METHODS:
        config = by_method(TurboConfig(flops=DEFAULT_SHARE, trace=True), method)
        with turbovlm.apply(source.predictor.model, config) as handle:
            source.predictor.predict([source.predictor.prepare(sample, None) for sample in samples])
            trace = _first_tower(handle.trace)
        columns.append([groups(trace, image, batch_index=i, cell=CELL) for i, image in enumerate(shown)])
        on_progress(len(samples))
    side, gap = 224, 6
    sheet = Image.new("RGB", ((side + gap) * len(columns) - gap, (side + gap) * len(samples) - gap), "white")
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            sheet.paste(image.resize((side, side)), (x * (side + gap), y * (side + gap)))
    return sheet, ("image", *SHOWN_METHODS)


def _first_tower(trace: Sequence[BlockTrace]) -> list[BlockTrace]:
    """Of a model with several encoders, the first one's blocks."""
    ends = [i for i in range(1, len(trace)) if trace[i].block <= trace[i - 1].block]
    return list(trace[: ends[0]] if ends else trace)


def _spread(values: Sequence[Tensor]) -> tuple[float, float]:
    each = torch.cat(list(values))
    return float(each.mean()), float(each.std(unbiased=False))
