"""What is chosen on the page, as settings of `turbovlm` and as a link."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from turbovlm.config import PARTITIONS, SIMILARITIES, Config
from turbovlm.errors import ConfigError
from turbovlm.ops.degree import DEGREES
from turbovlm.read_config import VISUAL_SELECTIONS
from turbovlm.workflows import configs_from
from turbovlm_lab.studio.subjects import Loaded, Subject

DEFAULT = ""
"""Of a choice: what the library does unasked."""
SCHEDULES = {
    DEFAULT: "automatic",
    "constant": "constant: the same r in every block",
    "decreasing": "decreasing: from 2r to 0",
    "list": "a number for each block",
}
AMOUNTS = {
    "flops": "flops · share of the multiply-accumulates left",
    "keep": "keep · share of the tokens left",
    "r": "r · tokens merged per block",
    "visual_keep": "visual_keep · share of the image's tokens that are read",
}


@dataclass(frozen=True)
class Range:
    """Of a slider."""

    low: float
    high: float
    step: float

    def inside(self, value: float) -> float:
        """The nearest value that the slider has room for."""
        return min(max(value, self.low), self.high)


RANGES = {
    "flops": Range(0.3, 1.0, 0.01),
    "keep": Range(0.05, 1.0, 0.01),
    "r": Range(0, 32, 1),
    "visual_keep": Range(0.05, 1.0, 0.01),
}
OPTIONS: Mapping[str, Sequence[str]] = {
    "degree": tuple(DEGREES),
    "similarity": SIMILARITIES,
    "partition": PARTITIONS,
    "visual_select": VISUAL_SELECTIONS,
}
"""Settings that are one of several words, beside `DEFAULT`."""


@dataclass(frozen=True)
class Choice:
    """What the page's controls say; strings are as typed, and `DEFAULT` where nothing is chosen.

    Attributes:
        amount, value: how much is merged.
        schedule: one of `SCHEDULES`; `listed`: numbers of tokens separated by commas, for `"list"`.
        steps: of a denoiser's.
    """

    amount: str
    value: float
    alpha: float | None = None
    degree: str = DEFAULT
    similarity: str = DEFAULT
    partition: str = DEFAULT
    visual_select: str = DEFAULT
    schedule: str = DEFAULT
    listed: str = ""
    steps: int | None = None

    @classmethod
    def default(cls, subject: Subject) -> Choice:
        """What stands on the page at first."""
        amount, value = next(iter(subject.amounts.items()))
        return cls(amount, value, steps=subject.steps)

    @classmethod
    def of_link(cls, subject: Subject, query: Mapping[str, str]) -> tuple[Choice, str | None]:
        """What a link says, with defaults for what it leaves out; and what is wrong with it, in one line."""
        choice, wrong = cls.default(subject), []
        amount = query.get("amount", choice.amount)
        if amount in subject.amounts:
            choice = replace(choice, amount=amount, value=subject.amounts[amount])
        else:
            wrong.append(f"amount={amount}: must be one of {', '.join(subject.amounts)}")
        for field in fields(cls):
            text = query.get(field.name)
            if text is None or field.name == "amount" or not _is_on(field.name, subject):
                continue
            try:
                choice = replace(choice, **{field.name: _parsed(field.name, text)})
            except ValueError:
                wrong.append(f"{field.name}={text[:40]}: {_allowed(field.name)}")
        span = RANGES[choice.amount]
        if choice.value != span.inside(choice.value):
            wrong.append(f"value={choice.value:g}: {choice.amount} goes from {span.low:g} to {span.high:g} here")
            choice = replace(choice, value=span.inside(choice.value))
        return choice, f"This link has {'; '.join(wrong)}." if wrong else None

    def to_link(self, subject: Subject) -> dict[str, str]:
        """What a link must say: the amount, and what is not at its default."""
        default = Choice.default(subject)
        said = {"amount": self.amount, "value": f"{self.value:g}"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in said or not _is_on(field.name, subject) or value == getattr(default, field.name):
                continue
            said[field.name] = f"{value:g}" if isinstance(value, int | float) else value
        return said

    def settings(self, subject: Subject, loaded: Loaded) -> dict[str, Any]:
        """Keywords of `apply`.

        Raises:
            ConfigError: a list that is none, or a schedule beside an amount that has its own.
        """
        found: dict[str, Any] = {self.amount: self._amount(loaded.depth)}
        if self.schedule == "constant" and self.amount != "r":
            found["blocks"] = "every"
        for name in ("alpha", *OPTIONS):
            value = getattr(self, name)
            if name in subject.settings and value not in (None, DEFAULT):
                found[name] = value
        return {**found, **loaded.fixed}

    def configs(self, subject: Subject, loaded: Loaded) -> tuple[Config, ...]:
        """The same as config objects.

        Raises:
            ConfigError: as `settings`, and as the configs raise it.
        """
        return configs_from((), self.settings(subject, loaded), subject.denoises, type(loaded.model).__name__)

    def _amount(self, depth: int) -> Any:
        value = int(self.value) if self.amount == "r" and float(self.value).is_integer() else self.value
        if self.schedule in (DEFAULT, "constant") and self.amount != "r":
            return value
        if self.schedule == DEFAULT:
            return value
        if self.amount != "r":
            raise ConfigError(
                f"schedule={self.schedule}: goes with r; {self.amount} spreads over the blocks what it has to merge"
            )
        if self.schedule == "constant":
            return [value] * depth
        if self.schedule == "decreasing":
            return decreasing(value, depth)
        return listed(self.listed)


def number(name: str, value: object) -> float:
    """A finite number that the page gave.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"{name}={str(value)[:40]}: must be a number")
    return found


def decreasing(r: float, depth: int) -> list[int]:
    """r tokens per block on average, from 2r in the first block to none in the last."""
    if depth == 1:
        return [round(r)]
    return [round(2 * r * (depth - 1 - block) / (depth - 1)) for block in range(depth)]


def listed(text: str) -> list[int]:
    """Whole numbers, separated by commas or spaces.

    Raises:
        ConfigError: something else.
    """
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(
            f"schedule: {text[:60]!r} must be whole numbers, one for each block, as in 0, 0, 16, 16, 8, 8"
        )
    return [int(part[:9]) for part in parts]


def written(settings: Mapping[str, Any]) -> str:
    """Keywords as Python has them: `flops=0.6, degree='random'`."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _is_on(name: str, subject: Subject) -> bool:
    """Whether the page has this control for the subject."""
    if name == "listed":
        return "schedule" in subject.settings
    if name == "steps":
        return subject.steps is not None
    return name in ("amount", "value") or name in subject.settings


def _parsed(name: str, text: str) -> Any:
    if name == "steps":
        steps = int(text)
        if not STEPS[0] <= steps <= STEPS[1]:
            raise ValueError(text)
        return steps
    if name in ("value", "alpha"):
        number = float(text)
        if not abs(number) < 1e6:
            raise ValueError(text)
        return number
    if name == "listed":
        return text[:400]
    allowed = SCHEDULES if name == "schedule" else OPTIONS[name]
    if text not in allowed:
        raise ValueError(text)
    return text


STEPS = (4, 50)
"""The fewest and the most denoising steps."""


def _allowed(name: str) -> str:
    if name == "steps":
        return f"must be a whole number from {STEPS[0]} to {STEPS[1]}"
    if name in ("value", "alpha"):
        return "must be a number"
    allowed = [word for word in SCHEDULES if word] if name == "schedule" else OPTIONS[name]
    return f"must be one of {', '.join(allowed)}"
