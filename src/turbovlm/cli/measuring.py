"""What commands share: checks of options before anything is built, a device, progress, versions."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbovlm.errors import ConfigError, TurboError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUANTIZATIONS = ("int8", "int8-dynamic", "nf4")
"""Those of `turbovlm.profile.quantize`, without importing it."""

MOST_STEPS, MOST_SEED = 1000, 2**63 - 1
"""Denoising steps that schedulers were trained with, and the largest seed that a generator takes."""

written: list[str] = []
"""Files that the command has written so far: what it says of itself where it is interrupted."""


def check_numbers(args: argparse.Namespace, *names: str) -> None:
    """Refuse counts that are none; `--warmup` may be 0 where nothing is compiled.

    Raises:
        ConfigError: naming the option.
    """
    for name in names:
        value, least = getattr(args, name), 0 if name == "warmup" and not args.compile else 1
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be an integer ≥ {least}")


def check_workers(count: int) -> None:
    """Refuse a number of processes that this machine would not bear.

    Raises:
        ConfigError: naming it and the most.
    """
    most = max(64, 4 * (os.cpu_count() or 1))
    if not 0 <= count <= most:
        raise ConfigError(f"--workers {count}: must be an integer from 0 to {most} on this machine")


def check_making(args: argparse.Namespace) -> None:
    """Refuse what no image can be made with: `--steps`, `--seed`, `--guidance-scale` and, where there is one,
    `--strength`.

    Raises:
        ConfigError: naming the option.
    """
    for name, least, most in (("steps", 1, MOST_STEPS), ("seed", 0, MOST_SEED)):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"--{name} {value}: must be an integer from {least} to {most}")
    if args.guidance_scale is not None and not math.isfinite(args.guidance_scale):
        raise ConfigError(f"--guidance-scale {args.guidance_scale}: must be a finite number")
    strength = getattr(args, "strength", None)
    if strength is not None and not 0 < strength <= 1:
        raise ConfigError(f"--strength {strength}: must be a share in (0, 1]")


def check_file(option: str, name: str | None, suffixes: Sequence[str] = ()) -> None:
    """Refuse a file that could not be written, before anything is built or measured.

    Args:
        option: that names the file, for the message.
        name: of the file; None where the option was not given.
        suffixes: that it may end in; any if empty.

    Raises:
        ConfigError: naming the option and what is wrong with the file.
    """
    if name is None:
        return
    path = Path(name)
    if suffixes and path.suffix not in suffixes:
        raise ConfigError(f"{option} {name}: must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ConfigError(f"{option} {name}: is a folder; give a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {name}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f"{option} {name}: may not be written")


def check_folder(option: str, name: str) -> None:
    """Refuse a folder that could not be made or written to, before anything is built or measured.

    Args:
        option: that names the folder, for the message.
        name: of the folder, which is made with those around it where it is not there.

    Raises:
        ConfigError: naming the option and what is wrong with the folder.
    """
    path = Path(name).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"{option} {name}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{option} {name}: nothing may be written to {there}")


def check_plot(name: str | None) -> None:
    """Refuse a plot that could not be drawn or written: `check_file` of `--plot`.

    Raises:
        TurboError: naming what is missing.
    """
    if name is not None and importlib.util.find_spec("matplotlib") is None:
        raise TurboError("--plot needs matplotlib: pip install 'turbovlm[plot]'")
    check_file("--plot", name, (".png", ".svg", ".pdf"))


def device_named(name: str | None) -> str:
    """A device to measure on: CUDA where there is one, unless another is named.

    Raises:
        TurboError: PyTorch cannot use it.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TurboError(f"--device {name}: PyTorch {torch.__version__} cannot use it: {reason}") from error
    if name == "meta":
        raise TurboError("--device meta: computes nothing that could be timed")
    return name


class Advance:
    """Moves a bar on: `advance(3)` by three."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def __call__(self, done: int = 1, what: str | None = None) -> None:
        """By so many; `what` is done now, if that has changed."""
        self._bar.update(self._task, advance=done, description=what)

    def to(self, total: int | None, done: int) -> None:
        """To `done` of `total`, which may become known on the way."""
        self._bar.update(self._task, total=total, completed=done)


@contextlib.contextmanager
def progress_bar(total: int | None, what: str = "measuring") -> Iterator[Advance]:
    """On standard error, if that is a terminal: how many of how many, how fast, and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):  # type: ignore[misc]
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.3g}/s" if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    shown = Console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        yield Advance(bar, bar.add_task(what, total=total))


def versions_used(*libraries: str) -> dict[str, str]:
    """Of turbovlm, PyTorch, Python and these libraries."""
    import importlib.metadata
    import platform

    import torch

    from turbovlm import __version__

    own = {"turbovlm": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return own | {name: importlib.metadata.version(name) for name in libraries}
