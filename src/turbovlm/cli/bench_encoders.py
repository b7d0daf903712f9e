"""`turbovlm bench` of an encoder."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING, Any

from turbovlm.cli.measuring import check_numbers, device_named, progress_bar
from turbovlm.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from turbovlm.config import TurboConfig
    from turbovlm.loading import ModelSpec
    from turbovlm.profile import Comparison
    from turbovlm.profile.compare import Prepare

DEFAULT_R = (8, 16)
DEFAULTS = {"batch": 8, "rounds": 10, "warmup": 2}


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    import torch

    from turbovlm.cli.bench import Results
    from turbovlm.encoder.towers import find_towers
    from turbovlm.loading import ModelSpec
    from turbovlm.loading.models import check_runs, load_model

    check_numbers(args, "batch", "rounds", "warmup")
    versions, size = _versions(args), _size(args.image_size)
    spec = ModelSpec(args.model, device_named(args.device), getattr(torch, args.dtype))
    _check_fits(spec, size, versions)
    model = load_model(spec, size, pretrained=args.pretrained)
    check_runs(args.model, model, spec.device, spec.dtype)
    results = Results(args, "encoders", {"image_size": size})
    for tower in find_towers(model):
        name = tower.name or type(tower.module).__name__
        inputs = tower.random_inputs(args.batch or DEFAULTS["batch"], spec.dtype, spec.device)
        results.add(name, compare_shown(tower.module, inputs, versions, args), f"{name}: {tower.tokens} tokens")
    results.write()
    return 0


def _check_fits(spec: ModelSpec, size: int | None, versions: dict[str, TurboConfig | Prepare]) -> None:
    """Refuse what the model cannot do before it is built: the meta device takes no memory."""
    import turbovlm
    from turbovlm.encoder.towers import find_towers
    from turbovlm.loading.models import load_outline
    from turbovlm.settings import Settings

    outline = load_outline(spec, size)
    for tower in [] if outline is None else find_towers(outline):
        for config in versions.values():
            if isinstance(config, Settings):
                turbovlm.apply(tower.module, config).remove()


def compare_shown(module: Any, inputs: dict[str, Any], configs: Any, args: argparse.Namespace) -> Comparison:
    """Compare one module with the rounds that were asked for, behind a progress bar."""
    import turbovlm

    rounds, warmup = (
        DEFAULTS[name] if getattr(args, name) is None else getattr(args, name) for name in ("rounds", "warmup")
    )
    with progress_bar((warmup + rounds) * (len(configs) + 1)) as progress:
        comparison: Comparison = turbovlm.profile.compare(
            module, inputs, configs, rounds=rounds, warmup=warmup, compile=args.compile, progress=progress
        )
    return comparison


def _versions(args: argparse.Namespace) -> dict[str, TurboConfig | Prepare]:
    """What merges; then each way to quantise, alone and with each of what merges on top."""
    from turbovlm.cli.generation import saved_settings
    from turbovlm.config import TurboConfig
    from turbovlm.profile.compare import named

    saved: Any = saved_settings(args.settings or (), TurboConfig)
    merging = (named(_configs(args)) if _asked(args) or not saved else {}) | saved
    versions: dict[str, TurboConfig | Prepare] = {**merging}
    for kind in dict.fromkeys(args.quantize or ()):
        versions[kind] = functools.partial(_quantize_and_apply, kind=kind)
        for name, config in merging.items():
            versions[f"{kind}, {name}"] = functools.partial(_quantize_and_apply, kind=kind, config=config)
    return versions


def _quantize_and_apply(model: nn.Module, kind: str, config: TurboConfig | None = None) -> None:
    import turbovlm

    turbovlm.profile.quantize(model, kind)
    if config is not None:
        turbovlm.apply(model, config)


def _asked(args: argparse.Namespace) -> bool:
    """Whether an amount was given."""
    return any(getattr(args, name) is not None for name in ("r", "keep", "flops"))


def _configs(args: argparse.Namespace) -> list[TurboConfig]:
    from turbovlm.config import TurboConfig

    for name in ("r", "keep", "flops"):
        values = getattr(args, name)
        if values is not None:
            return [TurboConfig(**{name: value}) for value in dict.fromkeys(values)]
    return [TurboConfig(r=r) for r in DEFAULT_R]


def _size(given: list[str] | None) -> int | None:
    if given is None:
        return None
    if len(given) > 1 or not given[0].isdecimal() or int(given[0]) < 1:
        raise ConfigError(
            f"--image-size {' '.join(given)}: must be one integer ≥ 1, the pixels per side, for an encoder"
        )
    return int(given[0])
