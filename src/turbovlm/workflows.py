"""Which config a keyword of `apply` belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from turbovlm.calibration.result import Calibration
from turbovlm.config import AMOUNTS, READS, Config, DenoiseConfig, ReadConfig, TurboConfig
from turbovlm.errors import ConfigError
from turbovlm.read_config import SALIENCY

ABOUT: dict[type, str] = {
    TurboConfig: "encoders: r, keep or flops",
    ReadConfig: "what a language model reads: visual_keep, cross_keep or pixel_tolerance",
    DenoiseConfig: "denoisers of image generation: keep",
}
"""The classes, what each is for, and the fields that say how much."""


def configs_from(configs: Sequence[Any], settings: Mapping[str, Any], denoises: bool, model: str) -> tuple[Config, ...]:
    """The configs of one call of `apply`.

    Args:
        configs: config objects, or what `turbovlm.calibrate` returned.
        settings: or fields by name; each goes to every class in use that has it.
        denoises: whether the model is a denoiser, which alone takes a `DenoiseConfig`.
        model: its class's name, for messages.

    Raises:
        ConfigError: both, neither, two of one class, an unknown field, or one that the model has no use for: the
            message says which class has it.
    """
    if not configs:
        return _from_names(settings, denoises, model)
    if settings:
        raise ConfigError(f"a config or settings by name, not both: got {', '.join(settings)} beside a config")
    found = [config.config if isinstance(config, Calibration) else config for config in configs]
    for config in found:
        if not isinstance(config, tuple(ABOUT)):
            raise ConfigError(
                f"config={config!r}: must be a TurboConfig, ReadConfig or DenoiseConfig; an amount goes by name, as in "
                "apply(model, r=16)"
            )
        if isinstance(config, DenoiseConfig) != denoises:
            raise ConfigError(f"{type(config).__name__} is for {ABOUT[type(config)]}; {_takes(denoises, model)}")
    kinds = [type(config).__name__ for config in found]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"several of one kind: {', '.join(kinds)}; give one config of each at most")
    return tuple(sorted(found, key=lambda config: list(ABOUT).index(type(config))))


def _from_names(settings: Mapping[str, Any], denoises: bool, model: str) -> tuple[Config, ...]:
    names: dict[type, set[str]] = {kind: {field.name for field in fields(kind)} for kind in ABOUT}
    for name, value in settings.items():
        if not any(name in known for known in names.values()):
            known = ", ".join(dict.fromkeys(field.name for kind in ABOUT for field in fields(kind)))
            raise ConfigError(f"{name}={value!r}: no such setting; there are {known}")
    # an amount of None is none, so that a program can pass all of them on
    settings = {name: value for name, value in settings.items() if name not in AMOUNTS + READS or value is not None}
    wanted: list[type] = [DenoiseConfig] if denoises else []
    if not denoises:
        amounts = ((TurboConfig, AMOUNTS), (ReadConfig, READS))
        wanted = [kind for kind, names_of_amounts in amounts if settings.keys() & set(names_of_amounts)]
    if not denoises and not wanted:
        raise ConfigError(
            "give exactly one of r, keep and flops: got none of them; or visual_keep, cross_keep or pixel_tolerance"
        )
    for name, value in settings.items():
        if not any(name in names[kind] for kind in wanted):
            owners = [kind for kind in ABOUT if name in names[kind]]
            where = "; ".join(f"{kind.__name__} has it, which is for {ABOUT[kind]}" for kind in owners)
            raise ConfigError(f"{name}={value!r}: {where}; {_takes(denoises, model)}")
    if denoises and "keep" not in settings:
        raise ConfigError(f"give keep, the share of its tokens that a block reads: {_takes(denoises, model)}")
    of: dict[Any, dict[str, Any]] = {
        kind: {name: value for name, value in settings.items() if name in names[kind]} for kind in wanted
    }
    _check_alpha(of)
    unread = {kind: kind.unread(own) for kind, own in of.items()} if len(of) > 1 else {}
    for kind, own in of.items():  # what another class in use reads has an effect there
        shared = [
            name
            for name in unread.get(kind, ())
            if any(name in of[other] and name not in unread[other] for other in of)
        ]
        of[kind] = {name: value for name, value in own.items() if name not in shared}
    return tuple(kind(**own) for kind, own in of.items())


def _check_alpha(of: Mapping[Any, Mapping[str, Any]]) -> None:
    """See that one α is not given to two classes in which it means something else."""
    reading = of.get(ReadConfig)
    if reading is None or TurboConfig not in of or "alpha" not in reading:
        return
    select = reading.get("visual_select", ReadConfig.visual_select)
    if isinstance(select, str) and SALIENCY.get(select):
        raise ConfigError(
            f"alpha={reading['alpha']!r}: inside the tower it is that of the degree, and with visual_select={select!r} "
            "the power of A in a token's weight: say which, as in apply(model, TurboConfig(r=8, alpha=10), "
            "ReadConfig(0.5))"
        )


def _takes(denoises: bool, model: str) -> str:
    if denoises:
        return f"this {model} is a denoiser, which takes the fields of DenoiseConfig"
    return f"this {model} is no denoiser: it takes the fields of TurboConfig and ReadConfig"
