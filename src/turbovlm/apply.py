"""`apply` puts Turbo into a model; the `Handle` it returns reports, restores and removes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch.nn as nn
from torch import Tensor

from turbovlm.config import TurboConfig
from turbovlm.diffusion.install import DENOISERS, denoiser_of, install_diffusion, is_denoiser, plan_diffusion
from turbovlm.diffusion.install import OVERRIDES as DIFFUSION_OVERRIDES
from turbovlm.diffusion.plan import DiffusionPlan
from turbovlm.diffusion.steps import follow, unfollow
from turbovlm.encoder.block import Plan, accelerated_forward
from turbovlm.encoder.families.joint import joining_forward
from turbovlm.encoder.layout import fetch, path_of
from turbovlm.encoder.plan import plan_encoder
from turbovlm.encoder.schedule import Schedule, make_schedule
from turbovlm.encoder.state import BlockTrace
from turbovlm.encoder.towers import find_towers
from turbovlm.encoder.verify import verify
from turbovlm.errors import ConfigError, StateError, TurboError, UnsupportedModelError
from turbovlm.patching import check_hooks, slot_of
from turbovlm.report import describe, report_diffusion, report_encoder, report_grounding, report_reading
from turbovlm.vlm.attention import guiding_forward
from turbovlm.vlm.grounding import (
    GroundingPlan,
    cross_forward,
    install_grounding,
    layer_forward,
    plan_grounding,
)
from turbovlm.vlm.install import OVERRIDES, install_reading, plan_reading, replaced
from turbovlm.vlm.plan import ReadingPlan
from turbovlm.vlm.select import Selection


def apply(model: Any, config: TurboConfig | None = None, **settings: Any) -> Handle:
    """Merge tokens in every block of the vision encoders found in `model`, in place.

    No parameter, buffer, class or hook is changed: each accelerated block gets a `forward` of its own.

    Args:
        model: a `transformers`, `timm`, `torchvision` or `open_clip` model, or any module that contains one; or a
            `diffusers` pipeline, UNet or transformer.
        config: the settings; or give them by name instead: `apply(model, r=16)`.
        settings: the fields of `TurboConfig`.

    Returns:
        A handle that reports (`print(handle)`), traces, restores and removes; also a context manager.

    Raises:
        ConfigError: wrong settings; a list of `r` of the wrong length; `guidance="cls"` without a CLS token.
        UnsupportedModelError: nothing in the model can be accelerated.
        TurboError: the model is accelerated already.
    """
    if config is not None and settings:
        raise ConfigError(f"a TurboConfig or settings by name, not both: got {', '.join(settings)} beside a config")
    if config is None:
        config = _config(settings)
    elif not isinstance(config, TurboConfig):
        raise ConfigError(f"config={config!r}: must be a TurboConfig; an amount goes by name, as in apply(model, r=16)")
    given, model = model, _module_of(model)
    _check_untouched(model)
    if is_denoiser(model):
        painting = plan_diffusion(model, config.settled("weighted_difference"), given)
        follow(painting)
        install_diffusion(model, painting)
        return Handle(model, [painting])
    towers = find_towers(model) if config.merges else []
    plans = [plan_encoder(tower, config) for tower in towers]
    for tower in towers:
        check_hooks(tower.blocks)
    across = config.settled("weighted_difference")
    reading = None if config.visual_keep is None else plan_reading(model, across)
    grounding = None if config.cross_keep is None else plan_grounding(model, across)
    if reading is not None:
        check_hooks(replaced(model, reading), one_device=False)
    if grounding is not None:
        layers = model.get_submodule(grounding.layers)
        check_hooks((f"{grounding.layers}.{name}", layer) for name, layer in layers.named_children())
    for tower in towers:
        verify(tower)
    for tower, plan in zip(towers, plans):
        for index, (_, block) in enumerate(tower.blocks):
            setattr(block, slot_of(block), functools.partial(accelerated_forward, block, plan, index))
        if tower.layout.joint is not None:
            joint = fetch(tower.module, path_of(tower.layout.family, tower.module, tower.layout.joint))
            setattr(joint, slot_of(joint), functools.partial(joining_forward, joint, plan))
    if reading is not None:
        install_reading(model, reading)
    if grounding is not None:
        install_grounding(model, grounding)
    return Handle(model, [*plans, *(plan for plan in (reading, grounding) if plan is not None)])


def _module_of(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    denoiser = denoiser_of(model)
    if denoiser is None:
        parts = getattr(model, "__dict__", {}).items()
        inside = [f"{name} ({type(part).__name__})" for name, part in parts if isinstance(part, nn.Module)]
        found = f": it has {', '.join(inside)}, and neither of {', '.join(DENOISERS)}" if inside else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} is no torch.nn.Module{found}: apply to the model inside it"
        )
    return denoiser


def get_handle(model: Any) -> Handle:
    """The handle of an accelerated model, such as a copy or one that was unpickled.

    Raises:
        TurboError: the model is not accelerated.
    """
    model = _module_of(model)
    found = [plan for plan in dict.fromkeys(o.plan for o in overrides(model)) if getattr(plan, "active", True)]
    if not found:
        raise TurboError(f"this {type(model).__name__} is not accelerated")
    return Handle(model, found)


class Handle:
    """What `apply` did to one model, and the way back."""

    def __init__(self, model: nn.Module, plans: list[AnyPlan]) -> None:
        self._model = model
        self._all = plans
        self._plans = [plan for plan in plans if isinstance(plan, Plan)]
        self._reading = next((plan for plan in plans if isinstance(plan, ReadingPlan)), None)
        self._grounding = next((plan for plan in plans if isinstance(plan, GroundingPlan)), None)

    @property
    def config(self) -> TurboConfig:
        """The settings in force."""
        return self._all[0].config

    @property
    def active(self) -> bool:
        """Whether the model is still accelerated by this handle."""
        found = {override.plan for override in overrides(self._model)}
        return any(plan in found and getattr(plan, "active", True) for plan in self._all)

    @property
    def schedules(self) -> list[Schedule]:
        """One schedule per accelerated encoder, for its native number of tokens."""
        return [_schedule(plan, plan.native_tokens) for plan in self._plans]

    def schedule(self, tokens: int) -> Schedule:
        """The first encoder's schedule for inputs of `tokens` tokens, prefix included."""
        prefix = self._plans[0].shape.prefix
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens <= prefix:
            raise ConfigError(f"tokens={tokens!r}: must be an integer > {prefix}, the number of prefix tokens")
        return _schedule(self._plans[0], tokens)

    @property
    def trace(self) -> list[BlockTrace]:
        """Per block of the last forward: what was merged where, and R, A and E.

        Raises:
            StateError: the config has no `trace=True`, or no forward has ended yet.
        """
        if not self.config.trace:
            raise StateError("nothing is traced: apply with trace=True")
        if all(plan.last is None for plan in self._plans):
            raise StateError("nothing is traced yet: run the model first")
        return [trace for plan in self._plans if plan.last is not None for trace in plan.last.traces]

    @property
    def visual(self) -> tuple[Selection, ...]:
        """What became of each image's visual tokens in the last prompt, in the order of the prompts.

        Raises:
            StateError: the config has no `visual_keep`, or no prompt with an image has been read yet.
        """
        if self._reading is None:
            raise StateError("no visual tokens are chosen: apply with visual_keep")
        if self._reading.last is None:
            raise StateError("no visual tokens have been chosen yet: run the model first")
        return self._reading.last

    @property
    def cross(self) -> tuple[Selection, ...]:
        """Which image tokens were left from one stage of cross-attention layers to the next, in the last forward.

        Raises:
            StateError: the config has no `cross_keep`, or no image has been read yet.
        """
        if self._grounding is None:
            raise StateError("cross-attention reads all tokens: apply with cross_keep")
        if self._grounding.last is None:
            raise StateError("no image has been read yet: run the model first")
        return self._grounding.last

    def restore(self, tokens: Tensor, *, tower: str | None = None) -> Tensor:
        """Give every position of the last forward's input the value of the token it became part of.

        For heads that need the full grid: segmentation, saliency, detection. Differentiable.

        Args:
            tokens: `[batch, M, ...]`, one entry per token that the encoder handed on, prefix included.
            tower: path of the encoder, where several are accelerated.

        Returns:
            `[batch, N0, ...]`, in the order of the encoder's input; the tokens themselves where the encoder has
            already restored them.

        Raises:
            StateError: no forward has ended yet, or the tokens are not those of the last one.
            ConfigError: an unknown tower.
        """
        plan = self._plan_of(tower)
        if plan.last is None:
            raise StateError("nothing to restore yet: run the model first")
        source = plan.last.source()
        if source is None:
            return tokens
        if plan.restore and tokens.shape[:2] == source.shape:
            return tokens
        merged = plan.last.merges[-1].sizes.shape
        if tokens.ndim < 2 or tokens.shape[:2] != merged:
            raise StateError(
                f"tokens of shape {tuple(tokens.shape)} are not the last forward's: expected {tuple(merged)} in front "
                "(batch, tokens with CLS and registers)"
            )
        index = source.reshape(*source.shape, *(1,) * (tokens.ndim - 2)).expand(-1, -1, *tokens.shape[2:])
        return tokens.gather(1, index)

    def remove(self) -> None:
        """Give the model back as it was. A second call does nothing."""
        for override in list(overrides(self._model)):
            if override.plan in self._all:
                override.remove()
        for plan in self._all:
            if isinstance(plan, DiffusionPlan):
                plan.active = False
                unfollow(plan)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self.active else ", removed"
        lines = [f"Turbo({self.config.amount}, {describe(self.config)}{state})"]
        for encoder, schedule in zip(self._plans, self.schedules):
            lines += report_encoder(encoder, schedule)
        if self._reading is not None:
            lines += report_reading(self._reading)
        for plan in self._all:
            if isinstance(plan, DiffusionPlan):
                lines += report_diffusion(plan)
        if self._grounding is not None:
            lines += report_grounding(self._grounding)
        return "\n".join(lines)

    def _plan_of(self, tower: str | None) -> Plan:
        named = {plan.tower: plan for plan in self._plans}
        if tower is None and len(named) == 1:
            return self._plans[0]
        if tower not in named:
            raise ConfigError(f"tower={tower!r}: must be one of {', '.join(map(repr, named))}")
        return named[tower]


def _config(settings: dict[str, Any]) -> TurboConfig:
    fields = TurboConfig.__dataclass_fields__
    unknown = [name for name in settings if name not in fields]
    if unknown:
        raise ConfigError(f"{unknown[0]}={settings[unknown[0]]!r}: no such setting; there are {', '.join(fields)}")
    return TurboConfig(**settings)


AnyPlan = Plan | ReadingPlan | GroundingPlan | DiffusionPlan
_FORWARDS = (accelerated_forward, joining_forward, layer_forward, cross_forward, *OVERRIDES, *DIFFUSION_OVERRIDES)
"""The functions that take a method's place on one module."""


@dataclass(frozen=True)
class Override:
    """A method that one module has of its own: where, what it is called, by which plan, and what was there before."""

    module: nn.Module
    name: str
    plan: AnyPlan
    before: Any = None

    def remove(self) -> None:
        """Put back what was there."""
        self.module.__dict__.pop(self.name, None)
        if self.before is not None:
            setattr(self.module, self.name, self.before)
        elif not hasattr(type(self.module), self.name):  # where a library that came later, such as accelerate, keeps it
            setattr(self.module, self.name, type(self.module).forward.__get__(self.module))


def overrides(model: nn.Module) -> Iterator[Override]:
    """Everything that `apply` put into `model`."""
    for module in model.modules():
        for name, method in list(module.__dict__.items()):
            while isinstance(method, functools.partial) and method.func in _FORWARDS:
                before = method.args[2] if method.func in DIFFUSION_OVERRIDES else None
                yield Override(module, name, method.args[1], before)
                method = method.args[2] if method.func is guiding_forward else None


def _check_untouched(model: nn.Module) -> None:
    for override in list(overrides(model)):
        if not getattr(override.plan, "active", True):  # hidden by another library's hooks when its plan was removed
            override.remove()
            continue
        raise TurboError(
            f"{_name_of(model, override.module)} is accelerated already ({override.plan.config.amount}): "
            "call handle.remove(), or turbovlm.get_handle(model).remove(), first"
        )


def _name_of(model: nn.Module, sought: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is sought) or type(model).__name__


def _schedule(plan: Plan, tokens: int) -> Schedule:
    return make_schedule(plan.config, plan.shape, tokens, plan.tower, plan.names)
