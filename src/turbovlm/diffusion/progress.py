"""How far the steps of a pipeline are, for a `keep` that depends on it.

The scheduler is asked outside of what may be compiled: when it has set its steps, when it is told where to begin, when
it scales what the denoiser is given, and when it has taken a step. In between, what is kept stands still.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from turbovlm.errors import StateError
from turbovlm.shares import Share, keep_at, written


class Progress:
    """The place of the next step among a scheduler's steps, and what is kept there.

    A loop is of one thread, and no other knows of it.

    Attributes:
        keep: as checked, a function or pairs.
    """

    def __init__(self, keep: Any) -> None:
        self.keep = keep
        self._place: int | None = None
        self._unknown: float | None = None  # timestep of a forward of which the scheduler does not say where it stands
        self._now = _Now()

    def begin(self) -> None:
        """Forget the loop before: a scheduler begins its steps."""
        self._place = self._unknown = None
        self._now.kept = ""

    def reach(self, scheduler: Any, place: int) -> bool:
        """Know which entry of the scheduler's `timesteps` is next; whether another share is kept from now on.

        Solvers that evaluate twice in a step have two entries for each: both keep the same.

        Raises:
            ConfigError: a function has returned no share.
        """
        self._unknown = None
        if place == self._place:
            return False
        order = max(1, getattr(scheduler, "order", 1))
        entries = len(scheduler.timesteps)
        before, self._now.kept = self._now.kept, ""
        self._place = place
        if place < entries:  # else the loop has ended
            share = keep_at(self.keep, (place // order) / -(-entries // order))
            self._now.kept = " ".join(map(repr, share if isinstance(share, tuple) else (share,)))
        return before != self._now.kept

    def place_behind(self, scheduler: Any, timestep: Any) -> int:
        """The place behind the step that a scheduler has just taken."""
        if getattr(scheduler, "step_index", None) is not None:
            return int(scheduler.step_index)
        place = place_of(scheduler, timestep)
        return (self._place or 0 if place is None else place) + 1

    def look(self, scheduler: Any, timestep: Any) -> int | None:
        """Where a forward stands, of which nobody has told the scheduler: by its timestep; None where nothing says.

        Raises:
            StateError: forwards of several timesteps that the scheduler does not know, without a step in between.
        """
        if not self._now.kept:
            return None
        place = place_of(scheduler, timestep)
        if place is None:
            value = _number(timestep)
            if self._unknown not in (None, value):
                raise StateError(f"keep={written(self.keep)}: nobody takes the scheduler's steps, {REMEDY}")
            self._unknown = value
        return place

    def share(self) -> Share:
        """What is kept in the next step.

        Raises:
            StateError: no loop is under way in this thread.
        """
        if not self._now.kept:
            raise StateError(f"keep={written(self.keep)}: no loop of the pipeline's scheduler is under way, {REMEDY}")
        kept = tuple(float(share) for share in self._now.kept.split())
        return kept[0] if len(kept) == 1 else kept


REMEDY = (
    "which says how far its steps are: run the pipeline, or call set_timesteps before the loop and step in it, in the "
    "loop's thread; or give one share for all steps"
)


class _Now(threading.local):
    """What is kept in the next step, of a thread.

    As text, which a compiled program takes for a constant: it becomes a graph for each value. A float that changes
    would become an unknown of one graph.
    """

    def __init__(self) -> None:  # called in every thread
        self.kept = ""


def place_of(scheduler: Any, timestep: Any = None) -> int | None:
    """Which entry of a scheduler's `timesteps` its next step is: by its own count, or by the timestep."""
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if index is not None:
            return int(index)
    if timestep is None:
        return None
    found = (scheduler.timesteps == _number(timestep)).nonzero()
    return int(found[0]) if len(found) else None


def _number(timestep: Any) -> float:
    """A timestep; of those of several tokens, of which some are not denoised, the largest."""
    return float(torch.as_tensor(timestep).max())
