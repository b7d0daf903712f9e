"""`compare`: what Turbo saves on this machine, measured against the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.apply import apply
from turbovlm.config import Config
from turbovlm.errors import ConfigError, TurboError
from turbovlm.patching import patches_on
from turbovlm.profile.comparison import BASELINE, FORWARD, Comparison, Run, Timing, measured_on
from turbovlm.profile.macs import macs
from turbovlm.profile.quantize import weight_bytes
from turbovlm.profile.timing import Forward, interleaved, peak_memory
from turbovlm.settings import Settings
from turbovlm.sharing import twin

Prepare = Callable[[nn.Module], Any]
"""Changes a copy of the model in place: another method to compare with."""


def compare(
    model: nn.Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    configs: Config | Sequence[Config] | Mapping[str, Config | Sequence[Config] | Prepare],
    *,
    rounds: int = 10,
    warmup: int = 2,
    compile: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Comparison:
    """Time the model itself and accelerated versions of it in turn, A B … B A, in one process.

    Every version is a copy of the model that shares its weights, in eval mode, under `torch.inference_mode`; the
    model is left as it is. The clock is process CPU time on the CPU (all threads), CUDA events on a GPU, else the
    wall's; garbage is collected between rounds.

    Args:
        model: on the device and in the dtype to be measured.
        inputs: a tensor, a sequence of arguments, or a mapping of keyword arguments.
        configs: the settings to compare; or by name, and then also several configs of one version, and functions that
            prepare a copy of the model in place, for other methods.
        rounds: how often each version is timed, ≥ 1.
        warmup: rounds before that, which do not count; ≥ 1 where something must be compiled first.
        compile: compile every version, the model itself included, with `torch.compile`'s defaults.
        progress: called with 1 after each of the `(warmup + rounds) · versions` forwards.

    Raises:
        ConfigError: no config, a `rounds` or `warmup` that is no integer in range, or a config named `"model"`.
        TurboError: the model is accelerated already, or has no parameters.
    """
    versions = {name: _preparation(name, config) for name, config in named(configs).items()}
    check_integers(rounds=(rounds, 1), warmup=(warmup, 1 if compile else 0))
    if any(True for _ in patches_on(model)):
        raise TurboError("this model is accelerated already: compare against the model itself, after handle.remove()")
    batch = _batch(inputs)
    weights = next(model.parameters(), None)
    if weights is None:
        raise TurboError(f"this {type(model).__name__} has no parameters, so no device and dtype to measure on")
    device, forwards, costs, sizes = weights.device, [], [], []
    for prepare in (_nothing, *versions.values()):
        version = twin(model)
        prepare(version)
        costs.append(macs(version, *_arguments(inputs)[0], **_arguments(inputs)[1]))
        sizes.append(weight_bytes(version))
        forwards.append(_forward(torch.compile(version) if compile else version, inputs))
    # All copies have one forward, whose compiled versions would otherwise give way to eager ones from the ninth on.
    with torch._dynamo.config.patch(recompile_limit=max(8, 2 * len(forwards))):
        clock, wall = interleaved(forwards, device, rounds, warmup, progress or _nothing)
        peaks = [peak_memory(forward, device) for forward in forwards]
    runs = [
        Run(name, costs[i], {FORWARD: Timing(tuple(clock[i]), peaks[i])}, tuple(wall[i]), sizes[i])
        for i, name in enumerate((BASELINE, *versions))
    ]
    return Comparison(tuple(runs), batch, **measured_on(device, weights.dtype, compile))


def named(configs: Any) -> dict[str, Any]:
    """The versions to compare by name: a config alone, several, or a mapping, as `compare` takes them.

    Raises:
        ConfigError: none, several of one name, or one named as the model itself.
    """
    if isinstance(configs, Settings):
        configs = [configs]
    if not isinstance(configs, Mapping):
        listed = list(configs)
        configs = {config.amount if isinstance(config, Settings) else repr(config): config for config in listed}
        if len(configs) < len(listed):
            raise ConfigError(f"configs: several are called {next(iter(configs))!r}; give them names, as a mapping")
    if not configs:
        raise ConfigError("configs: give at least one config to compare the model with")
    if BASELINE in configs:
        raise ConfigError(f"configs: the name {BASELINE!r} is the model's own")
    return dict(configs)


def check_integers(**values: tuple[Any, int]) -> None:
    """Refuse a value that is no integer, or less than it may be: `name=(value, least)`.

    Raises:
        ConfigError: naming it.
    """
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: must be an integer ≥ {least}")


def _preparation(name: str, config: Any) -> Prepare:
    several = config if isinstance(config, list | tuple) else (config,)
    if all(isinstance(each, Settings) for each in several):
        return lambda model: apply(model, *several)
    if not callable(config):
        raise ConfigError(f"configs[{name!r}]={config!r}: must be one or several configs, or a function of a model")
    prepare: Prepare = config
    return prepare


def _nothing(_: Any) -> None:
    pass


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs)), {}


def _forward(model: Callable[..., Any], inputs: Any) -> Forward:
    args, kwargs = _arguments(inputs)

    def forward() -> object:
        with torch.inference_mode():
            return model(*args, **kwargs)

    return forward


def _batch(inputs: Any) -> int:
    args, kwargs = _arguments(inputs)
    grid = next((kwargs[name] for name in ("grid_thw", "image_grid_thw") if kwargs.get(name) is not None), None)
    for value in (*args, *kwargs.values()) if grid is None else (grid,):  # of packed images, a row each
        if isinstance(value, Tensor) and value.ndim > 0:
            return int(value.shape[0])
    raise ConfigError("inputs: no tensor among them, so the number of images per forward is not known")
