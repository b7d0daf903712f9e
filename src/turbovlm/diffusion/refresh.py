"""Choices that hold for several denoising steps: the pipeline's scheduler says when a step ends.

Forwards outside of a pipeline's loop, whose steps nobody counts, choose for themselves.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from turbovlm.diffusion.run import Choice
from turbovlm.errors import TurboError
from turbovlm.patching import Patch, install, patches_of, take_off

if TYPE_CHECKING:
    from turbovlm.diffusion.feature import DenoiseFeature


class Steps:
    """The steps of one pipeline, and the choices that several of them share.

    It holds the pipeline and its scheduler weakly. A copy knows the copied scheduler, and starts before a loop.

    Attributes:
        every: steps that share choices.
        choices: those in force, as `Run.choices`.
        counting: whether a loop is under way.
    """

    def __init__(self, every: int, pipe: Any = None, scheduler: Any = None) -> None:
        self.every = every
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._scheduler = None if scheduler is None else weakref.ref(scheduler)
        self.choices: dict[str, Choice] = {}
        self.counting = self._in_loop = False
        self._ended = 0
        self._choose_anew = True

    def __getstate__(self) -> dict[str, Any]:
        return {"every": self.every, "scheduler": self.scheduler}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Steps.__init__(self, state["every"], None, state["scheduler"])

    @property
    def scheduler(self) -> Any:
        """The scheduler whose steps are counted; None where it is not known, or gone."""
        return None if self._scheduler is None else self._scheduler()

    def count_with(self, scheduler: Any) -> None:
        """Let that scheduler say when a step ends, once it is patched.

        Raises:
            TurboError: something else has put methods of its own into it.
        """
        for name in _COUNTED:
            if name in scheduler.__dict__:
                raise TurboError(
                    f"refresh={self.every}: the {name} of this {type(scheduler).__name__} is replaced already, by "
                    "another accelerated pipeline that shares the scheduler or by another library; give this pipeline "
                    "a scheduler of its own"
                )
        self._scheduler = weakref.ref(scheduler)

    def patches(self, feature: DenoiseFeature) -> list[Patch]:
        """Those of the scheduler."""
        return [Patch(self.scheduler, name, function, feature) for name, function in _COUNTED.items()]

    def follow_pipeline(self, feature: DenoiseFeature) -> None:
        """Count with the scheduler that the pipeline has now, be it another than before."""
        pipe, before = None if self._pipe is None else self._pipe(), self.scheduler
        if pipe is None or pipe.scheduler is before:
            return
        if before is not None:
            take_off([patch for patch in patches_of(before) if patch.feature is feature])
        self.count_with(pipe.scheduler)
        install(self.patches(feature))
        self.begin_loop()  # its set_timesteps was called before it was known

    def begin_loop(self) -> None:
        """Forget all choices: a pipeline begins its steps."""
        self.counting, self._choose_anew, self._ended = True, True, 0

    def begin_forward(self) -> dict[str, Choice]:
        """The choices that a forward of the denoiser begins with, and adds to."""
        if self._choose_anew or not self.counting:
            self.choices = {}
        self._choose_anew = False
        # A forward that fails never ends, and no later one shares its choices.
        self._in_loop, self.counting = self.counting, False
        return self.choices

    def end_forward(self) -> None:
        """Go on counting, where that was so before the forward."""
        self.counting = self._in_loop

    def end_step(self, last: bool) -> None:
        """Count a step of the scheduler; its last one ends the loop."""
        self._ended += 1
        self._choose_anew = self._ended % self.every == 0
        self.counting = self.counting and not last


def set_timesteps(patch: Patch, scheduler: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Let the scheduler begin its steps."""
    patch.feature.steps.begin_loop()  # type: ignore[attr-defined]
    return original(*args, **kwargs)


def step(patch: Patch, scheduler: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Let the scheduler take a step."""
    out = original(*args, **kwargs)
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
    patch.feature.steps.end_step(_was_last(scheduler, timestep))  # type: ignore[attr-defined]
    return out


def _was_last(scheduler: Any, timestep: Any) -> bool:
    """Whether the step that was taken is the last: by the scheduler's own count, where it has one."""
    taken = getattr(scheduler, "step_index", None)
    if taken is not None:
        return bool(taken >= len(scheduler.timesteps))
    return float(timestep) == float(scheduler.timesteps[-1])


_COUNTED = {"set_timesteps": set_timesteps, "step": step}
