"""`keep` of denoisers: a share of the tokens, one for each resolution, or either of them over a pipeline's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turbovlm.checks import brief, check_number, check_share, is_list
from turbovlm.errors import ConfigError

Share = float | tuple[float, ...]
"""What is kept: of every resolution, or of the largest, of half as many rows, of a quarter, …"""
ShareFunction = Callable[[float], Any]
"""Progress → what is kept there."""
Shares = float | Sequence[float]
Keep = Shares | Mapping[float, Shares] | Sequence[tuple[float, Shares]] | ShareFunction
"""As it is written; a mapping is kept as a tuple of pairs."""

LEAST_KEPT = 0.25
"""Share of its tokens that a denoiser's block reads at least: one token in every 2×2 cell is a destination."""


def check_keep(value: Any) -> Any:
    """`keep` in its one form: a `Share`, a tuple of pairs of a progress and a `Share`, or a function.

    A mapping with a single share is that share.

    Raises:
        ConfigError: naming what is wrong, and what is allowed.
    """
    if callable(value):
        return value
    if isinstance(value, Mapping):
        return _check_steps(value, tuple(value.items()))
    if is_list(value) and any(is_list(each) for each in value):
        if any(not is_list(each) or len(each) != 2 for each in value):
            raise ConfigError(f"keep={brief(value)}: over the steps it takes pairs of a progress and a share")
        return _check_steps(value, tuple(value))
    return _check_shares(value)


def is_over_steps(keep: Any) -> bool:
    """Whether a checked `keep` depends on the progress."""
    return callable(keep) or (isinstance(keep, tuple) and isinstance(keep[0], tuple))


def keep_at(keep: Any, progress: float) -> Share:
    """What a checked `keep` is at a progress in [0, 1).

    Raises:
        ConfigError: a function has returned something else.
    """
    share: Share
    if callable(keep):
        found = keep(progress)
        try:
            share = _check_shares(found)
        except ConfigError as error:
            raise ConfigError(f"keep: {name_of(keep)}({progress:g}) has returned {brief(found)}: {error}") from error
    elif is_over_steps(keep):
        share = next(each for start, each in reversed(keep) if start <= progress)
    else:
        share = keep
    return share


def written(keep: Any) -> str:
    """A checked `keep` as it is written in Python: `"0.5"`, `"{0: 0.5, 0.6: 1}"`."""
    if callable(keep):
        return name_of(keep)
    if is_over_steps(keep):
        return "{" + ", ".join(f"{start:g}: {written(share)}" for start, share in keep) + "}"
    return str(list(keep)) if isinstance(keep, tuple) else str(keep)


def in_words(keep: Any) -> str:
    """A checked `keep` for people: `"50% of the tokens"`, and what it is later."""
    if callable(keep):
        return f"{name_of(keep)}(progress) of the tokens"
    if not is_over_steps(keep):
        return f"{_percent(keep)} of the tokens"
    (_, first), *rest = keep
    later = ", ".join(f"{_percent(share)} from {start:.4g} of the steps on" for start, share in rest)
    return f"{_percent(first)} of the tokens, {later},"


def name_of(function: ShareFunction) -> str:
    """A function's name, or its class's."""
    return str(getattr(function, "__name__", type(function).__name__))


def _percent(share: Share) -> str:
    return ", ".join(f"{each:.0%}" for each in (share if isinstance(share, tuple) else (share,)))


def _check_shares(value: Any) -> Share:
    if not is_list(value):
        return check_share("keep", value, LEAST_KEPT)
    if not value:
        raise ConfigError("keep=[]: a list of keep needs a share per resolution")
    return tuple(check_share("keep", share, LEAST_KEPT) for share in value)


def _check_steps(value: Any, pairs: tuple[Any, ...]) -> Any:
    """Pairs of a progress and what is kept from there on, checked.

    Raises:
        ConfigError: naming `value`, as it was given.
    """
    shown = f"keep={brief(value)}"
    starts = [check_number("keep: progress", start) for start, _ in pairs]
    if not starts or starts[0] != 0:
        raise ConfigError(f"{shown}: the first progress must be 0, from where on a share is kept, as in {EXAMPLE}")
    if any(start >= 1 for start in starts) or starts != sorted(set(starts)):
        raise ConfigError(f"{shown}: progress must ascend, in [0, 1): the share of the steps that is behind")
    shares = [_check_shares(share) for _, share in pairs]
    return shares[0] if len(shares) == 1 else tuple(zip(starts, shares))


EXAMPLE = "keep={0: 0.5, 0.6: 1.0}"
