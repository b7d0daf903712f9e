"""Options of the commands that say how much is merged, and the settings that they mean."""

from __future__ import annotations

import argparse
from typing import Any

from turbovlm.errors import ConfigError


def add_amount_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add `--r`, `--keep`, `--flops`, `--min-tokens`, `--image-size` and `--json`."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--r", type=int, metavar="N", help="tokens merged per block on average")
    group.add_argument("--keep", type=float, metavar="SHARE", help="share of the tokens left after the last block")
    group.add_argument("--flops", type=float, metavar="SHARE", help="share of the encoder's multiply-accumulates left")
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N", help="blocks with fewer tokens do not merge")
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels per side, instead of the model's own")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")


OVER_STEPS = "over the steps of a pipeline START:SHARE with commas, as in 0:0.5,0.6:1"


def keep_from(text: str) -> Any:
    """Read `--keep`: a share, or over the steps pairs of a progress and the share that is kept from there on."""
    try:
        pairs = tuple(tuple(map(float, part.split(":"))) for part in text.split(","))
    except ValueError:
        pairs = ()
    if len(pairs) == 1 and len(pairs[0]) == 1:
        return pairs[0][0]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 0.5; {OVER_STEPS}")
    return pairs


def shown_keep(keep: Any) -> str:
    """What `keep_from` has read, as it is written on the command line."""
    if isinstance(keep, tuple):
        return ",".join(f"{start:g}:{share:g}" for start, share in keep)
    return f"{keep:g}"


def settings_from(args: argparse.Namespace, default_r: int | None) -> dict[str, Any]:
    """Return the settings that the options mean, as keywords of `turbovlm.apply`; `r=default_r` without an amount."""
    if args.image_size is not None and args.image_size < 1:
        raise ConfigError(f"--image-size {args.image_size}: must be an integer ≥ 1")
    given = {name: getattr(args, name) for name in ("r", "keep", "flops") if getattr(args, name) is not None}
    if not given and default_r is not None:
        given["r"] = default_r
    return given | ({"min_tokens": args.min_tokens} if given else {})
