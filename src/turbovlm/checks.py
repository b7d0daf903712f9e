"""Checks of single settings: each names the field, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from turbovlm.errors import ConfigError

SEED_LIMIT = 2**32
"""Seeds are below it, as those of NumPy."""


LONGEST = 200
"""Characters of a value in a message, at most."""


def brief(value: Any) -> str:
    """A value in a message, on one line and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def called(function: Any) -> str:
    """What a function, or an object that can be called, is called in a message."""
    return str(getattr(function, "__name__", type(function).__name__))


def check_integer(name: str, value: Any, minimum: int = 0, shown: Any = None) -> int:
    """Return `value` as an int if it is an integer of at least `minimum`; `shown` stands in the message instead of it.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        what = "the number of tokens merged per block" if name == "r" else "it"
        raise ConfigError(f"{name}={brief(value if shown is None else shown)}: {what} must be an integer ≥ {minimum}")
    return int(value)


def check_seed(value: Any) -> int:
    """Return a seed as an int: one below 2³², as NumPy's are.

    Raises:
        ConfigError: it is none.
    """
    seed = check_integer("seed", value)
    if seed >= SEED_LIMIT:
        raise ConfigError(f"seed={brief(value)}: must be an integer from 0 to {SEED_LIMIT - 1}")
    return seed


def check_number(name: str, value: Any, minimum: float = -math.inf) -> float:
    """Return `value` as a float if it is a finite number of at least `minimum`.

    Raises:
        ConfigError: it is not.
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{name}={brief(value)}: must be a finite number")
    if number < minimum:
        raise ConfigError(f"{name}={brief(value)}: must be a number ≥ {minimum:g}")
    return number


def check_share(name: str, value: Any, minimum: float = 0.0) -> float:
    """Return `value` as a float if it is a share in (0, 1], and at least `minimum`.

    Raises:
        ConfigError: it is not.
    """
    number = check_number(name, value)
    if not 0 < number <= 1:
        raise ConfigError(f"{name}={brief(number)}: must be a share in (0, 1]")
    if number < minimum:
        raise ConfigError(f"{name}={brief(number)}: must be ≥ {minimum}: one token in every 2×2 cell stays")
    return number


def check_share_or_count(name: str, value: Any) -> float | int:
    """Return `value` if it is a share in (0, 1], a float, or a count, an integer ≥ 1.

    Raises:
        ConfigError: it is neither.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole and (isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1):
        raise ConfigError(f"{name}={brief(value)}: must be a share in (0, 1] or an integer ≥ 1, a count per image")
    return check_integer(name, value, minimum=1) if whole else float(value)


def check_flag(name: str, value: Any) -> None:
    """See that `value` is True or False.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={brief(value)}: must be True or False")


def check_choice(name: str, value: Any, allowed: tuple[str, ...], extra: str = "") -> None:
    """See that `value` is one of the names allowed; `extra` ends the message.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={brief(value)}: must be one of {', '.join(allowed)}{extra}")


def check_grid(value: Any) -> tuple[int, int]:
    """Return two integers ≥ 1, patch rows and columns.

    Raises:
        ConfigError: they are something else.
    """
    if not is_list(value) or len(value) != 2:
        raise ConfigError(f"grid={brief(value)}: must be two integers ≥ 1, patch rows and columns")
    rows, columns = (check_integer("grid", each, minimum=1, shown=value) for each in value)
    return rows, columns


def check_grids(value: Any) -> tuple[int, int] | tuple[tuple[int, int], ...]:
    """Return two integers ≥ 1, patch rows and columns, or as many such pairs as `value` has.

    Raises:
        ConfigError: they are something else.
    """
    if is_list(value) and value and all(is_list(each) for each in value):
        return tuple(check_grid(each) for each in value)
    return check_grid(value)


def is_list(value: Any) -> bool:
    """Whether `value` is a sequence, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
