"""Reading checkpoints whose authors named their tensors in their own way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.errors import TurboError

Renames = Sequence[tuple[str, str]]
"""Pairs of a regular expression, to be matched at a name's beginning, and what replaces it; the first match counts."""


def load_checkpoint(model: nn.Module, path: str | Path, renames: Renames, ignored: str) -> None:
    """Load the tensors of a file into `model`, every one of them.

    Args:
        path: a file of `torch.save`: a state dict, or one under `"model"`.
        renames: how the model names what the file names otherwise.
        ignored: a regular expression for names in the file that the model has no use for.

    Raises:
        TurboError: there is no such file; tensors are missing, left over, or of another shape.
    """
    if not Path(path).is_file():
        raise TurboError(f"{path}: there is no such file")
    content = torch.load(path, map_location="cpu", weights_only=True)
    stored: dict[str, Tensor] = content.get("model", content)
    found = {_renamed(name, renames): value for name, value in stored.items() if not re.fullmatch(ignored, name)}
    wanted = model.state_dict()
    missing, left_over = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    shapes = [name for name in set(wanted) & set(found) if wanted[name].shape != found[name].shape]
    problems = [("missing", missing), ("unknown", left_over), ("of another shape", sorted(shapes))]
    said = [f"{len(names)} {what}, such as {names[0]}" for what, names in problems if names]
    if said:
        raise TurboError(f"{path} does not fit {type(model).__name__}: tensors {'; '.join(said)}")
    model.load_state_dict(found)


def _renamed(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        changed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return changed
    return name
