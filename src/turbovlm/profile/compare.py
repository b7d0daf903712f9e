"""`compare`: what Turbo saves on this machine, measured against the model itself."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.apply import apply
from turbovlm.config import Config, TurboConfig
from turbovlm.errors import ConfigError, TurboError
from turbovlm.patching import patches_on
from turbovlm.profile.macs import macs
from turbovlm.profile.quantize import weight_bytes
from turbovlm.profile.timing import CLOCKS, Forward, Quartiles, interleaved, peak_memory

Prepare = Callable[[nn.Module], Any]
"""Changes a copy of the model in place: another method to compare with."""

BASELINE = "model"


@dataclass(frozen=True)
class Run:
    """One version of the model, measured.

    Attributes:
        name: `"model"` for the model itself.
        macs: multiply-accumulates of one forward of the whole batch.
        seconds: of one forward, by `Comparison.clock`, in every round.
        wall_seconds: the same by the wall's clock.
        peak_bytes: the most memory that a forward had allocated at once, beside weights and inputs; None where the
            device does not tell.
        weight_bytes: of parameters and buffers as they lie in memory.
    """

    name: str
    macs: int
    seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]
    peak_bytes: int | None
    weight_bytes: int


@dataclass(frozen=True)
class Comparison:
    """The model and its versions, measured in turn in one process.

    Attributes:
        runs: the model itself first.
        batch: images per forward.
        device, dtype, clock: where and how it was measured; `threads` of the CPU.
        compiled: whether every version, the model itself included, went through `torch.compile`.
    """

    runs: tuple[Run, ...]
    batch: int
    device: str
    dtype: str
    threads: int
    clock: str
    compiled: bool

    @property
    def baseline(self) -> Run:
        """The model itself."""
        return self.runs[0]

    def run(self, name: str) -> Run:
        """The run of that name.

        Raises:
            ConfigError: there is none.
        """
        for run in self.runs:
            if run.name == name:
                return run
        raise ConfigError(f"{name!r}: no such run; there are {', '.join(repr(run.name) for run in self.runs)}")

    def speedup(self, name: str) -> Quartiles:
        """How many times faster than the model itself, over the rounds."""
        return ratios(self.baseline.seconds, self.run(name).seconds)

    def macs_ratio(self, name: str) -> float:
        """How many times fewer multiply-accumulates than the model itself."""
        return self.baseline.macs / self.run(name).macs

    def efficiency(self, name: str) -> float:
        """The median speed-up over the ratio of multiply-accumulates: 1 where all that arithmetic allows is gained."""
        return self.speedup(name).median / self.macs_ratio(name)

    def images_per_second(self, name: str) -> float:
        """Images per second of wall-clock time, at the median."""
        return self.batch / Quartiles.of(self.run(name).wall_seconds).median

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings, for JSON: every sample, and what follows from them."""
        runs = []
        for run in self.runs:
            speedup = self.speedup(run.name)
            runs.append(
                {
                    "name": run.name,
                    "macs": run.macs,
                    "seconds": list(run.seconds),
                    "wall_seconds": list(run.wall_seconds),
                    "peak_bytes": run.peak_bytes,
                    "weight_bytes": run.weight_bytes,
                    "speedup": speedup.median,
                    "speedup_quartiles": [speedup.low, speedup.high],
                    "macs_ratio": self.macs_ratio(run.name),
                    "efficiency": self.efficiency(run.name),
                    "images_per_second": self.images_per_second(run.name),
                }
            )
        about = {name: getattr(self, name) for name in ("batch", "device", "dtype", "threads", "clock", "compiled")}
        return {**about, "rounds": len(self.baseline.seconds), "runs": runs}

    @property
    def conditions(self) -> str:
        """How it was measured, in one line."""
        device = f"{self.device}, {self.threads} threads" if self.clock == CLOCKS["cpu"] else self.device
        how = "compiled" if self.compiled else "eager"
        rounds = len(self.baseline.seconds)
        return f"{device}, {self.dtype}, batch {self.batch}, {how}, {rounds} rounds, {self.clock}"

    def __str__(self) -> str:
        width = max(len(run.name) for run in self.runs) + 1
        lines = [
            self.conditions,
            f"{'':{width}}{'s/batch':>9}{'images/s':>10}{'GMACs':>9}{'speed-up':>10}{'quartiles':>15}"
            f"{'MACs ratio':>12}{'efficiency':>12}{'peak MB':>9}",
        ]
        for run in self.runs:
            speedup, peak = self.speedup(run.name), run.peak_bytes
            lines.append(
                f"{run.name:{width}}{Quartiles.of(run.seconds).median:9.4g}{self.images_per_second(run.name):10.4g}"
                f"{run.macs / 1e9:9.2f}{speedup.median:9.3f}x{f'{speedup.low:.3f}–{speedup.high:.3f}':>15}"
                f"{self.macs_ratio(run.name):11.3f}x{self.efficiency(run.name):12.3f}"
                f"{'' if peak is None else f'{peak / 1e6:.1f}':>9}"
            )
        return "\n".join(lines)


def compare(
    model: nn.Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    configs: TurboConfig | Sequence[TurboConfig] | Mapping[str, TurboConfig | Prepare],
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
        configs: the settings to compare; or by name, and then also functions that prepare a copy of the model in
            place, for other methods.
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
    names = (BASELINE, *versions)
    measured = zip(names, costs, clock, wall, peaks, sizes)
    runs = [Run(name, cost, tuple(s), tuple(w), peak, size) for name, cost, s, w, peak, size in measured]
    return Comparison(
        runs=tuple(runs),
        batch=batch,
        device=describe_device(device),
        dtype=str(weights.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        clock=CLOCKS.get(device.type, "wall-clock time"),
        compiled=compile,
    )


def named(configs: Any) -> dict[str, Any]:
    """The versions to compare by name: a config alone, several, or a mapping, as `compare` takes them.

    Raises:
        ConfigError: none, several of one name, or one named as the model itself.
    """
    if isinstance(configs, Config):
        configs = [configs]
    if not isinstance(configs, Mapping):
        listed = list(configs)
        configs = {config.amount if isinstance(config, Config) else repr(config): config for config in listed}
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
    if isinstance(config, Config):
        return lambda model: apply(model, config)
    if not callable(config):
        raise ConfigError(f"configs[{name!r}]={config!r}: must be a TurboConfig, or a function that prepares a model")
    prepare: Prepare = config
    return prepare


def _nothing(_: Any) -> None:
    pass


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the model's parameters and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


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
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return int(value.shape[0])
    raise ConfigError("inputs: no tensor among them, so the number of images per forward is not known")


def ratios(baseline: Sequence[float], other: Sequence[float]) -> Quartiles:
    """How many times less the other took, round by round."""
    return Quartiles.of([a / b for a, b in zip(baseline, other)])


def describe_device(device: torch.device) -> str:
    """For people: the GPU's name, or the kind of CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU" if device.type == "cpu" else str(device)
