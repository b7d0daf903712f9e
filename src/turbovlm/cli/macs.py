"""`turbovlm macs`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any

from turbovlm.errors import TurboError

if TYPE_CHECKING:
    from turbovlm.profile.paper import PaperCost

_EPILOG = """\
examples:
  turbovlm macs timm:vit_base_patch16_384                 the encoder as it is
  turbovlm macs timm:vit_base_patch16_384 --r 35          and with 35 tokens merged in every block
  turbovlm macs torchvision:vit_h_14 --image-size 518 --flops 0.5
  turbovlm macs --paper                                   the Turbo paper's encoder costs beside ours

Counted as the encoder runs once on one image, on the meta device: matrix products, convolutions and attention.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    from turbovlm.cli.models import MODEL_HELP, add_amount_options

    parser = subparsers.add_parser(
        "macs",
        help="count the multiply-accumulates of an encoder, merged or not",
        description="Count the multiply-accumulates of a model's vision encoders for one image.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("--paper", action="store_true", help="the published costs beside ours")
    add_amount_options(parser, required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the counts, and write them as JSON if asked to."""
    if args.paper == (args.model is not None):
        raise TurboError("give a MODEL or --paper, one of the two")
    if args.paper:
        _check_paper(args)
    return _paper(args) if args.paper else _model(args)


def _model(args: argparse.Namespace) -> int:
    import torch
    from rich.table import Table

    import turbovlm
    from turbovlm.adapters import find_towers
    from turbovlm.cli.measuring import console_for_tables
    from turbovlm.cli.models import config_from, example_inputs, load_model, random_inputs, write_json

    config = config_from(args, 0)
    merging = config.r != 0
    model = load_model(args.model, args.image_size)
    if any(tower.layout.joint for tower in find_towers(model)):  # how long its sequence is depends on values
        model = load_model(args.model, args.image_size, device="cpu")
    table = Table(title=f"{args.model}, one image" + (f", {config.amount}" if merging else ""))
    for column in ("encoder", "tokens", "GMACs", *(("tokens left", "GMACs left", "ratio") if merging else ())):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    rows = []
    for tower in find_towers(model):
        inputs = random_inputs(tower, 1, torch.float32, "cpu") if tower.layout.joint else example_inputs(tower)
        before = turbovlm.profile.macs(tower.module, **inputs)
        with turbovlm.apply(tower.module, config) as handle:
            after = turbovlm.profile.macs(tower.module, **inputs)
            tokens = handle.schedules[0].tokens
        name = tower.name or type(tower.module).__name__
        rows.append({"encoder": name, "tokens": [tokens[0], tokens[-1]], "macs": before, "macs_merged": after})
        merged = (str(tokens[-1]), f"{after / 1e9:.2f}", f"{after / before:.1%}") if merging else ()
        table.add_row(name, str(tokens[0]), f"{before / 1e9:.2f}", *merged)
    console_for_tables().print(table)
    if args.json:
        write_json(args.json, {"model": args.model, "amount": config.amount, "encoders": rows})
    return 0


def _check_paper(args: argparse.Namespace) -> None:
    given = [name for name in ("r", "keep", "flops", "image_size") if getattr(args, name) is not None]
    given += ["min_tokens"] if args.min_tokens else []
    if given:
        raise TurboError(f"--{given[0].replace('_', '-')} has no place beside --paper, which counts as published")
    missing = [name for name in ("transformers", "timm", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        raise TurboError(f"--paper needs {', '.join(missing)}: pip install 'turbovlm[{','.join(missing)}]'")


def _paper(args: argparse.Namespace) -> int:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from turbovlm.cli.measuring import console_for_tables
    from turbovlm.cli.models import write_json
    from turbovlm.profile.paper import ROWS, paper_costs
    from turbovlm.profile.paper_models import COUNTS, WHOLE_ROWS, whole_costs

    rows = (*ROWS, *WHOLE_ROWS)
    progress = track(rows, description="counting", console=Console(stderr=True), transient=True)
    costs = [whole_costs(row) if row.encoder in COUNTS else paper_costs([row])[0] for row in progress]
    table = Table(title="Costs that Turbo (ECCV 2024) prints, and ours, in GMACs", box=SIMPLE_HEAD, padding=0)
    for column in ("table, model, data", "r", "printed", "ours", "off by", "ratio", "speed-up\nprinted"):
        table.add_column(column, justify="left" if column.startswith("table") else "right")
    for cost in costs:
        row = cost.row
        table.add_row(
            f"{row.table} {row.model} {row.dataset}",
            f"{row.r}{'*' if row.deduced else ''}",
            "" if row.printed_gmacs is None else f"{row.printed_gmacs:.1f}",
            f"{cost.gmacs:.2f}",
            "" if cost.difference is None else f"{cost.difference:+.2%}",
            f"{cost.full_gmacs / cost.gmacs:.2f}x" if row.r else "",
            "" if row.printed_speedup is None else f"{row.printed_speedup:.2f}x",
        )
    console = console_for_tables()
    console.print(table)
    console.print("r*: deduced, not printed. ratio: the full model's MACs over the merged one's.")
    console.print("Tables 1, 3 and 4 are of whole models, the others of image encoders.")
    for row in rows:
        if row.remark:
            console.print(f"Table {row.table}, {row.model}, {row.dataset}, r={row.r}: {row.remark}")
    if args.json:
        write_json(args.json, {"rows": [_record(cost) for cost in costs]})
    return 0


def _record(cost: PaperCost) -> dict[str, Any]:
    from turbovlm.profile.paper import ENCODERS

    return {
        **dataclasses.asdict(cost.row),
        "image_size": ENCODERS[cost.row.encoder][0] if cost.row.encoder in ENCODERS else None,
        "gmacs": cost.gmacs,
        "full_gmacs": cost.full_gmacs,
        "difference": cost.difference,
    }
