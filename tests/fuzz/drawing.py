"""How many examples a test draws: a few, always the same, in `make test`; many, from a seed, in `make fuzz`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings

COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,  # nothing is written; what failed is printed with what reproduces it
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
settings.register_profile("core", derandomize=True, **COMMON)
settings.register_profile("nightly", derandomize=False, **COMMON)

PROFILE = ["core"]
"""The profile in use, which conftest.py sets before the tests are imported."""

EXAMPLES: Counter[str] = Counter()
"""Examples that ran to their end so far in this process, by the name of their test."""


def profile(core: int, nightly: int, **others: Any) -> settings:
    """The settings of a test that draws so many examples in either profile."""
    name = PROFILE[0]
    return settings(settings.get_profile(name), max_examples=nightly if name == "nightly" else core, **others)


def fuzz(core: int, nightly: int, **drawn: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`given` with so many examples in either profile, which are counted."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            test(*args, **kwargs)
            EXAMPLES[test.__name__] += 1

        fuzzed: Callable[..., None] = profile(core, nightly)(given(**drawn)(counted))
        return fuzzed

    return decorate
