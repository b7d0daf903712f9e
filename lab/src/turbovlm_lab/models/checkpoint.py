"""Reading checkpoints whose authors named their tensors in their own way."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from turbovlm.errors import TurboError

Renames = Sequence[tuple[str, str]]
"""Pairs of a regular expression, to be matched at a name's beginning, and what replaces it; the first match counts."""


def read_checkpoint(path: str | Path, wanted: str = ".*") -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, a state dict or one under `"model"`, whose whole names match `wanted`.

    Raises:
        TurboError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise TurboError(f"{path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError) as error:
        raise TurboError(f"{path}: not a file of tensors that torch.save has written: {error}") from error
    stored = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(stored, dict):
        raise TurboError(f"{path}: a state dict expected, {type(stored).__name__} found")
    return {name: value for name, value in stored.items() if re.fullmatch(wanted, name)}


def load_checkpoint(model: nn.Module, stored: dict[str, Tensor], renames: Renames) -> None:
    """Load all tensors of `stored` into `model`, and nothing less than all of its own.

    Args:
        renames: how the model names what `stored` names otherwise.

    Raises:
        TurboError: tensors are missing, unknown, or of another shape.
    """
    found = rename(stored, renames)
    wanted = model.state_dict()
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    shapes = sorted(name for name in set(wanted) & set(found) if wanted[name].shape != found[name].shape)
    problems = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
    said = [f"{len(names)} {what}, such as {names[0]}" for what, names in problems if names]
    if said:
        raise TurboError(f"the checkpoint does not fit {type(model).__name__}: tensors {'; '.join(said)}")
    model.load_state_dict(found)


def rename(stored: dict[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    """The tensors of `stored` under their new names."""
    return {_renamed(name, renames): value for name, value in stored.items()}


def _renamed(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        changed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return changed
    return name
