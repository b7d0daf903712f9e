"""Options of the commands that say how much is merged, and the settings that they mean."""

from __future__ import annotations

import argparse
from typing import Any

from turbovlm.cli.generation import SHARES_HELP, shares
from turbovlm.cli.output import add_json_option
from turbovlm.errors import ConfigError


def add_amount_options(parser: argparse.ArgumentParser, required: bool, generation: bool = False) -> None:
    """Add `--r`, `--keep`, `--flops`, `--min-tokens`, `--image-size` and `--json`.

    Args:
        generation: whether the command takes denoisers too, with a share for each resolution, and sizes of two sides.
    """
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--r", type=int, metavar="N", help="tokens merged per block on average")
    left = "share of the tokens left after the last block"
    group.add_argument(
        "--keep",
        type=shares if generation else float,
        metavar="SHARE",
        help=left + (f", or that a denoiser's blocks read; {SHARES_HELP}" if generation else ""),
    )
    group.add_argument("--flops", type=float, metavar="SHARE", help="share of the encoder's multiply-accumulates left")
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N", help="blocks with fewer tokens do not merge")
    parser.add_argument(
        "--image-size",
        type=str if generation else int,
        metavar="N",
        help="pixels per side, instead of the model's own"
        + ("; of a denoiser also WIDTHxHEIGHT" if generation else ""),
    )
    add_json_option(parser)


def pixels_from(text: str | None) -> int | None:
    """Pixels per side of an encoder's image.

    Raises:
        ConfigError: it is no number.
    """
    if text is None:
        return None
    if not text.lstrip("-").isdecimal():
        raise ConfigError(f"--image-size {text}: must be one integer ≥ 1, the pixels per side, for an encoder")
    return int(text)


def settings_from(args: argparse.Namespace, default_r: int | None) -> dict[str, Any]:
    """Return the settings that the options mean, as keywords of `turbovlm.apply`; `r=default_r` without an amount."""
    if args.image_size is not None and args.image_size < 1:
        raise ConfigError(f"--image-size {args.image_size}: must be an integer ≥ 1")
    given = {name: getattr(args, name) for name in ("r", "keep", "flops") if getattr(args, name) is not None}
    if not given and default_r is not None:
        given["r"] = default_r
    return given | ({"min_tokens": args.min_tokens} if given else {})
