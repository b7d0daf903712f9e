"""How a command ends when something from outside ends it: Ctrl-C, a closed pipe, a full disk, too little memory."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from turbovlm import process

BROKEN_PIPE = 141
"""Exit code where the reader of standard output has gone, as a shell has it."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed: libraries may turn the exception that it raises into one of their own."""

    happened: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Raise KeyboardInterrupt at the first Ctrl-C; end at once at the second. Handlers of a caller's own stay."""
    interrupt, own, before = Interrupt(), os.getpid(), signal.getsignal(signal.SIGINT)
    ours = (signal.default_int_handler, process.stop, process.stop_late)
    if threading.current_thread() is not threading.main_thread() or before not in ours:
        yield interrupt
        return

    def handle(*_: Any) -> None:
        if os.getpid() != own:  # a copy of this process that reads images: its parent ends it
            return
        if interrupt.happened:
            process.stop_late()
        interrupt.happened = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, process.stop_late if before is process.stop else before)


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as behind `| head -1`; else a broken pipe is another one."""
    try:
        pipes = select.poll()
        pipes.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in pipes.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on Windows, no file in tests
        return False


def drop_output() -> None:
    """Let what is still to be printed vanish, so that Python does not complain of it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reason_of(error: Exception) -> str | None:
    """What the machine has not enough of, where that is what an error says; None for all others."""
    import torch

    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error.filename or 'the output'}: {error.strerror}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return "not enough memory for this: take a smaller --batch, --image-size or model"
    return None
