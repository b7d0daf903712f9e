"""`turbovlm bench`."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbovlm.errors import ConfigError, TurboError

if TYPE_CHECKING:
    from turbovlm.config import TurboConfig
    from turbovlm.profile import Comparison

DEFAULT_R = (8, 16)

_EPILOG = """\
examples:
  turbovlm bench timm:vit_base_patch16_384 --r 35            one setting, fp32, batch 8, random weights
  turbovlm bench timm:vit_base_patch16_384 --r 8 16 35 --dtype bfloat16 --plot bench.png
  turbovlm bench torchvision:vit_b_16 --flops 0.6 --compile  against the compiled model
  turbovlm bench zoo:saliency --pretrained --batch 1 --r 8   the real ViT-S/14 at 518 pixels
  turbovlm bench timm:vit_large_patch16_384 --r 16 --device cuda --dtype bfloat16 --batch 64

The model itself and each setting run in turn, A B … B A, in one process, after warm-up: process CPU time on the CPU,
CUDA events on a GPU. Efficiency is the speed-up over the ratio of multiply-accumulates: 1 where all that arithmetic
allows is gained. The weights do not change the time, so random ones will do.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    from turbovlm.cli.models import MODEL_HELP

    parser = subparsers.add_parser(
        "bench",
        help="time an encoder with and without Turbo on this machine",
        description="Time a model's vision encoders with and without Turbo, and measure their memory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP + " unless --pretrained; or zoo:saliency")
    group = parser.add_mutually_exclusive_group()
    default = " ".join(map(str, DEFAULT_R))
    group.add_argument(
        "--r", type=int, nargs="+", metavar="N", help=f"tokens merged in every block (default {default})"
    )
    group.add_argument("--keep", type=float, nargs="+", metavar="SHARE", help="share of the tokens left at the end")
    group.add_argument("--flops", type=float, nargs="+", metavar="SHARE", help="share of the encoder's MACs left")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images per forward (default 8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels per side, instead of the model's own")
    parser.add_argument("--compile", action="store_true", help="torch.compile every version, the model itself too")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, mps … (default: cuda where there is one)")
    parser.add_argument("--pretrained", action="store_true", help="load the model's weights instead of random ones")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed rounds (default 10)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="rounds before them (default 2)")
    parser.add_argument("--json", metavar="FILE", help="also write every sample as JSON")
    parser.add_argument("--plot", metavar="FILE", help="also draw the speed-ups: .png, .svg or .pdf")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    import torch
    from rich.console import Console

    from turbovlm.adapters import find_towers
    from turbovlm.cli.models import load_model, random_inputs, write_json

    configs = _configs(args)
    device, dtype = _device(args.device), getattr(torch, args.dtype)
    console = Console()
    model = load_model(args.model, args.image_size, device=device, pretrained=args.pretrained).to(dtype)
    comparisons: dict[str, Comparison] = {}
    for tower in find_towers(model):
        name = tower.name or type(tower.module).__name__
        inputs = random_inputs(tower, args.batch, dtype, device)
        comparisons[name] = _measured(tower.module, inputs, configs, args)
        console.print(f"{args.model}, {name}: {tower.tokens} tokens", highlight=False, markup=False)
        console.print(_table(comparisons[name]))
    if args.plot:
        from turbovlm.profile.plot import save_speedups

        save_speedups(comparisons, args.plot, title=args.model)
    if args.json:
        about = {
            "model": args.model,
            "pretrained": args.pretrained,
            "image_size": args.image_size,
            "versions": _versions(),
        }
        write_json(args.json, {**about, "encoders": {name: c.to_dict() for name, c in comparisons.items()}})
    return 0


def _configs(args: argparse.Namespace) -> list[TurboConfig]:
    from turbovlm.config import TurboConfig

    for name, least in (("batch", 1), ("image_size", 1), ("rounds", 1), ("warmup", 1 if args.compile else 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be an integer ≥ {least}")
    if args.plot:
        if importlib.util.find_spec("matplotlib") is None:
            raise TurboError("--plot needs matplotlib: pip install 'turbovlm[plot]'")
        if Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
            raise TurboError(f"--plot {args.plot}: must end in .png, .svg or .pdf")
    for name in ("r", "keep", "flops"):
        values = getattr(args, name)
        if values is not None:
            return [TurboConfig(**{name: value}) for value in dict.fromkeys(values)]
    return [TurboConfig(r=r) for r in DEFAULT_R]


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TurboError(f"--device {name}: PyTorch {torch.__version__} cannot use it: {reason}") from error
    if name == "meta":
        raise TurboError("--device meta: computes nothing that could be timed")
    return name


def _measured(module: Any, inputs: dict[str, Any], configs: list[TurboConfig], args: argparse.Namespace) -> Comparison:
    from rich.console import Console
    from rich.progress import Progress

    import turbovlm

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=(args.warmup + args.rounds) * (len(configs) + 1))
        comparison: Comparison = turbovlm.profile.compare(
            module,
            inputs,
            configs,
            rounds=args.rounds,
            warmup=args.warmup,
            compile=args.compile,
            progress=lambda done: progress.advance(task, done),
        )
    return comparison


def _table(comparison: Comparison) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from turbovlm.profile import Quartiles

    table = Table(box=SIMPLE_HEAD, caption=comparison.conditions, caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    columns = ("s/batch", "images\n/s", "GMACs", "speed-up", "quartiles", "MACs\nratio", "effi-\nciency", "peak\nMB")
    for column in columns:
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
        )
    return table


def _versions() -> dict[str, str]:
    import platform

    import torch

    from turbovlm import __version__

    return {"turbovlm": __version__, "torch": torch.__version__, "python": platform.python_version()}
