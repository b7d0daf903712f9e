"""What the forward of a block needs to know of its modules, looked up again only where something of it has changed.

A block has some twenty modules and values to look up and to check, and every forward asks. So it is kept where each was
found, and the next forward sees whether the same still lies there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from turbovlm.encoder.layout import Layout, Parts, fetch
from turbovlm.encoder.passed import HOOKS, Passed, through_module
from turbovlm.patching import BELOW_HOOK

KEPT = ("_modules", "_parameters", "_buffers")
"""Where a module keeps what is no plain attribute."""

Place = tuple[Mapping[str, Any], str, Any]
"""A dictionary, a key, and what lay there; None for nothing."""


@dataclass(frozen=True)
class _Known:
    """The answers for one block, and what they hang on: things in their places, classes of modules, no hooks."""

    block: nn.Module
    parts: Parts
    through: bool
    places: tuple[Place, ...]
    classes: tuple[tuple[nn.Module, type], ...]
    hooks: tuple[Mapping[int, Any], ...]

    def holds(self, block: nn.Module) -> bool:
        """Whether everything is as it was."""
        if block is not self.block or any(self.hooks):
            return False
        for where, name, value in self.places:
            if where.get(name) is not value:
                return False
        return all(type(module) is cls for module, cls in self.classes)


class Lookups:
    """The answers for the blocks of one encoder. Neither copied nor pickled: a copy looks anew."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def of(self, layout: Layout, name: str, index: int, block: nn.Module, passed: Passed) -> tuple[Parts, bool]:
        """The parts of the `index`-th block, and whether attention has to be called as a module.

        Raises:
            StateError: see `through_module`.
        """
        if torch.compiler.is_compiling():
            through = through_module(layout, name, block, passed)
            return layout.parts(block), through
        known = self._known.get(index)
        if known is not None and known.holds(block):
            return known.parts, known.through
        through, parts = through_module(layout, name, block, passed), layout.parts(block)
        known = _remembered(layout, block, passed, parts, through)
        if known is not None:
            self._known[index] = known
        return parts, through

    def __deepcopy__(self, memo: dict[int, object]) -> Lookups:
        return Lookups()

    def __reduce__(self) -> tuple[type[Lookups], tuple[()]]:
        return Lookups, ()


def _remembered(layout: Layout, block: nn.Module, passed: Passed, parts: Parts, through: bool) -> _Known | None:
    """None where a value is computed anew whenever it is asked for, as by a property, and while there are hooks."""
    modules = [fetch(block, path) for path in passed]
    hooks = tuple(module.__dict__[kind] for module in modules for kind in HOOKS)
    if any(hooks):
        return None
    places: list[Place] = [(block.__dict__, "training", block.training)]
    for path in (*layout.fetched_paths, *passed):
        found = _places(block, path)
        if found is None:
            return None
        places += found
    for module in modules:
        places += [(module.__dict__, name, module.__dict__.get(name)) for name in (*HOOKS, "forward", BELOW_HOOK)]
    return _Known(
        block=block,
        parts=parts,
        through=through,
        places=tuple(places),
        classes=tuple((module, type(module)) for module in modules),
        hooks=hooks,
    )


def _places(root: Any, path: str) -> list[Place] | None:
    """Where each step of a dotted path lies."""
    places: list[Place] = []
    for name in path.split("."):
        own = root.__dict__
        where = next((each for each in (own, *map(own.get, KEPT)) if each and name in each), None)
        value = getattr(root, name)
        if where is None or where[name] is not value:
            return None
        places.append((where, name, value))
        root = value
    return places
