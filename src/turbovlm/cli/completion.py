"""`turbovlm completion`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

from turbovlm.cli.help import Help
from turbovlm.errors import TurboError

SHELLS = ("bash", "zsh", "tcsh")
FILES, FOLDERS = ("FILE", "PATH", "IMAGES", "SOURCE"), ("FOLDER",)
"""Names of values that are completed as files and as folders; of models nothing is completed."""

_EPILOG = """\
for this shell alone:
  eval "$(turbovlm completion bash)"

for every new one:
  turbovlm completion bash > ~/.local/share/bash-completion/completions/turbovlm
  turbovlm completion zsh > ~/.zfunc/_turbovlm      with fpath+=~/.zfunc before compinit in ~/.zshrc
  turbovlm completion tcsh >> ~/.tcshrc

Completed are commands, options, choices such as --dtype's, files and folders.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "completion",
        help="a script that completes commands, options and files in your shell",
        description="Print a script by which a shell completes the commands and options of turbovlm.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script.

    Raises:
        TurboError: shtab, which makes it, is not installed.
    """
    from turbovlm.cli import whole_parser

    if importlib.util.find_spec("shtab") is None:
        raise TurboError("completion needs shtab: pip install 'turbovlm[cli]'")
    import shtab

    parser = whole_parser()
    for action in _actions(parser):
        kind = shtab.FILE if action.metavar in FILES else shtab.DIRECTORY if action.metavar in FOLDERS else None
        if kind is not None:
            action.complete = kind
    sys.stdout.write(shtab.complete(parser, args.shell) + "\n")
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """All arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)
        else:
            yield action
