"""Options of the commands that say how much is merged, and the settings that they mean."""

from __future__ import annotations

import argparse

from turbovlm.config import TurboConfig
from turbovlm.errors import ConfigError


def add_amount_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add `--r`, `--keep`, `--flops`, `--min-tokens`, `--image-size` and `--json`."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--r", type=int, metavar="N", help="tokens merged in every block")
    group.add_argument("--keep", type=float, metavar="SHARE", help="share of the tokens left after the last block")
    group.add_argument("--flops", type=float, metavar="SHARE", help="share of the encoder's multiply-accumulates left")
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N", help="blocks with fewer tokens do not merge")
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels per side, instead of the model's own")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")


def config_from(args: argparse.Namespace, default_r: int | None) -> TurboConfig:
    """Make the settings that the options mean; `r=default_r` where no amount was given."""
    if args.image_size is not None and args.image_size < 1:
        raise ConfigError(f"--image-size {args.image_size}: must be an integer ≥ 1")
    given = {name: getattr(args, name) for name in ("r", "keep", "flops") if getattr(args, name) is not None}
    visual_keep = getattr(args, "visual_keep", None)
    return TurboConfig(**(given or {"r": default_r}), min_tokens=args.min_tokens, visual_keep=visual_keep)
