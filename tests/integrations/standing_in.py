"""Small packages in place of those that integrations are loaded by, and integrations loaded as these load them."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from turbovlm.patching import Patch

ROOT = Path(__file__).parents[2]
STANDINS = Path(__file__).parent / "standins"


@contextmanager
def standins(*packages):
    """Have those packages imported from `standins`, whichever are installed or were imported before."""
    hidden = _taken_out(packages)
    sys.path.insert(0, str(STANDINS))
    try:
        yield
    finally:
        sys.path.remove(str(STANDINS))
        _taken_out(packages)
        sys.modules.update(hidden)


def _taken_out(packages):
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in packages}


def loaded(path, name):
    """A file, or a folder with an `__init__.py`, as a module of that name."""
    folder = ROOT / path if (ROOT / path).is_dir() else None
    file = folder / "__init__.py" if folder else ROOT / path
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[str(folder)] if folder else None
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def left_on(model: torch.nn.Module) -> list[str]:
    """Attributes of a model's modules that turbovlm has put there."""
    named = model.named_modules()
    return [
        f"{path}.{name}" for path, module in named for name, each in vars(module).items() if isinstance(each, Patch)
    ]
