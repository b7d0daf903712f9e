"""What a search needs of a kind of model: a `Subject` says what can be varied, what it costs and how far it drifts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from turbovlm.calibration.drift import Part, Reference
from turbovlm.errors import ConfigError

NEAR = 0.01
"""Largest distance of a share of multiply-accumulates from the one asked for: whole tokens nearly always can."""
SOLVING = 4
"""Costs that `solve_amount` counts between the ends at most; each is a forward, and two or three come near."""

Progress = Callable[[int], object]
"""Called with how many more samples went through the model."""
Spread = tuple[float, ...]
"""How a loss of tokens is spread: relative weights of an encoder's blocks or a denoiser's resolutions."""


@dataclass(frozen=True)
class Trial:
    """One change to try: settings, and a spread where it is another than that of the best so far."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    spread: Spread | None = None


@dataclass(frozen=True)
class Found:
    """Settings that were measured.

    Attributes:
        config: the settings, with how much is merged.
        spread: how that is spread; `amount`: what was asked for, in the subject's unit.
        drift: of each sample that was searched on, `[samples]`.
    """

    config: Any
    spread: Spread
    amount: float
    drift: Tensor

    @property
    def mean(self) -> float:
        """The mean drift."""
        return self.drift.mean().item()


@dataclass(eq=False)
class Subject(ABC):
    """A model, and samples of what it will see. Every call leaves the model as it is.

    Attributes:
        model, samples: as `turbovlm.calibrate` takes them; `count` samples.
        base: the settings that every search begins with; `fixed`: names of those that stay.
        seed: of whatever is drawn.
        progress: told of every sample that goes through the model.
        about: the models and samples of this kind, for messages.
        noun, unit: what a sample is called, and what an amount is a share of.
        config, whole: the class of its settings, and the value of that class's first field that merges nothing.
        found: fields that cannot be given: they are what is found, or say it in another way.
        options: arguments of `turbovlm.calibrate` that are for this kind.
        amounts: those walked through for `max_drift`, descending; settings are compared at `start`, and the last step
            is divided into `finer` parts.
        curve: amounts whose drift is measured at the end.
        flat: the spread of equal weights, by which most can be lost.
    """

    model: Any
    samples: Any
    base: Any
    fixed: frozenset[str]
    seed: int
    progress: Progress
    count: int = field(init=False)
    amounts: tuple[float, ...] = field(init=False)
    start: float = field(init=False)
    flat: Spread = field(init=False)

    about: ClassVar[str]
    noun: ClassVar[str] = "prompts"
    unit: ClassVar[str] = "of the multiply-accumulates left"
    config: ClassVar[Any]
    whole: ClassVar[float]
    found: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]]
    curve: ClassVar[tuple[float, ...]]
    finer: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.count = self.count_samples(self.samples)
        self._reference = Reference(self.outputs(None, range(self.count)))

    def drift(self, config: Any, samples: Sequence[int]) -> Tensor:
        """How far these samples move under the settings, `[len(samples)]`; see `Reference.drift`."""
        return self._reference.drift(self.outputs(config, samples), samples, config.amount)

    def drift_unless_worse(
        self, config: Any, samples: Sequence[int], some: Sequence[int], best: Tensor
    ) -> Tensor | None:
        """How far these samples move, or None where `some` of them, by place, move further than in `best` on average.

        Most changes are worse, and are seen to be on a few samples.
        """
        first = self.drift(config, [samples[i] for i in some])
        if first.mean() > best[some].mean():
            return None
        drift, rest = torch.empty_like(best), sorted({*range(len(samples))} - {*some})
        drift[some] = first
        if rest:
            drift[rest] = self.drift(config, [samples[i] for i in rest])
        return drift

    @staticmethod
    @abstractmethod
    def count_samples(samples: Any) -> int:
        """The number of samples.

        Raises:
            ConfigError: they are not of this kind.
        """

    @abstractmethod
    def outputs(self, config: Any, samples: Sequence[int]) -> Sequence[Part]:
        """What is compared, per part `[len(samples), tokens, width]`; unmerged if `config` is None."""

    @abstractmethod
    def cost(self, config: Any) -> float:
        """Share of the multiply-accumulates left."""

    @abstractmethod
    def speedups(self, configs: Sequence[Any], rounds: int) -> list[float]:
        """Times faster than the model itself, the median of that many rounds on its device, all settings in turn."""

    @property
    @abstractmethod
    def timed_on(self) -> str:
        """What `speedups` runs, on which device: `"a batch of 16 images on NVIDIA H200, bfloat16"`."""

    @abstractmethod
    def trials(self, amount: float) -> list[Trial]:
        """What to try at an amount, in order; each is taken if it is clearly better than the best before it."""

    @abstractmethod
    def configured(self, config: Any, spread: Spread, amount: float) -> Any:
        """The settings with that amount, spread so; None where no whole number of tokens comes near it."""

    @abstractmethod
    def least(self, config: Any, spread: Spread) -> float:
        """The smallest amount that can be configured."""

    def amount_at(self, flops: float) -> float:
        """The amount that leaves that share of the multiply-accumulates: the share itself, where amounts are such.

        Raises:
            ConfigError: the share is out of reach.
        """
        least = self.least(self.base, self.flat)
        if flops < least - NEAR:
            raise ConfigError(f"flops={flops} is out of reach: {least:.3f} is the least that can be left")
        return flops

    def refined(self, found: Found, samples: Sequence[int], parts: int = 1, *, as_fast: bool = False) -> Found:
        """Something at least as good at the same amount, by one of so many equal parts of the effort.

        Args:
            as_fast: merge nowhere where `found` does not, as every merge takes time beside the multiply-accumulates.
        """
        return found

    def finished(self, config: Any) -> Any:
        """The settings as they are handed out."""
        return config


def solve_amount(cost: Callable[[float], float], flops: float, low: float, high: float) -> float:
    """The amount in [low, high] whose cost comes nearest to `flops`; a cost is about linear in it, and grows."""
    ends = [(cost(amount), amount) for amount in (low, high)]
    for _ in range(SOLVING):
        (least, below), (most, above) = ends
        if not least < flops < most:
            break
        amount = below + (above - below) * (flops - least) / (most - least)
        point = (cost(amount), amount)
        ends = [ends[0], point] if point[0] > flops else [point, ends[1]]
        if abs(point[0] - flops) < NEAR / 4:
            break
    return min(ends, key=lambda end: abs(end[0] - flops))[1]
