"""The command `turbovlm`: each subcommand is a module with `register(subparsers)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from turbovlm import __version__
from turbovlm.cli import bench, calibrate, demo, evaluate, inspect, macs, reproduce
from turbovlm.errors import TurboError

COMMANDS = (demo, inspect, bench, calibrate, evaluate, reproduce, macs)

_EPILOG = """\
examples:
  turbovlm demo                                   measure a pretrained ViT on photographs, write report.html
  turbovlm inspect timm:vit_base_patch16_384      which blocks would be accelerated, and what it would save
  turbovlm bench timm:vit_base_patch16_384 --r 35 what it saves on this machine, in time and memory
  turbovlm calibrate zoo:saliency photos --flops 0.6    which settings keep most of it, on your pictures
  turbovlm evaluate saliency                      what it costs in quality, on a task
  turbovlm macs --paper                           published encoder costs beside ours

turbovlm COMMAND --help explains each command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0, or 2 for bad input, said in one message on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="turbovlm",
        description="Faster vision transformers without retraining, by merging tokens.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"turbovlm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(subparsers)
    args = parser.parse_args(argv)
    try:
        if importlib.util.find_spec("rich") is None:
            raise TurboError("the command line needs rich: pip install 'turbovlm[cli]'")
        code: int = args.run(args)
    except TurboError as error:
        print(f"turbovlm: {error}", file=sys.stderr)
        return 2
    return code
