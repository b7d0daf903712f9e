"""Which cases of a test belong to the core tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(core: Collection[str], names: Iterable[str]) -> list[Any]:
    """The names as a test's parameters, of which those that are not in `core` are slow."""
    return [pytest.param(name, marks=() if name in core else pytest.mark.slow) for name in names]
