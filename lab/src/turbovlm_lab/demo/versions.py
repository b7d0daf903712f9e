"""One encoder in several versions of equal cost, and their times and outputs, image by image, in turn."""

from __future__ import annotations

import bisect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import turbovlm
from turbovlm.apply import Handle
from turbovlm.calibration.outputs import count_images, select_images
from turbovlm.encoder.feature import EncoderFeature
from turbovlm.encoder.schedule import EncoderShape, spread, token_counts
from turbovlm.encoder.state import BlockTrace
from turbovlm.profile.macs import counting
from turbovlm.sharing import twin
from turbovlm_lab.demo.result import METHODS, MIN_ROUNDS, SMALLER, TURBO, UNMERGED, Cost, Method, Settings, Timing

Encode = Callable[[nn.Module, Any], Tensor]
"""What is timed: a version of the encoder and a batch's pixels → what it makes of the images."""


@dataclass(frozen=True)
class Encoder:
    """An encoder, pixels per side of its images and of its patches, and how it is run.

    Attributes:
        settings: of `TurboConfig`, with which it is merged by every method.
    """

    model: nn.Module
    side: int
    patch: int
    encode: Encode
    settings: Mapping[str, Any] = field(default_factory=dict)

    def tokens(self, side: int, prefix: int) -> int:
        """Of an image of that many pixels per side."""
        return (side // self.patch) ** 2 + prefix


@dataclass(frozen=True, eq=False)
class Version:
    """A copy of the encoder that shares its weights, prepared by a method for a share of the cost.

    Attributes:
        side: pixels per side of the images that it reads.
        macs: multiply-accumulates per image, counted.
        handle: of what was applied to it; None where nothing was.
    """

    method: Method
    share: float | None
    setting: str
    model: nn.Module
    side: int
    tokens: int
    macs: int
    handle: Handle | None


@dataclass(frozen=True)
class Run:
    """Outputs of every image, `[images, …]`, and seconds of CPU time per image in every round that counts."""

    output: Tensor
    seconds: Sequence[float]


@dataclass(frozen=True)
class Agreement:
    """How close outputs stay to the unmerged model's.

    Attributes:
        cosine: mean over the images; `worst`: the smallest.
        drift: 1 − cosine with the mean of the unmerged outputs taken off both, mean; None for one image.
    """

    cosine: float
    worst: float
    drift: float | None


def versions_of(
    encoder: Encoder,
    shares: Sequence[float],
    methods: Sequence[Method] = METHODS,
    advance: Callable[[], object] = lambda: None,
) -> list[Version]:
    """The unmerged encoder, then methods at every share, `TURBO` first; the others cost what it turned out to cost.

    Args:
        advance: called after each share.
    """
    with turbovlm.apply(twin(encoder.model), r=0, **encoder.settings) as handle:
        shape = _shape(handle)
    made = [_version(encoder, UNMERGED, None, f"{encoder.side} px", encoder.side, shape, None)]
    for share in shares:
        merged = merged_version(encoder, share)
        made.append(merged)
        cost = merged.macs / made[0].macs
        made += [_at_cost(encoder, method, share, cost, shape) for method in methods if method is not TURBO]
        advance()
    return made


def merged_version(encoder: Encoder, share: float) -> Version:
    """The encoder as the library's defaults merge it."""
    model = twin(encoder.model)
    handle = turbovlm.apply(model, flops=share, **encoder.settings, **TURBO.settings)
    return _version(encoder, TURBO, share, f"flops={share:g}", encoder.side, _shape(handle), handle, model)


def trace_of(encoder: Encoder, version: Version, pixels: Any) -> Sequence[BlockTrace]:
    """Where a version's tokens go: none where nothing merges. In a copy of it, as recording takes time."""
    if version.handle is None:
        return ()
    (feature,), model = version.handle.features, twin(encoder.model)
    with turbovlm.apply(model, cast(EncoderFeature, feature).config.changed(trace=True)) as handle:
        encoder.encode(model, pixels)
        return handle.trace


def equal_amounts(shape: EncoderShape, tokens: int, cost: float) -> tuple[int, ...]:
    """Tokens to merge in every block, equally many by one more or less, of cost closest to a share of the encoder's."""
    full = shape.macs((tokens,) * (shape.depth + 1))

    def share(total: int) -> float:
        return shape.macs(token_counts(spread(total, shape.depth), tokens, shape.protected, 0)) / full

    most = shape.depth * (tokens // 2)
    about = bisect.bisect_left(range(most), -cost, key=lambda total: -share(total))
    near = range(max(about - shape.depth, 0), min(about + shape.depth, most) + 1)  # which blocks merge one more matters
    return spread(min(near, key=lambda total: abs(share(total) - cost)), shape.depth)


def smaller_side(encoder: Encoder, shape: EncoderShape, cost: float) -> int:
    """Pixels per side of an image whose encoding costs closest to a share, a multiple of the patch's."""

    def macs(side: int) -> int:
        return shape.macs((encoder.tokens(side, shape.protected),) * (shape.depth + 1))

    sides = range(encoder.patch, encoder.side + 1, encoder.patch)
    return min(sides, key=lambda side: abs(macs(side) / macs(encoder.side) - cost))


def _at_cost(encoder: Encoder, method: Method, share: float, cost: float, shape: EncoderShape) -> Version:
    if method is SMALLER:
        side = smaller_side(encoder, shape, cost)
        return _version(encoder, method, share, f"{side} px", side, shape, None)
    with turbovlm.apply(twin(encoder.model), r=0, **encoder.settings, **method.settings) as unused:
        shape = _shape(unused)
    amounts = equal_amounts(shape, encoder.tokens(encoder.side, shape.protected), cost)
    model = twin(encoder.model)
    handle = turbovlm.apply(model, r=amounts, **encoder.settings, **method.settings)
    few, many = min(amounts), max(amounts)
    setting = f"r={few}" if few == many else f"r={few}–{many}"
    return _version(encoder, method, share, setting, encoder.side, shape, handle, model)


def _version(
    encoder: Encoder,
    method: Method,
    share: float | None,
    setting: str,
    side: int,
    shape: EncoderShape,
    handle: Handle | None,
    model: nn.Module | None = None,
) -> Version:
    model = twin(encoder.model) if model is None else model
    tokens = encoder.tokens(side, shape.protected)
    left = tokens if handle is None else handle.schedule(tokens).tokens[-1]
    with counting() as counted:
        encoder.encode(model, torch.zeros(1, 3, side, side))
    return Version(method, share, setting, model, side, left, counted(), handle)


def _shape(handle: Handle) -> EncoderShape:
    (feature,) = handle.features
    return cast(EncoderFeature, feature).shape


def count_forwards(images: int, settings: Settings, methods: int = len(METHODS)) -> int:
    """How often `in_turn` calls `advance`, for the versions of `versions_of`."""
    return _rounds(images, settings) * (1 + methods * len(settings.shares))


def _rounds(images: int, settings: Settings) -> int:
    """The first, to warm up, is not timed."""
    return max(settings.rounds + 1, math.ceil(images / settings.batch))


def in_turn(
    versions: Sequence[Version],
    pixels: Mapping[int, Any],
    encode: Encode,
    finish: Callable[[Version, Tensor], Tensor],
    settings: Settings,
    advance: Callable[[], None],
) -> dict[Version, Run]:
    """Run every version once per round on the round's batch, forwards and backwards in turn.

    Rounds walk through the images, and again from the first where they are fewer than the rounds can take.

    Args:
        pixels: by side, every image, `[images, 3, side, side]`, or tensors by name.
        finish: what is kept of a version's output, `[batch, …]`; not timed.
        advance: called after each of `count_forwards(images, settings)` forwards, run or left out.
    """
    images, started = count_images(next(iter(pixels.values()))), time.perf_counter()
    outputs: dict[Version, list[Tensor]] = {version: [] for version in versions}
    seconds: dict[Version, list[float]] = {version: [] for version in versions}
    for turn in range(_rounds(images, settings)):
        first = turn * settings.batch
        late = time.perf_counter() - started > settings.timing_seconds
        skipped = late and first >= images and turn > MIN_ROUNDS
        places = [place % images for place in range(first, first + settings.batch)]
        for version in versions[:: 1 if turn % 2 == 0 else -1]:
            if not skipped:
                batch = select_images(pixels[version.side], places)
                start = time.process_time()
                output = encode(version.model, batch)
                taken = time.process_time() - start
                if first < images:
                    outputs[version].append(finish(version, output))
                if turn > 0:
                    seconds[version].append(taken / settings.batch)
            advance()
    return {version: Run(torch.cat(outputs[version])[:images], seconds[version]) for version in versions}


def costs(runs: Mapping[Version, Run]) -> Iterator[tuple[Cost, Tensor]]:
    """Each version's cost, against the first's, which is the unmerged one, and its outputs."""
    (whole, own), *_ = runs.items()
    for version, run in runs.items():
        ratios = [before / after for before, after in zip(own.seconds, run.seconds)]
        cost = Cost(
            method=version.method.key,
            share=version.share,
            setting=version.setting,
            tokens=version.tokens,
            macs=version.macs / whole.macs,
            gmacs=version.macs / 1e9,
            ms=1e3 * statistics.median(run.seconds),
            speedup=statistics.median(ratios),
            speedup_range=_range(ratios, 0.25),
        )
        yield cost, run.output


def agreement(whole: Tensor, output: Tensor) -> Agreement:
    """Of a version's outputs with the unmerged model's, `[images, width]` each."""
    cosine, centre = F.cosine_similarity(whole, output), whole.mean(dim=0)
    drift = 1 - F.cosine_similarity(whole - centre, output - centre).mean().item()
    return Agreement(cosine.mean().item(), cosine.min().item(), drift if len(whole) > 1 else None)


def timing_of(runs: Mapping[Version, Run]) -> Timing:
    """How steady the unmerged version's times were."""
    own = next(iter(runs.values())).seconds
    return Timing(len(own), _range([1e3 * seconds for seconds in own], 0.1))


def _range(values: Sequence[float], outside: float) -> tuple[float, float]:
    """The quantiles that leave a share `outside` of the values below and above."""
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([outside, 1 - outside]).double())
    return low.item(), high.item()
