"""`turbovlm studio`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from turbovlm.cli.help import Help
from turbovlm.errors import ConfigError, TurboError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EPILOG = """\
examples:
  turbovlm studio                      then open http://127.0.0.1:7860 in a browser
  turbovlm studio --open               opens it for you
  turbovlm studio --model ./my-vit     a model of yours beside the built-in ones: a folder of transformers, with weights
  turbovlm studio --images ./holiday   methods compared, and settings calibrated, on a folder of images
  turbovlm studio --port 0             a free port; the address is printed

What you see there: which patches become one token, block by block; a token's R, A, E and size under the pointer; the
answer beside the unmerged model's; tokens, multiply-accumulates, time and drift. The address in the browser always
names what is shown, so that it can be kept or sent to somebody who runs the studio too.

The page is served to this machine alone and asks nothing of the network. Images of yours stay in this process: they
are held in memory and in a folder that is removed when it ends. Ctrl-C ends it.

It needs Gradio: pip install 'turbovlm-lab[studio]'
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "studio",
        help="see in the browser which tokens merge, what it saves, and what it costs",
        description="A page in the browser: drop an image, choose a model, move a slider, and see what merging does.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a model of yours: a folder of transformers; may be given several times",
    )
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder of images to compare and calibrate on; may be given several times",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to serve; others than this machine by 0.0.0.0")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="0 for a free one (default: %(default)s)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--threads", type=int, metavar="N", help="threads PyTorch computes with (default: its own)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C.

    Raises:
        TurboError: a setting or a folder is wrong, a package is missing, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise TurboError("the studio needs gradio: pip install 'turbovlm-lab[studio]'")
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: must be from 0, which takes a free one, to 65535")
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"--threads {args.threads}: must be an integer ≥ 1")
    folders = tuple(Path(folder).expanduser() for folder in args.model)
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model {folder}: must be a folder of transformers, with a config.json")
    images = tuple(Path(folder).expanduser() for folder in args.images)
    for folder in images:
        if not folder.is_dir():
            raise ConfigError(f"--images {folder}: must be a folder of images")
    if args.host not in LOOPBACK:
        print(
            f"turbovlm: --host {args.host}: whoever reaches this machine can use the page; nothing asks who they are",
            file=sys.stderr,
        )
    print("Loading the first model …", file=sys.stderr)
    import torch

    from turbovlm_lab.studio.app import Settings, serve

    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        serve(Settings(args.host, args.port, folders, args.open, images), _say)
    finally:
        torch.set_num_threads(threads)
    return 0


def _say(url: str) -> None:
    print(f"turbovlm studio: {url}   Ctrl-C ends it.", flush=True)
