"""Merges that hold for several denoising steps: the pipeline's scheduler says when a step ends.

A forward decides anew unless a step of the scheduler has allowed it to merge as the last one did. So what nobody
counts, such as a forward outside of the pipeline, is decided anew.
"""

from __future__ import annotations

import functools
from typing import Any

from turbovlm.diffusion.plan import DiffusionPlan
from turbovlm.errors import TurboError


def follow(plan: DiffusionPlan) -> None:
    """Count the steps of the pipeline's scheduler, be it another than before; of none where there is no pipeline.

    Raises:
        TurboError: something else has put methods of its own into it.
    """
    scheduler = None if plan.pipe is None else plan.pipe.scheduler
    if scheduler is plan.scheduler:
        return
    unfollow(plan)
    for name, function in _FOLLOWED.items():
        if name in scheduler.__dict__:
            raise TurboError(
                f"refresh={plan.config.refresh}: the {name} of this {type(scheduler).__name__} is replaced already, by "
                "another accelerated pipeline that shares the scheduler or by another library; give this pipeline a "
                "scheduler of its own"
            )
        method = getattr(scheduler, name)
        setattr(scheduler, name, functools.update_wrapper(functools.partial(function, plan, method), method))
    plan.scheduler = scheduler


def unfollow(plan: DiffusionPlan) -> None:
    """Give the scheduler back as it was."""
    for name in _FOLLOWED if plan.scheduler is not None else ():
        plan.scheduler.__dict__.pop(name, None)
    plan.scheduler = None
    plan.again = False


def _set_timesteps(plan: DiffusionPlan, method: Any, *args: Any, **kwargs: Any) -> Any:
    plan.steps, plan.again = 0, False
    return method(*args, **kwargs)


def _step(plan: DiffusionPlan, method: Any, *args: Any, **kwargs: Any) -> Any:
    plan.steps += 1
    plan.again = plan.steps % plan.config.refresh != 0
    return method(*args, **kwargs)


_FOLLOWED = {"set_timesteps": _set_timesteps, "step": _step}
