"""Values that belong to a thread: what a model did last in it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Value = TypeVar("Value")


class PerThread(Generic[Value]):
    """One value for each thread, for what the last forward left: threads that share a model never see each other's.

    A thread that has set none sees the one that any thread set last, so that a model may run in a worker and be asked
    about from outside. Neither copied nor pickled: a copy starts empty.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._latest: Value | None = None

    def get(self) -> Value | None:
        """This thread's value, or the latest of any; None before the first."""
        value: Value | None = getattr(self._own, "value", self._latest)
        return value

    def own(self) -> Value | None:
        """This thread's value alone."""
        value: Value | None = getattr(self._own, "value", None)
        return value

    def set(self, value: Value | None) -> None:
        """Make `value` this thread's, and the latest."""
        self._own.value = value
        self._latest = value

    def __deepcopy__(self, memo: dict[int, object]) -> PerThread[Value]:
        return PerThread()

    def __reduce__(self) -> tuple[type[PerThread[Value]], tuple[()]]:
        return PerThread, ()


@dataclass(eq=False)
class Remembering(Generic[Value]):
    """A feature that remembers what it did last, for each thread."""

    _last: PerThread[Value] = field(default_factory=PerThread, repr=False, kw_only=True)

    @property
    def last(self) -> Value | None:
        """What the last forward of this thread left, or of any where this one had none; None before the first."""
        return self._last.get()

    @last.setter
    def last(self, value: Value | None) -> None:
        self._last.set(value)

    @property
    def last_here(self) -> Value | None:
        """What the last forward of this thread alone left."""
        return self._last.own()
