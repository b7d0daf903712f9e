"""Choices that hold for several forwards: of one latent in one denoising step, and of several steps with `refresh`.

The pipeline's scheduler says when a step ends. Guidance whose halves are forwards of their own denoises one latent in
both, so they merge alike, as the halves of a batch do. Forwards outside of a pipeline's loop, whose steps nobody
counts, choose for themselves, unless they are given parts of one batch that are equal. A loop that is left before its
last step counts as under way until the next one begins.

Where `keep` depends on the progress, the scheduler also says which step is next: `Progress`.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbovlm.diffusion.progress import Progress, place_of
from turbovlm.diffusion.run import Choice
from turbovlm.errors import TurboError
from turbovlm.patching import Patch, install, patches_of, take_off
from turbovlm.shares import Share

if TYPE_CHECKING:
    from turbovlm.config import DenoiseConfig
    from turbovlm.diffusion.feature import DenoiseFeature


MOST = 16
"""Latents that a pipeline denoises one by one in a step, at most: views of a panorama."""


class Steps:
    """The steps of one pipeline, and the choices that several of its forwards share.

    It holds the pipeline and its scheduler weakly. A copy knows the copied scheduler, and starts before a loop. A loop
    is of one thread; forwards in others choose for themselves.

    Attributes:
        config: the settings.
        progress: of the loop that is under way, where `keep` depends on it.
        choices: those in force, as `Run.choices`, of each of the latents of a step, in the order of their forwards.
        counting: whether a loop is under way.
    """

    def __init__(self, config: DenoiseConfig, pipe: Any = None, scheduler: Any = None) -> None:
        self.config = config
        self.progress = Progress(config.keep) if config.over_steps else None
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._scheduler = None if scheduler is None else weakref.ref(scheduler)
        self.choices: list[dict[str, Choice]] = []
        self.counting = self._in_loop = False
        self._thread = 0
        self._latents: list[Tensor] = []  # of the present step
        self._before = _Before()
        self._ended = 0  # since the last choice
        self._choose_anew = True

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "scheduler": self.scheduler}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Steps.__init__(self, state["config"], None, state["scheduler"])

    @property
    def needed(self) -> bool:
        """Whether the settings cannot do without a scheduler that is counted with."""
        return self.config.refresh > 1 or self.progress is not None

    @property
    def scheduler(self) -> Any:
        """The scheduler whose steps are counted; None where it is not known, or gone."""
        return None if self._scheduler is None else self._scheduler()

    def count_with(self, scheduler: Any) -> None:
        """Let that scheduler say when a step ends, once it is patched.

        Where steps are worth little, a scheduler that cannot be counted with is left alone.

        Raises:
            TurboError: something else has put methods of its own into it.
        """
        self._scheduler = None
        config = self.config
        asked = config.amount if self.progress is not None else f"refresh={config.refresh}"
        for name in COUNTED:
            known = hasattr(type(scheduler), name)
            if not self.needed and not (known and name not in scheduler.__dict__):
                return
            if not known:
                raise TurboError(
                    f"{asked}: the pipeline's scheduler, a {type(scheduler).__name__}, has no {name}, by which its "
                    f"steps are counted; {'give one share for all' if self.progress else 'leave refresh out'}"
                )
        for name in self._counted(scheduler):
            if name in scheduler.__dict__ and not _gives_way(scheduler.__dict__[name]):
                raise TurboError(
                    f"{asked}: the {name} of this {type(scheduler).__name__} is replaced already, by another "
                    "accelerated pipeline that shares the scheduler or by another library; give this pipeline a "
                    "scheduler of its own"
                )
        for patch in [scheduler.__dict__[name] for name in COUNTED if name in scheduler.__dict__]:
            patch.feature.steps.counting = False
            take_off([patch])
        self._scheduler = weakref.ref(scheduler)

    def _counted(self, scheduler: Any) -> dict[str, Any]:
        """The methods of a scheduler that are patched, by name."""
        if self.progress is None:
            return COUNTED
        return COUNTED | {name: function for name, function in TELLING.items() if hasattr(type(scheduler), name)}

    def patches(self, feature: DenoiseFeature) -> list[Patch]:
        """Those of the scheduler, where there is one."""
        scheduler = self.scheduler
        counted = {} if scheduler is None else self._counted(scheduler)
        return [Patch(scheduler, name, function, feature) for name, function in counted.items()]

    def follow_pipeline(self, feature: DenoiseFeature) -> None:
        """Count with the scheduler that the pipeline has now, be it another than before."""
        pipe, before = None if self._pipe is None else self._pipe(), self.scheduler
        if pipe is None or pipe.scheduler is before or (before is None and not self.needed):
            return
        if before is not None:
            take_off([patch for patch in patches_of(before) if patch.feature is feature])
        self.count_with(pipe.scheduler)
        install(self.patches(feature))
        self.begin_loop()  # its set_timesteps was called before it was known
        if getattr(pipe.scheduler, "num_inference_steps", 0) is not None:  # or was not called at all
            self.reach(place_of(pipe.scheduler) or 0)

    def begin_loop(self) -> None:
        """Forget all choices: a pipeline begins its steps."""
        self.counting, self._choose_anew, self._ended = True, True, 0
        self._thread, self._latents = threading.get_ident(), []
        if self.progress is not None:
            self.progress.begin()

    def reach(self, place: int | None) -> None:
        """Know which entry of the scheduler's `timesteps` is next; None where nothing says."""
        if self.progress is not None and place is not None and self.progress.reach(self.scheduler, place):
            self._choose_anew, self._ended = True, 0

    def share(self, timestep: Any) -> Share:
        """What a forward keeps.

        Args:
            timestep: that it is given; None where Python may not look at it.

        Raises:
            StateError: `keep` depends on the progress, and no loop is under way in this thread.
            ConfigError: a function has returned no share.
        """
        if self.progress is None:
            keep: Share = self.config.keep  # type: ignore[assignment]
            return keep
        if timestep is not None:
            self.reach(self.progress.look(self.scheduler, timestep))
        return self.progress.share()

    def begin_forward(self, latent: Tensor | None) -> dict[str, Choice]:
        """The choices that a forward of the denoiser begins with, and adds to.

        Args:
            latent: what it is given; None where Python may not look at it, and all forwards of a step pass for alike.
        """
        if latent is not None and not (self.counting and self._thread == threading.get_ident()):
            return self._before.choices_for(latent)
        if self._choose_anew or not self.counting:
            self.choices, self._latents = [], []
        self._choose_anew = False
        # A forward that fails never ends, and no later one shares its choices.
        self._in_loop, self.counting = self.counting, False
        place = 0
        if latent is not None:
            place = next((i for i, each in enumerate(self._latents) if _are_equal(each, latent)), len(self._latents))
            if place == MOST:  # nobody takes the scheduler's steps: a sampler of one's own, behind set_timesteps
                self._in_loop, self._latents, self.choices = False, [], []
                return self._before.choices_for(latent)
            if place == len(self._latents):
                self._latents.append(latent.detach().clone())  # a sampler may change its own in place
        while len(self.choices) <= place:
            self.choices.append({})
        return self.choices[place]

    def end_forward(self, latent: Tensor | None, choices: dict[str, Choice]) -> None:
        """Go on counting, where that was so before the forward."""
        if latent is None or any(choices is each for each in self.choices):
            self.counting = self._in_loop
        else:
            self._before.latent, self._before.choices = weakref.ref(latent), choices

    def end_step(self, last: bool) -> None:
        """Count a step of the scheduler; its last one ends the loop."""
        self._ended = (self._ended + 1) % self.config.refresh
        self._latents = []
        self._choose_anew = self._ended == 0
        self.counting = self.counting and not last


class _Before(threading.local):
    """The latest forward of a thread that no loop counts: its latent, and what was chosen in it."""

    latent: Any = None
    choices: Any = None

    def choices_for(self, latent: Tensor) -> dict[str, Choice]:
        """Its choices, where the two latents are parts of one batch and equal: the halves of guidance, one by one."""
        before = None if self.latent is None else self.latent()
        self.latent = None  # a forward that fails leaves nothing
        if before is None or before.storage_offset() == latent.storage_offset():
            return {}
        of_one_batch = before.untyped_storage().data_ptr() == latent.untyped_storage().data_ptr()
        return dict(self.choices) if of_one_batch and _are_equal(before, latent) else {}


def _gives_way(method: Any) -> bool:
    """Whether it is another pipeline's, to which counting is worth little."""
    return isinstance(method, Patch) and method.before is None and not method.feature.steps.needed  # type: ignore[attr-defined]


def _are_equal(latent: Tensor, other: Tensor) -> bool:
    alike = (latent.shape, latent.dtype, latent.device) == (other.shape, other.dtype, other.device)
    return latent is other or (alike and torch.equal(latent, other))


def set_timesteps(patch: Patch, scheduler: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Let the scheduler begin its steps."""
    steps: Steps = patch.feature.steps  # type: ignore[attr-defined]
    steps.begin_loop()
    out = original(*args, **kwargs)
    steps.reach(place_of(scheduler) or 0)
    return out


def step(patch: Patch, scheduler: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Let the scheduler take a step."""
    steps: Steps = patch.feature.steps  # type: ignore[attr-defined]
    out = original(*args, **kwargs)
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
    steps.end_step(_was_last(scheduler, timestep))
    if steps.progress is not None:
        steps.reach(steps.progress.place_behind(scheduler, timestep))
    return out


def set_begin_index(patch: Patch, scheduler: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Let the scheduler begin at another step than its first."""
    out = original(*args, **kwargs)
    steps: Steps = patch.feature.steps  # type: ignore[attr-defined]
    steps.reach(place_of(scheduler))
    return out


def scale_model_input(patch: Patch, scheduler: Any, original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Let the scheduler scale what the denoiser is given next."""
    out = original(*args, **kwargs)
    timestep = kwargs["timestep"] if "timestep" in kwargs else (*args[1:2], None)[0]
    steps: Steps = patch.feature.steps  # type: ignore[attr-defined]
    steps.reach(place_of(scheduler, timestep))
    return out


def _was_last(scheduler: Any, timestep: Any) -> bool:
    """Whether the step that was taken is the last: by the scheduler's own count, where it has one."""
    taken = getattr(scheduler, "step_index", None)
    if taken is not None:
        return bool(taken >= len(scheduler.timesteps))
    return float(timestep) == float(scheduler.timesteps[-1])


COUNTED = {"set_timesteps": set_timesteps, "step": step}
"""What is patched of every scheduler."""
TELLING = {"set_begin_index": set_begin_index, "scale_model_input": scale_model_input}
"""What else tells which step is next, where a scheduler has it; image-to-image begins in the middle."""
