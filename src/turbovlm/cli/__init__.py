"""The command `turbovlm`: each subcommand is a module with `register(subparsers)` and `run(args) -> int`.

A subcommand's parser may set the default `kept`, a function of the arguments: what is kept where Ctrl-C ends it, None
for what `measuring.written` has.

Other packages add subcommands by the entry point group `turbovlm.commands`: such a module.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from turbovlm import __version__, process
from turbovlm.cli import bench, calibrate, completion, doctor, embed, inspect, macs, measuring
from turbovlm.cli.ending import BROKEN_PIPE, drop_output, interruptible, reader_is_gone, reason_of
from turbovlm.cli.help import Help
from turbovlm.cli.output import kept_for_json
from turbovlm.cli.remarks import without_remarks
from turbovlm.errors import TurboError

COMMANDS = (inspect, bench, calibrate, embed, macs, doctor, completion)

LAB_COMMANDS = {
    "demo": "measure on photographs what merging saves and costs, and write a report",
    "evaluate": "what merging costs in quality, on a task",
    "reproduce": "the paper's tables and figures",
    "studio": "see in the browser which tokens merge, what it saves, and what it costs",
}
"""Subcommands that the package turbovlm-lab brings, named here to say so where it is not installed."""

_EPILOG = """\
examples:
  turbovlm demo                                   CLIP names photographs, merged and unmerged; writes report.html
  turbovlm studio                                 see in the browser which tokens merge, on your own images
  turbovlm inspect timm:vit_base_patch16_384      which blocks would be accelerated, and what it would save
  turbovlm bench timm:vit_base_patch16_384 --r 35  what it saves on this machine, in time and memory
  turbovlm calibrate zoo:saliency photos --flops 0.6    which settings keep most of it, on your images
  turbovlm embed photos --model zoo:pairs --r 8 --out embeddings    a folder of images to Parquet
  turbovlm evaluate saliency                      what it costs in quality, on a task
  turbovlm macs --paper                           published encoder costs beside ours
  turbovlm doctor                                 what is installed here, what of it works, and what to do about it
  eval "$(turbovlm completion bash)"              completes commands, options and files in this shell

demo, studio, evaluate, reproduce and models named zoo:… come with the package turbovlm-lab.

--json prints what a command has found as one JSON document, and nothing else, to standard output; --json FILE.json
writes it to a file, beside what is printed. turbovlm COMMAND --help explains each command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0; 2 for bad input, said in one message on standard error; 130 where Ctrl-C ended it, with what
        is kept in one message; 141 where the reader of standard output has gone.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = argparse.Namespace()
    measuring.written.clear()  # of a command before, in one process
    with interruptible() as interrupt, without_remarks():
        try:
            return _run(argv, args)
        except TurboError as error:
            if not interrupt.happened:
                print(f"turbovlm: {error}", file=sys.stderr)
                return 2
        except BrokenPipeError:
            if reader_is_gone():
                drop_output()
                return BROKEN_PIPE
            if not interrupt.happened:
                raise
        except KeyboardInterrupt:
            pass
        except Exception as error:
            reason = reason_of(error)
            if reason is not None:
                print(f"turbovlm: {reason}", file=sys.stderr)
                return 2
            if not interrupt.happened:  # else a library has turned the interruption into an error of its own
                raise
        process.say_interrupted(_kept(args))
        return process.INTERRUPTED


def _run(argv: Sequence[str], args: argparse.Namespace) -> int:
    """Parse into `args` and run the subcommand."""
    if argv and argv[0] in LAB_COMMANDS and argv[0] not in {point.name for point in _added()}:
        raise TurboError(f"{argv[0]} comes with the package turbovlm-lab: pip install turbovlm-lab")
    if importlib.util.find_spec("rich") is None:
        raise TurboError("the command line needs rich: pip install 'turbovlm[cli]'")
    parser = whole_parser()
    try:
        parser.parse_args(argv, args)
        with kept_for_json(args):
            code: int = args.run(args)
    finally:
        sys.stdout.flush()  # a closed pipe is seen here, and not when Python ends
    return code


def _kept(args: argparse.Namespace) -> str:
    """What an interrupted command leaves behind."""
    if hasattr(args, "kept"):
        kept: str | None = args.kept(args)
        if kept is not None:
            return kept
    return f"written: {', '.join(measuring.written)}" if measuring.written else "nothing was written"


def _added() -> list[EntryPoint]:
    """Commands of other packages, in one order."""
    return sorted(entry_points(group="turbovlm.commands"))


def whole_parser() -> argparse.ArgumentParser:
    """The parser of all commands, those of other packages included."""
    commands: list[ModuleType] = [*COMMANDS, *(point.load() for point in _added())]
    parser = argparse.ArgumentParser(
        prog="turbovlm",
        description="Faster vision transformers without retraining, by merging tokens.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"turbovlm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands:
        command.register(subparsers)
    return parser
