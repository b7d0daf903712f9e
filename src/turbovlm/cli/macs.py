"""`turbovlm macs`."""

from __future__ import annotations

import argparse

from turbovlm.cli.help import Help
from turbovlm.errors import TurboError

_EPILOG = """\
examples:
  turbovlm macs timm:vit_base_patch16_384                 the encoder as it is
  turbovlm macs timm:vit_base_patch16_384 --r 35          and with 35 tokens merged per block on average
  turbovlm macs torchvision:vit_h_14 --image-size 518 --flops 0.5
  turbovlm macs --paper                                   the Turbo paper's costs beside ours (turbovlm-lab)

Counted as the encoder runs once on one image, on the meta device: matrix products, convolutions and attention.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    from turbovlm.cli.amounts import add_amount_options
    from turbovlm.loading.models import MODEL_HELP

    parser = subparsers.add_parser(
        "macs",
        help="count the multiply-accumulates of an encoder, merged or not",
        description="Count the multiply-accumulates of a model's vision encoders for one image.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("--paper", action="store_true", help="the published costs beside ours (turbovlm-lab)")
    add_amount_options(parser, required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the counts, and write them as JSON if asked to."""
    if args.paper == (args.model is not None):
        raise TurboError("give a MODEL or --paper, one of the two")
    if args.paper:
        raise TurboError("--paper comes with the package turbovlm-lab: pip install turbovlm-lab")
    import torch

    import turbovlm
    from turbovlm.cli.amounts import settings_from
    from turbovlm.cli.output import check_json, console, print_table, write_json
    from turbovlm.encoder.towers import find_towers
    from turbovlm.loading import ModelSpec
    from turbovlm.loading.models import check_runs, load_model

    check_json(args)
    config = turbovlm.TurboConfig(**settings_from(args, 0))
    merging = config.r != 0
    model = load_model(ModelSpec(args.model, "meta"), args.image_size)
    packed = next((tower for tower in find_towers(model) if tower.layout.packed), None)
    if packed is not None:
        raise TurboError(
            f"macs: {packed.title} ({packed.layout.family}) runs images as one packed sequence, whose segments are "
            "read off their sizes as it runs: turbovlm inspect counts its blocks by their shapes"
        )
    if any(tower.layout.joint for tower in find_towers(model)):  # how long its sequence is depends on values
        model = load_model(ModelSpec(args.model), args.image_size)
    check_runs(args.model, model, next(model.parameters()).device.type)
    header = ("encoder", "tokens", "GMACs", *(("tokens left", "GMACs left", "ratio") if merging else ()))
    rows, cells = [], []
    for tower in find_towers(model):
        inputs = tower.random_inputs(1, torch.float32, "cpu" if tower.layout.joint else "meta")
        before = turbovlm.profile.macs(tower.module, **inputs)
        with turbovlm.apply(tower.module, config) as handle:
            after = turbovlm.profile.macs(tower.module, **inputs)
            tokens = handle.schedules[0].tokens
        name = tower.name or type(tower.module).__name__
        rows.append({"encoder": name, "tokens": [tokens[0], tokens[-1]], "macs": before, "macs_merged": after})
        merged = (str(tokens[-1]), f"{after / 1e9:.2f}", f"{after / before:.1%}") if merging else ()
        cells.append((name, str(tokens[0]), f"{before / 1e9:.2f}", *merged))
    print_table(console(), f"{args.model}, one image" + (f", {config.amount}" if merging else ""), header, cells)
    if args.json:
        write_json(args.json, {"model": args.model, "amount": config.amount, "encoders": rows})
    return 0
