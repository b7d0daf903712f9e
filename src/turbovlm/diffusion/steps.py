"""Merges that hold for several denoising steps: the pipeline's scheduler says when a step ends.

Forwards outside of a run, which nobody counts, decide for themselves.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from turbovlm.diffusion.plan import DiffusionPlan
from turbovlm.errors import TurboError


def follow(plan: DiffusionPlan) -> None:
    """Count the steps of the pipeline's scheduler, be it another than before; of none where no pipeline is known.

    Raises:
        TurboError: something else has put methods of its own into it.
    """
    if plan.pipe is None or plan.pipe.scheduler is plan.scheduler:
        return
    scheduler = plan.pipe.scheduler
    replaced = plan.scheduler is not None
    unfollow(plan)
    for name in _FOLLOWED:
        if name in scheduler.__dict__:
            raise TurboError(
                f"refresh={plan.config.refresh}: the {name} of this {type(scheduler).__name__} is replaced already, by "
                "another accelerated pipeline that shares the scheduler or by another library; give this pipeline a "
                "scheduler of its own"
            )
    for name, function in _FOLLOWED.items():
        method = getattr(scheduler, name)
        setattr(scheduler, name, functools.update_wrapper(functools.partial(function, plan, method), method))
    plan.counting = replaced  # in the middle of a run
    plan.steps, plan.due, plan.scheduler = 0, True, scheduler


def unfollow(plan: DiffusionPlan) -> None:
    """Give the scheduler back as it was."""
    if plan.scheduler is not None:
        _give_back(plan.scheduler)
    plan.scheduler = None
    plan.counting = False


def _give_back(scheduler: Any) -> None:
    """But for methods that another library has wrapped since: inside of its own they do no harm."""
    for name, function in _FOLLOWED.items():
        method = scheduler.__dict__.get(name)
        if isinstance(method, functools.partial) and method.func is function:
            del scheduler.__dict__[name]


def _set_timesteps(plan: DiffusionPlan, method: Any, *args: Any, **kwargs: Any) -> Any:
    if not plan.active:  # a copy of a pipeline, no longer accelerated
        _give_back(method.__self__)
    else:
        plan.scheduler = method.__self__  # a copy's is known from now on
        plan.steps, plan.counting, plan.due = 0, True, True
    return method(*args, **kwargs)


def _step(plan: DiffusionPlan, method: Any, *args: Any, **kwargs: Any) -> Any:
    plan.steps += 1
    plan.due = plan.steps % plan.config.refresh == 0
    if _is_last(method.__self__, kwargs["timestep"] if "timestep" in kwargs else args[1]):
        plan.counting = False
    return method(*args, **kwargs)


def _is_last(scheduler: Any, timestep: Any) -> bool:
    """Whether a run's last step is under way, told without waiting for a GPU: by where the timestep lies in memory."""
    last = scheduler.timesteps[-1]
    if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
        return bool(timestep.data_ptr() == last.data_ptr())
    return float(timestep) == float(last)


_FOLLOWED = {"set_timesteps": _set_timesteps, "step": _step}
