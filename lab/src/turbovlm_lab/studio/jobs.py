"""Work of minutes in a thread of its own: how far it is, how long it will still take, and a way to stop it."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from turbovlm.errors import TurboError

T = TypeVar("T")
_RUNNING: weakref.WeakSet[Job[Any]] = weakref.WeakSet()
FEW = 0.02
"""Share of a stage after which the time that is left can be told from the time that was taken."""


class Stopped(TurboError):
    """The work was stopped before its end."""


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        stage: what it does, in words.
        done, total: steps of this stage; `total` is 0 where they are not counted, and a guess where `done` passes it.
        seconds: since the job began; `left`: until the stage ends, None where it is not known.
    """

    stage: str
    done: int
    total: int
    seconds: float
    left: float | None


class Report:
    """What work tells of itself as it goes.

    Every call raises `Stopped` once somebody has asked for it, so work that calls often stops soon.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._lock = threading.Lock()
        self._started = self._stage_started = time.perf_counter()
        self._stage, self._done, self._total = "starting", 0, 0

    def begin(self, stage: str, total: int = 0) -> None:
        """A stage begins, of that many steps.

        Raises:
            Stopped: somebody has asked for it.
        """
        self.check()
        with self._lock:
            self._stage, self._done, self._total, self._stage_started = stage, 0, total, time.perf_counter()

    def advance(self, steps: int = 1) -> None:
        """Steps were done.

        Raises:
            Stopped: somebody has asked for it.
        """
        self.check()
        with self._lock:
            self._done += steps

    def check(self) -> None:
        """Go on, unless somebody has asked to stop.

        Raises:
            Stopped: somebody has.
        """
        if self._asked.is_set():
            raise Stopped("stopped")

    def stop(self) -> None:
        """Ask for the work to end at its next call."""
        self._asked.set()

    @property
    def progress(self) -> Progress:
        """How far it is now."""
        now = time.perf_counter()
        with self._lock:
            done, total, taken = self._done, self._total, now - self._stage_started
            stage = self._stage
        known = FEW * total <= done < total and done > 0
        return Progress(stage, done, total, now - self._started, taken * (total - done) / done if known else None)


class Job(Generic[T]):
    """Work that runs in a thread of its own from the moment that it is made.

    Args:
        work: is given a `Report` to tell of itself.
        turn: held while it works; until it is free, the job waits, and can be stopped.
    """

    def __init__(self, work: Callable[[Report], T], turn: threading.RLock | None = None) -> None:
        self.report = Report()
        self._work, self._turn = work, turn
        self._made: list[T] = []
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="turbovlm-studio-job", daemon=True)
        _RUNNING.add(self)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after that time at the latest."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Ask it to end; it does at the next step."""
        self.report.stop()

    def result(self) -> T:
        """What came of it.

        Raises:
            Stopped: it was stopped.
            Exception: what it has raised.
        """
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        return self._made[0]

    def _run(self) -> None:
        try:
            if self._turn is None:
                self._made.append(self._work(self.report))
                return
            self.report.begin("waiting for another run to end")
            while not self._turn.acquire(timeout=0.2):
                self.report.check()
            try:
                self._made.append(self._work(self.report))
            finally:
                self._turn.release()
        except BaseException as error:  # raised again where the result is asked for
            self._failed = error


def stop_all(seconds: float) -> None:
    """Ask every job to end, and wait for them, that long at the most: a process should not end in the middle of one."""
    jobs = list(_RUNNING)
    for job in jobs:
        job.stop()
    until = time.monotonic() + seconds
    for job in jobs:
        job.wait(max(until - time.monotonic(), 0))


def in_words(seconds: float) -> str:
    """A duration for a reader: `"8 s"`, `"2 min 30 s"`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole if whole < 600 else 60 * round(whole / 60), 60)
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"
