"""The measurements of `turbovlm demo`: photographs named by CLIP, unmerged and in versions that cost less."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm_lab.demo.photos import Photo
from turbovlm_lab.demo.result import (
    TURBO,
    UNMERGED,
    Example,
    Found,
    Method,
    Result,
    Row,
    Settings,
    Texts,
    describe_machine,
)
from turbovlm_lab.demo.saliency import measure_saliency
from turbovlm_lab.demo.versions import (
    Encoder,
    Run,
    Version,
    agreement,
    costs,
    count_forwards,
    in_turn,
    timing_of,
    trace_of,
    versions_of,
)
from turbovlm_lab.zoo import clip

if TYPE_CHECKING:
    from PIL.Image import Image

    from turbovlm_lab.zoo.clip_names import ClipNames
    from turbovlm_lab.zoo.saliency import SaliencyViT

SHOWN_LABELS = 3
SHOWN_PARTS = (1 / 2, 1)
"""Parts of the encoder's depth after which the groups of patches are drawn."""


def count_steps(images: int, settings: Settings, with_saliency: bool) -> int:
    """How often `measure` calls `advance`."""
    return (count_forwards(images, settings) + 2) * (2 if with_saliency else 1)


def measure(
    model: nn.Module,
    names: ClipNames,
    source: str,
    photos: Sequence[Photo],
    settings: Settings,
    advance: Callable[[str], None],
    saliency: SaliencyViT | None = None,
) -> Result:
    """Run everything.

    Args:
        model: CLIP's image tower, in the class of `transformers`; it is left as it is.
        names: the labels' embeddings; `source`: where they come from, for the reader.
        photos: the images.
        advance: called with the name of the stage after each of `count_steps(…)` steps.
        saliency: the model of the second part; None leaves it out.
    """
    started, config = time.perf_counter(), cast(Any, model.config)
    encoder = Encoder(model, config.image_size, config.patch_size, clip.embed)
    images, shown = [photo.image for photo in photos], list(photos[: settings.shown])
    with torch.inference_mode():
        versions = versions_of(encoder, settings.shares)
        advance("CLIP, versions of equal cost")
        pixels = {side: clip.preprocess(images, side) for side in {version.side for version in versions}}
        runs = in_turn(versions, pixels, encoder.encode, _as_it_is, settings, lambda: advance("CLIP, in turn"))
        named = [_probabilities(runs, names, method) for method in (UNMERGED, TURBO)]
        drawn = _groups(encoder, versions, shown, pixels[encoder.side], settings.batch)
        advance("CLIP, drawings")
        second = None if saliency is None else measure_saliency(saliency, photos, settings, advance)
    return Result(
        machine=describe_machine(),
        settings=settings,
        texts=Texts(names.names, source),
        timing=timing_of(runs),
        rows=_rows(runs, names),
        found=tuple(_found(photo, names.names, named, place) for place, photo in enumerate(photos)),
        examples=tuple(
            Example(photo, _likeliest(names.names, named, place), drawn[place]) for place, photo in enumerate(shown)
        ),
        seconds=time.perf_counter() - started,
        saliency=second,
    )


def _as_it_is(version: Version, output: Tensor) -> Tensor:
    return output


def _rows(runs: Mapping[Version, Run], names: ClipNames) -> tuple[Row, ...]:
    full = next(iter(runs.values())).output
    labels, rows = names.probabilities(full).argmax(dim=1), []
    for cost, output in costs(runs):
        kept = agreement(full, output)
        same = int((names.probabilities(output).argmax(dim=1) == labels).sum())
        rows.append(Row(cost, same, kept.cosine, kept.worst, kept.drift))
    return tuple(rows)


def _probabilities(runs: Mapping[Version, Run], names: ClipNames, method: Method) -> Tensor:
    """Of every label for every image, `[images, labels]`, by a method at the first of its shares."""
    return names.probabilities(next(run.output for version, run in runs.items() if version.method is method))


def _found(photo: Photo, labels: Sequence[str], named: Sequence[Tensor], place: int) -> Found:
    whole, merged = (probabilities[place].max(dim=0) for probabilities in named)
    return Found(
        photo, labels[int(whole.indices)], float(whole.values), labels[int(merged.indices)], float(merged.values)
    )


def _likeliest(labels: Sequence[str], named: Sequence[Tensor], place: int) -> tuple[tuple[str, float, float], ...]:
    """The unmerged model's likeliest labels, and behind them the merged one's likeliest where it is none of them."""
    whole, merged = (probabilities[place] for probabilities in named)
    chosen = whole.topk(min(SHOWN_LABELS, len(labels))).indices.tolist()
    if (first := int(merged.argmax())) not in chosen:
        chosen.append(first)
    return tuple((labels[label], float(whole[label]), float(merged[label])) for label in chosen)


def _groups(
    encoder: Encoder, versions: Sequence[Version], shown: Sequence[Photo], pixels: Tensor, batch: int
) -> list[dict[int, tuple[int, Image]]]:
    """Of each photograph, which patches have become one token, by the library's defaults at the first share."""
    from turbovlm.visualize import groups

    version = next(version for version in versions if version.method is TURBO)
    drawn: list[dict[int, tuple[int, Image]]] = []
    for first in range(0, len(shown), batch):
        some = shown[first : first + batch]
        trace = trace_of(encoder, version, pixels[first : first + len(some)])
        blocks = [round(part * len(trace)) - 1 for part in SHOWN_PARTS]
        drawn += [
            {b: (trace[b].sizes.shape[1], groups(trace, photo.image, block=b, batch_index=i, cell=16)) for b in blocks}
            for i, photo in enumerate(some)
        ]
    return drawn
