"""What `turbovlm demo` runs, and what it finds."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import turbovlm
from turbovlm.config import TurboConfig
from turbovlm.errors import ConfigError
from turbovlm_lab.demo.photos import Photo

if TYPE_CHECKING:
    from PIL.Image import Image


SEMANTIC_BLOCK = 9
"""The block after which CLS is compared, counted from 0: the fine-tuning for saliency changed the two after it."""

SALIENT = 0.5
"""A pixel is salient where the heat map is at least this share of its largest value."""


MIN_ROUNDS = 2
"""Rounds of timing that are run however slow the machine is."""


@dataclass(frozen=True)
class Method:
    """A way of choosing which tokens to merge: `settings` are those of `TurboConfig`."""

    key: str
    label: str
    explanation: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self, r: int, *, trace: bool = False) -> TurboConfig:
        return TurboConfig(r=r, trace=trace, **self.settings)


_TOME = {"similarity": "keys", "partition": "alternate", "order": "partition", "reduce": "merge"}

METHODS = (
    Method("turbo", "turbovlm", "the library's default settings"),
    Method(
        "redundancy",
        "ToMe",
        "the most redundant tokens, by the cosine of their keys (Token Merging, 2023)",
        {"degree": "redundancy", **_TOME},
    ),
    Method(
        "random",
        "random",
        "tokens drawn at random, each still merged into the partner of most similar key: the control",
        {"degree": "random", **_TOME},
    ),
)


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Args:
        amounts: the values of r.
        batch: images per batch.
        rounds: how often everything is timed.
        timing_seconds: no further round begins after this time, on a slow or busy machine, but `MIN_ROUNDS` are run.
        shown: photographs of which the report shows drawings; `shown_amount` is their r.
    """

    amounts: tuple[int, ...] = (0, 4, 8, 12, 16, 20)
    batch: int = 4
    rounds: int = 7
    timing_seconds: float = 100
    shown: int = 4
    shown_amount: int = 16

    def __post_init__(self) -> None:
        for name in ("batch", "rounds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: must be an integer ≥ 1")


QUICK = Settings(amounts=(0, 16), batch=2, rounds=2, shown=2)
QUICK_IMAGES = 4


@dataclass(frozen=True)
class Machine:
    cpu: str
    threads: int
    python: str
    torch: str
    transformers: str
    turbovlm: str
    date: str


@dataclass(frozen=True)
class Baseline:
    """The unmodified model.

    Attributes:
        tokens: that the encoder handles, CLS included.
        gmacs: 10⁹ multiply-accumulates of the encoder per image.
        ms: median milliseconds of the encoder per image; `ms_range` the 10th and the 90th percentile.
        head_ms: median milliseconds of the saliency head per image.
        rounds: rounds of timing that were run.
        cls_between: cosine between the CLS tokens of different images, after block 9, mean; None for one image.
    """

    tokens: int
    gmacs: float
    ms: float
    ms_range: tuple[float, float]
    head_ms: float
    rounds: int
    cls_between: float | None

    @property
    def disturbed(self) -> bool:
        """Whether the unmodified model's own time varied so much that something else was using the processor."""
        return self.ms_range[1] > 1.35 * self.ms_range[0]


@dataclass(frozen=True)
class Row:
    """One method at one r, against the unmodified model.

    Attributes:
        tokens: left after the last block, CLS included.
        gmacs: 10⁹ multiply-accumulates of the encoder per image.
        ms: median milliseconds of the encoder per image.
        speedup: median over the rounds of (time of the unmodified model just before / time); `speedup_range` the
            quartiles.
        cls: cosine to the full model's CLS after block 9, mean over the images; `cls_worst` the smallest.
        cls_last: the same of the encoder's final CLS.
        iou: overlap of the salient region with the full model's, intersection over union, mean; `iou_median`
            and `iou_worst`, the smallest, beside it; `iou_each` per image.
    """

    method: str
    r: int
    tokens: int
    gmacs: float
    ms: float
    speedup: float
    speedup_range: tuple[float, float]
    cls: float
    cls_worst: float
    cls_last: float
    iou: float
    iou_median: float
    iou_worst: float
    iou_each: tuple[float, ...]


@dataclass(frozen=True)
class Example:
    """Drawings on one photograph: the groups after some blocks, by the default settings, and heat maps by method."""

    photo: Photo
    groups: Mapping[int, tuple[int, Image]]
    heat: Mapping[str, Image]
    iou: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    machine: Machine
    settings: Settings
    seconds: float
    photos: tuple[Photo, ...]
    baseline: Baseline
    rows: tuple[Row, ...]
    examples: tuple[Example, ...]


def describe_machine() -> Machine:
    """Where and with what this runs; `threads` are PyTorch's."""
    return Machine(
        cpu=_cpu_model(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=metadata.version("transformers"),
        turbovlm=turbovlm.__version__,
        date=datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} logical cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"
