"""`turbovlm macs --paper`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any

from turbovlm.cli import macs
from turbovlm.cli.measuring import progress_bar
from turbovlm.cli.output import check_json, console, print_table, write_json
from turbovlm.errors import TurboError

if TYPE_CHECKING:
    from turbovlm_lab.costs.paper import PaperCost


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Answer `--paper` of the command that is there already."""
    subparsers.choices["macs"].set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the paper's costs beside ours for `--paper` alone; anything else is the command's own."""
    if not args.paper or args.model is not None:
        return macs.run(args)
    _check_paper(args)
    check_json(args)
    return _paper(args)


def _check_paper(args: argparse.Namespace) -> None:
    given = [name for name in ("r", "keep", "flops", "image_size") if getattr(args, name) is not None]
    given += ["min_tokens"] if args.min_tokens else []
    if given:
        raise TurboError(f"--{given[0].replace('_', '-')} has no place beside --paper, which counts as published")
    missing = [name for name in ("transformers", "timm", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        raise TurboError(f"--paper needs {', '.join(missing)}: pip install 'turbovlm[{','.join(missing)}]'")


def _paper(args: argparse.Namespace) -> int:
    from turbovlm_lab.costs.models import COUNTS, WHOLE_ROWS, whole_costs
    from turbovlm_lab.costs.paper import ROWS, paper_costs

    rows = (*ROWS, *WHOLE_ROWS)
    costs = []
    with progress_bar(len(rows), "counting") as advance:
        for row in rows:
            costs.append(whole_costs(row) if row.encoder in COUNTS else paper_costs([row])[0])
            advance()
    header = ("table, model, data", "r", "printed", "ours", "off by", "ratio", "speed-up printed")
    out = console()
    print_table(
        out, "Costs that Turbo (ECCV 2024) prints, and ours, in GMACs", header, [_cells(cost) for cost in costs]
    )
    out.print("r*: deduced, not printed. ratio: the full model's MACs over the merged one's.")
    out.print("Tables 1, 3 and 4 are of whole models, the others of image encoders.")
    for row in rows:
        if row.remark:
            out.print(f"Table {row.table}, {row.model}, {row.dataset}, r={row.r}: {row.remark}")
    if args.json:
        write_json(args.json, {"rows": [_record(cost) for cost in costs]})
    return 0


def _cells(cost: PaperCost) -> tuple[str, ...]:
    row = cost.row
    return (
        f"{row.table} {row.model} {row.dataset}",
        f"{row.r}{'*' if row.deduced else ''}",
        "" if row.printed_gmacs is None else f"{row.printed_gmacs:.1f}",
        f"{cost.gmacs:.2f}",
        "" if cost.difference is None else f"{cost.difference:+.2%}",
        f"{cost.full_gmacs / cost.gmacs:.2f}x" if row.r else "",
        "" if row.printed_speedup is None else f"{row.printed_speedup:.2f}x",
    )


def _record(cost: PaperCost) -> dict[str, Any]:
    from turbovlm_lab.costs.paper import ENCODERS

    return {
        **dataclasses.asdict(cost.row),
        "image_size": ENCODERS[cost.row.encoder][0] if cost.row.encoder in ENCODERS else None,
        "gmacs": cost.gmacs,
        "full_gmacs": cost.full_gmacs,
        "difference": cost.difference,
    }
