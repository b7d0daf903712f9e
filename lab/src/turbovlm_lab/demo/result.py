"""What `turbovlm demo` runs, and what it finds."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import turbovlm
from turbovlm.errors import ConfigError
from turbovlm_lab.demo.photos import Photo

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_ROUNDS = 2
"""Rounds of timing that are run however slow the machine is."""

_TOME = {"similarity": "keys", "partition": "alternate", "order": "partition", "reduce": "merge", "restore": "copy"}


@dataclass(frozen=True)
class Method:
    """A way to encode for less: `settings` are those of `TurboConfig`; `merges` is False for a smaller image."""

    key: str
    label: str
    explanation: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    merges: bool = True


UNMERGED = Method("unmerged", "unmerged", "the model itself, on PyTorch's fused attention", merges=False)
TURBO = Method("turbo", "turbovlm", "the library's defaults")
TOME = Method(
    "tome",
    "ToMe",
    "the most redundant tokens, by the cosine of their keys, equally many in every block (Token Merging, 2023)",
    {"degree": "redundancy", **_TOME},
)
RANDOM = Method(
    "random",
    "random",
    "as many as ToMe, drawn at random, each still merged into the partner of most similar key: the control",
    {"degree": "random", **_TOME},
)
SMALLER = Method("smaller", "smaller image", "nothing merged: fewer pixels, positions interpolated", merges=False)
METHODS = (TURBO, TOME, RANDOM, SMALLER)
"""Beside the unmerged model; the others cost as much as `TURBO` does."""


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Args:
        shares: of the encoder's multiply-accumulates that `flops=` asks for.
        batch: images per batch.
        rounds: how often everything is timed; more often where there are more batches of images than that.
        timing_seconds: no further round begins after this time, on a slow or busy machine, but `MIN_ROUNDS` are run,
            and every image is seen once.
        shown: photographs whose labels and drawings are shown, by `TURBO` at the first of the shares.
    """

    shares: tuple[float, ...] = (0.6, 0.5)
    batch: int = 7
    rounds: int = 6
    timing_seconds: float = 45
    shown: int = 7

    def __post_init__(self) -> None:
        for name in ("batch", "rounds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: must be an integer ≥ 1")


QUICK = Settings(shares=(0.6,), batch=2, rounds=2, shown=2)
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
class Cost:
    """What one method costs at one share, against the unmerged model.

    Attributes:
        method: its key; `share`: what was asked for, None of the unmerged model.
        setting: how it comes to that cost, such as `"r=13"` or `"176 px"`.
        tokens: left after the last block, prefix tokens included.
        macs: multiply-accumulates, as a share of the unmerged model's, counted; `gmacs`: 10⁹ of them per image.
        ms: median milliseconds of CPU time per image, of all threads.
        speedup: median over the rounds of the unmerged model's time over its own; `speedup_range`: the quartiles.
    """

    method: str
    share: float | None
    setting: str
    tokens: int
    macs: float
    gmacs: float
    ms: float
    speedup: float
    speedup_range: tuple[float, float]


@dataclass(frozen=True)
class Row:
    """Images of one method at one share, against the unmerged model's.

    Attributes:
        same: images whose likeliest label is the same.
        cosine: of the embeddings, mean over the images; `cosine_worst`: the smallest.
        drift: 1 − cosine of the embeddings with the mean of the unmerged ones taken off, mean; None for one image.
    """

    cost: Cost
    same: int
    cosine: float
    cosine_worst: float
    drift: float | None


@dataclass(frozen=True)
class Timing:
    """`rounds` that were timed; the unmerged model's milliseconds per image, the 10th and the 90th percentile."""

    rounds: int
    ms_range: tuple[float, float]

    @property
    def disturbed(self) -> bool:
        """Whether the unmerged model's own time varied so much that something else was using the processor."""
        return self.ms_range[1] > 1.35 * self.ms_range[0]


@dataclass(frozen=True)
class Found:
    """The likeliest label of one image and its probability, unmerged and merged."""

    photo: Photo
    label: str
    probability: float
    merged_label: str
    merged_probability: float


@dataclass(frozen=True)
class Example:
    """One photograph: the likeliest labels with their probabilities, unmerged and merged; groups after some blocks.

    Attributes:
        labels: `(label, unmerged, merged)`, the unmerged model's likeliest first.
        groups: by block, the tokens left and the drawing of which patches have become one.
    """

    photo: Photo
    labels: tuple[tuple[str, float, float], ...]
    groups: Mapping[int, tuple[int, Image]]


@dataclass(frozen=True)
class Texts:
    """The labels that images are given, and where their embeddings come from."""

    labels: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class SaliencyRow:
    """The salient region of one method at one share, against the unmerged model's.

    Attributes:
        iou: intersection over union, mean over the images; `iou_median` and `iou_worst`, the smallest.
    """

    cost: Cost
    iou: float
    iou_median: float
    iou_worst: float


@dataclass(frozen=True)
class SaliencyExample:
    """Heat maps of one photograph, by method, with the overlap of their salient region with the unmerged model's."""

    photo: Photo
    heat: Mapping[str, Image]
    iou: Mapping[str, float]


@dataclass(frozen=True)
class Saliency:
    """The second part: a ViT-S/14 whose head reads every position."""

    timing: Timing
    rows: tuple[SaliencyRow, ...]
    examples: tuple[SaliencyExample, ...]


@dataclass(frozen=True)
class Result:
    """Everything that was found; `rows` begin with the unmerged model's."""

    machine: Machine
    settings: Settings
    texts: Texts
    timing: Timing
    rows: tuple[Row, ...]
    found: tuple[Found, ...]
    examples: tuple[Example, ...]
    seconds: float
    saliency: Saliency | None = None

    @property
    def photos(self) -> Sequence[Photo]:
        """The images, in the order given."""
        return [found.photo for found in self.found]


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
