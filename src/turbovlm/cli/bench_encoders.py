"""`turbovlm bench` of an encoder."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING, Any

from turbovlm.cli.measuring import (
    check_numbers,
    check_plot,
    console_for_tables,
    device_named,
    progress_bar,
    versions_used,
)
from turbovlm.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from turbovlm.config import TurboConfig
    from turbovlm.profile import Comparison
    from turbovlm.profile.compare import Prepare

DEFAULT_R = (8, 16)
DEFAULTS = {"batch": 8, "rounds": 10, "warmup": 2}


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    import torch

    from turbovlm.cli.models import load_model, random_inputs, write_json
    from turbovlm.encoder.towers import find_towers

    check_numbers(args, "batch", "rounds", "warmup")
    check_plot(args.plot)
    versions, size = _versions(args), _size(args.image_size)
    device, dtype = device_named(args.device), getattr(torch, args.dtype)
    console = console_for_tables()
    model = load_model(args.model, size, device=device, pretrained=args.pretrained).to(dtype)
    comparisons: dict[str, Comparison] = {}
    for tower in find_towers(model):
        name = tower.name or type(tower.module).__name__
        inputs = random_inputs(tower, args.batch or DEFAULTS["batch"], dtype, device)
        comparisons[name] = measured(tower.module, inputs, versions, args)
        console.print(f"{args.model}, {name}: {tower.tokens} tokens", highlight=False, markup=False)
        console.print(comparison_table(comparisons[name]))
    if args.plot:
        from turbovlm.profile.plot import save_speedups

        save_speedups(comparisons, args.plot, title=args.model)
    if args.json:
        about = {"model": args.model, "pretrained": args.pretrained, "image_size": size, "versions": versions_used()}
        write_json(args.json, {**about, "encoders": {name: c.to_dict() for name, c in comparisons.items()}})
    return 0


def measured(module: Any, inputs: dict[str, Any], configs: Any, args: argparse.Namespace) -> Comparison:
    """One module's comparison, with the rounds that were asked for and a progress bar."""
    import turbovlm

    rounds, warmup = (
        DEFAULTS[name] if getattr(args, name) is None else getattr(args, name) for name in ("rounds", "warmup")
    )
    with progress_bar((warmup + rounds) * (len(configs) + 1)) as progress:
        comparison: Comparison = turbovlm.profile.compare(
            module, inputs, configs, rounds=rounds, warmup=warmup, compile=args.compile, progress=progress
        )
    return comparison


def comparison_table(comparison: Comparison) -> Any:
    """A row per version."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from turbovlm.profile import Quartiles

    table = Table(box=SIMPLE_HEAD, caption=comparison.conditions, caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    columns = ("s/batch", "images\n/s", "GMACs", "speed-up", "quartiles", "MACs\nratio", "effi-\nciency", "peak\nMB")
    weighed = any(run.weight_bytes != comparison.baseline.weight_bytes for run in comparison.runs)
    for column in (*columns, *(["weights\nMB"] if weighed else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for run in comparison.runs:
        speedup = comparison.speedup(run.name)
        table.add_row(
            run.name,
            f"{Quartiles.of(run.seconds).median:.4g}",
            f"{comparison.images_per_second(run.name):.4g}",
            f"{run.macs / 1e9:.2f}",
            f"{speedup.median:.3f}x",
            f"{speedup.low:.3f}–{speedup.high:.3f}",
            f"{comparison.macs_ratio(run.name):.3f}x",
            f"{comparison.efficiency(run.name):.3f}",
            "" if run.peak_bytes is None else f"{run.peak_bytes / 1e6:.1f}",
            *([f"{run.weight_bytes / 1e6:.1f}"] if weighed else []),
        )
    return table


def _versions(args: argparse.Namespace) -> dict[str, TurboConfig | Prepare]:
    """What merges; then each way to quantise, alone and with each of what merges on top."""
    from turbovlm.profile.compare import named

    merging = named(_configs(args))
    found: dict[str, TurboConfig | Prepare] = {**merging}
    for kind in dict.fromkeys(args.quantize or ()):
        found[kind] = functools.partial(_become, kind=kind)
        found |= {f"{kind}, {name}": functools.partial(_become, kind=kind, config=c) for name, c in merging.items()}
    return found


def _become(model: nn.Module, kind: str, config: TurboConfig | None = None) -> None:
    import turbovlm

    turbovlm.profile.quantize(model, kind)
    if config is not None:
        turbovlm.apply(model, config)


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
