"""`turbovlm inspect`."""

from __future__ import annotations

import argparse
import dataclasses

DEFAULT_R = 16

_EPILOG = f"""\
examples:
  turbovlm inspect timm:vit_base_patch16_384 --r 35
  turbovlm inspect torchvision:vit_h_14 --image-size 518 --flops 0.6
  turbovlm inspect open_clip:ViT-B-16
  turbovlm inspect facebook/dinov2-base --keep 0.25       a transformers hub id (only its config is read)
  turbovlm inspect ./my-model --json plan.json            a folder with a config.json

Without an amount, r={DEFAULT_R}. A model that cannot be accelerated is said to be so, with the reason: exit code 2.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    from turbovlm.cli.models import MODEL_HELP, add_amount_options

    parser = subparsers.add_parser(
        "inspect",
        help="which blocks of a model would be accelerated, and what it would save",
        description="Say which blocks of a model would be accelerated and what it would save, without its weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_amount_options(parser, required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the schedule of every encoder found, and write it as JSON if asked to."""
    from rich.console import Console
    from rich.table import Table

    import turbovlm
    from turbovlm.adapters import find_towers
    from turbovlm.cli.models import config_from, load_model, write_json

    config = config_from(args, DEFAULT_R)
    model = load_model(args.model, args.image_size)
    towers = {tower.name: tower for tower in find_towers(model)}
    schedules = turbovlm.apply(model, config).schedules
    console = Console()
    for schedule in schedules:
        tower = towers[schedule.tower]
        before, after = sum(schedule.macs_before) / 1e9, sum(schedule.macs_after) / 1e9
        table = Table(title=f"{args.model}: {schedule.tower or 'the model'} ({tower.layout.family}), {schedule.asked}")
        table.add_column("block", overflow="fold")
        for column in ("tokens\nbefore", "tokens\nafter", "GMACs\nbefore", "GMACs\nafter"):
            table.add_column(column, justify="right", no_wrap=True)
        for i, block in enumerate(schedule.blocks):
            gmacs = (f"{schedule.macs_before[i] / 1e9:.3f}", f"{schedule.macs_after[i] / 1e9:.3f}")
            table.add_row(block, str(schedule.tokens[i]), str(schedule.tokens[i + 1]), *gmacs)
        table.add_section()
        table.add_row("all blocks", str(schedule.tokens[0]), str(schedule.tokens[-1]), f"{before:.3f}", f"{after:.3f}")
        console.print(table)
        console.print(
            f"{len(schedule.blocks)} blocks would be accelerated: {schedule.ratio:.1%} of the encoder's "
            f"multiply-accumulates left, at best {1 / schedule.ratio:.2f}x faster."
        )
        if tower.restore:
            console.print(f"Its output is restored to {schedule.tokens[0]} tokens, which the model's head needs.")
        if schedule.note:
            console.print(f"Note: {schedule.note}.")
    if args.json:
        write_json(args.json, {"model": args.model, "encoders": [dataclasses.asdict(s) for s in schedules]})
    return 0
