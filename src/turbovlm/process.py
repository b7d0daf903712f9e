"""What the process of the command `turbovlm` begins with, before PyTorch is imported, which takes seconds.

Nothing of this happens where a program imports turbovlm: its signals and its environment are its own.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import pairwise
from typing import Any

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as a shell has it: 128 and the signal's number."""
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}
"""PyTorch's C++ parts remark on their allocator and their profiler; both are read once, when PyTorch is loaded. A
variable that is set already stays."""
BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Where standard error is no terminal: bars of downloads and of loading, of all the libraries that use the hub."""
SAFE, UNSAFE = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Whichever library loads a checkpoint, PyTorch takes tensors of it alone and runs no code in it; who sets the other
variable has decided otherwise."""
NAMES = ("turbovlm", "turbovlm.exe", "turbovlm-script.py")


def is_command() -> bool:
    """Whether this process is the command, begun as `turbovlm` or as `python -m turbovlm`."""
    begun = sys.argv[0] if getattr(sys, "argv", None) else ""
    modules = [name for flag, name in pairwise(sys.orig_argv) if flag[:1] == "-" != flag[1:2] and flag[-1:] == "m"]
    as_module = begun == "-m" and modules[:1] == ["turbovlm"]
    return as_module or os.path.basename(begun) in NAMES


def begin() -> None:
    """Set what PyTorch reads, and end without a traceback at Ctrl-C from now on."""
    safe = {} if UNSAFE in os.environ else SAFE
    for name, value in (QUIET | safe if sys.stderr.isatty() else QUIET | safe | BARS).items():
        os.environ.setdefault(name, value)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, stop)


def stop(*_: Any) -> None:
    """End the process at once with one line: while modules are imported there is nothing to tidy up."""
    say_interrupted("nothing was written")
    os._exit(INTERRUPTED)


def stop_late(*_: Any) -> None:
    """The same once a command has begun, which may have written something."""
    say_interrupted("what was written by then is kept")
    os._exit(INTERRUPTED)


def say_interrupted(kept: str) -> None:
    """One line on standard error, with the cursor back that a progress bar may have hidden."""
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    os.write(2, f"{cursor}turbovlm: interrupted; {kept}\n".encode())
