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


def settings_from(args: argparse.Namespace, default_r: int | None) -> dict[str, Any]:
    """Return the settings that the options mean, as keywords of `turbovlm.apply`; `r=default_r` without an amount."""
    if args.image_size is not None and args.image_size < 1:
        raise ConfigError(f"--image-size {args.image_size}: must be an integer ≥ 1")
    given = {name: getattr(args, name) for name in ("r", "keep", "flops") if getattr(args, name) is not None}
    if not given and default_r is not None:
        given["r"] = default_r
    return given | ({"min_tokens": args.min_tokens} if given else {})
