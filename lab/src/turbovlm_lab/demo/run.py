"""The measurements of `turbovlm demo`: tokens, multiply-accumulates, time and quality of each way of merging."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch import Tensor

import turbovlm
from turbovlm.apply import Handle
from turbovlm_lab.demo.photos import Photo
from turbovlm_lab.demo.result import (
    METHODS,
    MIN_ROUNDS,
    SALIENT,
    SEMANTIC_BLOCK,
    Baseline,
    Example,
    Method,
    Result,
    Row,
    Settings,
    describe_machine,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from turbovlm_lab.zoo.saliency import SaliencyViT

SHOWN_BLOCKS = (2, 5, 8, 11)


@dataclass(frozen=True)
class _Seen:
    """What a model makes of the images: CLS after block 9, final CLS, `[images, width]`; the salient regions."""

    tokens: int
    cls: Tensor
    cls_last: Tensor
    salient: Tensor


@dataclass(frozen=True)
class _Times:
    """Seconds per batch of one case, and the unmodified model's just before over it, per round."""

    seconds: list[float]
    speedups: list[float]


Case = tuple[Method, int]


def count_steps(settings: Settings) -> int:
    """How often `measure` calls `advance`."""
    cases = len(METHODS) * len(settings.amounts)
    return 1 + cases + settings.rounds + 1 + 1


def measure(model: SaliencyViT, photos: Sequence[Photo], settings: Settings, advance: Callable[[str], None]) -> Result:
    """Run everything, the model unmodified before and after.

    Args:
        photos: the images that quality is measured on; the first `batch` of them, repeated as needed, are timed.
        advance: called with the name of the stage after each of `count_steps(settings)` steps.
    """
    from turbovlm_lab.zoo.saliency import preprocess

    started = time.perf_counter()
    pixels = preprocess([photo.image for photo in photos])
    timed = pixels[torch.arange(settings.batch) % len(photos)]
    cases = [(method, r) for method in METHODS for r in settings.amounts]
    with torch.inference_mode():
        full = _look(model, pixels, settings.batch, None)
        full_macs = _macs(model.backbone, pixels)
        advance("the full model")
        seen, macs = {}, {}
        for method, r in cases:
            with turbovlm.apply(model.backbone, method.config(r)) as handle:
                seen[method.key, r] = _look(model, pixels, settings.batch, handle)
                macs[method.key, r] = _macs(model.backbone, pixels)
            advance(f"quality: {method.label}, r={r}")
        baseline_seconds, times = _time(model.backbone, timed, cases, settings, advance)
        head_seconds = _time_head(model, timed, settings.rounds)
        advance("time: the saliency head")
        examples = _examples(model, photos, pixels, settings)
        advance("drawings")
    baseline = Baseline(
        tokens=full.tokens,
        gmacs=full_macs / 1e9,
        ms=1e3 * statistics.median(baseline_seconds) / settings.batch,
        ms_range=_range([1e3 * seconds / settings.batch for seconds in baseline_seconds], 0.1),
        rounds=len(baseline_seconds) // len(cases),
        cls_between=_between(full.cls),
        head_ms=1e3 * head_seconds / settings.batch,
    )
    rows = tuple(
        _row(case, seen[case[0].key, case[1]], full, macs[case[0].key, case[1]], times[case[0].key, case[1]], settings)
        for case in cases
    )
    seconds = time.perf_counter() - started
    return Result(describe_machine(), settings, seconds, tuple(photos), baseline, rows, examples)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of regions, `[batch, height, width]` bool each → `[batch]`; 1 where both are empty."""
    union = (a | b).sum(dim=(1, 2))
    return torch.where(union == 0, 1.0, (a & b).sum(dim=(1, 2)) / union.clamp(min=1))


def salient_region(heat: Tensor) -> Tensor:
    """Where a heat map `[batch, 1, height, width]` reaches half its largest value → `[batch, height, width]`."""
    return (heat >= SALIENT * heat.amax(dim=(2, 3), keepdim=True))[:, 0]


def heat_of(model: SaliencyViT, tokens: Tensor, handle: Handle | None) -> Tensor:
    """The heat map from the encoder's tokens, brought back to the full grid where they were merged."""
    full = tokens if handle is None else handle.restore(tokens)
    return cast(Tensor, model.head(full[:, 1:]))


def _look(model: SaliencyViT, pixels: Tensor, batch: int, handle: Handle | None) -> _Seen:
    tokens, cls, cls_last, salient = 0, [], [], []
    for chunk in torch.split(pixels, batch):
        with _cls_after(model.backbone, SEMANTIC_BLOCK) as caught:
            out = model.backbone(pixel_values=chunk).last_hidden_state
        tokens = out.shape[1]
        cls.append(caught[0])
        cls_last.append(out[:, 0])
        salient.append(salient_region(heat_of(model, out, handle)))
    return _Seen(tokens, torch.cat(cls), torch.cat(cls_last), torch.cat(salient))


@contextmanager
def _cls_after(backbone: nn.Module, block: int) -> Iterator[list[Tensor]]:
    """Catch the CLS token that a block gives out."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append((output[0] if isinstance(output, tuple) else output)[:, 0].clone())

    hook = backbone.get_submodule(f"encoder.layer.{block}").register_forward_hook(catch)
    try:
        yield caught
    finally:
        hook.remove()


def _macs(backbone: nn.Module, pixels: Tensor) -> int:
    return int(turbovlm.profile.macs(backbone, pixel_values=pixels[:1]))


def _time(
    backbone: nn.Module, pixels: Tensor, cases: Sequence[Case], settings: Settings, advance: Callable[[str], None]
) -> tuple[list[float], dict[tuple[str, int], _Times]]:
    """Time every case once per round, each time right after the unmodified model, in an order that shifts.

    A first round warms up and is not counted.
    """
    started = time.perf_counter()
    unmodified: list[float] = []
    times = {(method.key, r): _Times([], []) for method, r in cases}
    for turn in range(settings.rounds + 1):
        late = time.perf_counter() - started > settings.timing_seconds
        if turn > MIN_ROUNDS and late:
            advance("time: no further round on this slow or busy machine")
            continue
        shift = turn * len(cases) // (settings.rounds + 1)
        for method, r in (*cases[shift:], *cases[:shift]):
            own = _seconds(backbone, pixels)
            with turbovlm.apply(backbone, method.config(r)):
                merged = _seconds(backbone, pixels)
            if turn > 0:
                unmodified.append(own)
                times[method.key, r].seconds.append(merged)
                times[method.key, r].speedups.append(own / merged)
        if turn > 0:
            advance(f"time: round {turn} of {settings.rounds}")
    return unmodified, times


def _seconds(backbone: nn.Module, pixels: Tensor) -> float:
    started = time.perf_counter()
    backbone(pixel_values=pixels)
    return time.perf_counter() - started


def _time_head(model: SaliencyViT, pixels: Tensor, rounds: int) -> float:
    patches = model.backbone(pixel_values=pixels).last_hidden_state[:, 1:]
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        model.head(patches)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _range(values: Sequence[float], outside: float) -> tuple[float, float]:
    """The quantiles that leave a share `outside` of the values below and above."""
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([outside, 1 - outside]).double())
    return low.item(), high.item()


def _between(cls: Tensor) -> float | None:
    """The mean cosine between different rows."""
    count = cls.shape[0]
    if count < 2:
        return None
    unit = torch.nn.functional.normalize(cls, dim=-1)
    return ((unit @ unit.T).sum().item() - count) / (count * (count - 1))


def _row(case: Case, seen: _Seen, full: _Seen, macs: int, times: _Times, settings: Settings) -> Row:
    method, r = case
    cls = torch.cosine_similarity(seen.cls, full.cls, dim=-1)
    iou = overlap(seen.salient, full.salient)
    return Row(
        method=method.key,
        r=r,
        tokens=seen.tokens,
        gmacs=macs / 1e9,
        ms=1e3 * statistics.median(times.seconds) / settings.batch,
        speedup=statistics.median(times.speedups),
        speedup_range=_range(times.speedups, 0.25),
        cls=cls.mean().item(),
        cls_worst=cls.min().item(),
        cls_last=torch.cosine_similarity(seen.cls_last, full.cls_last, dim=-1).mean().item(),
        iou=iou.mean().item(),
        iou_median=statistics.median(iou.tolist()),
        iou_worst=iou.min().item(),
        iou_each=tuple(iou.tolist()),
    )


def _examples(model: SaliencyViT, photos: Sequence[Photo], pixels: Tensor, settings: Settings) -> tuple[Example, ...]:
    from turbovlm.visualize import groups, heatmap

    shown = list(photos[: settings.shown])
    pixels = pixels[: len(shown)]
    heats: dict[str, Tensor] = {}
    drawn: list[dict[int, tuple[int, Image]]] = []
    for method in (None, *METHODS):
        config = None if method is None else method.config(settings.shown_amount, trace=method is METHODS[0])
        with nullcontext() if config is None else turbovlm.apply(model.backbone, config) as handle:
            tokens = model.backbone(pixel_values=pixels).last_hidden_state
            heats["full" if method is None else method.key] = heat_of(model, tokens, handle)
            if handle is not None and method is METHODS[0]:
                trace = handle.trace
                drawn = [
                    {
                        b: (trace[b].sizes.shape[1], groups(trace, photo.image, block=b, batch_index=i, cell=14))
                        for b in SHOWN_BLOCKS
                    }
                    for i, photo in enumerate(shown)
                ]
    regions = {key: salient_region(heat) for key, heat in heats.items()}
    return tuple(
        Example(
            photo=photo,
            groups=drawn[i],
            heat={key: heatmap(heat[i, 0], photo.image, high=1.0, outline=SALIENT) for key, heat in heats.items()},
            iou={key: overlap(region, regions["full"])[i].item() for key, region in regions.items()},
        )
        for i, photo in enumerate(shown)
    )
