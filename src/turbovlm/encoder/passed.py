"""Modules of a block that its two halves never call, and what hangs on them.

The halves call projections, norms, MLP and the like, so hooks and adapters on those work as ever. Around them is
attention, whose own forward would build what the halves compute otherwise. Hooks on attention itself run all the same:
the first half then goes through the module, see `turbovlm.encoder.attention`. Whatever else hangs on a module that is
passed by is refused by name, when turbovlm is applied or at the first forward after it came.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from turbovlm.encoder.layout import Layout, fetch
from turbovlm.errors import StateError, UnsupportedModelError
from turbovlm.patching import Patch, slot_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CAPTURE = "transformers.utils.output_capturing"
"""Where the hooks come from by which `transformers` collects attention maps; they stay once states were asked for, and
do nothing until maps are, which is refused by itself."""
ADAPTED = "base_layer"
"""Attribute of peft's layers, which stand in place of the one that they adapt."""

Passed = Mapping[str, type]
"""Paths from the block, and the class that each module had when turbovlm was applied."""


def passed_by(layout: Layout, block: nn.Module) -> Passed:
    """The modules of `block` that the halves of a resolved layout never call."""
    called = tuple(path.removesuffix("?") for path in layout.called_paths)
    return {
        path: type(module)
        for path, module in block.named_modules()
        if path and not any(path == each or path.startswith(f"{each}.") for each in called)
    }


@dataclass(frozen=True)
class Calls:
    """What a block's own forward was seen to do with the modules that the halves pass by.

    Attributes:
        called: paths of those that it called.
        pair: whether attention returns its tokens and its map, rather than its tokens alone.
    """

    called: frozenset[str]
    pair: bool


@contextlib.contextmanager
def watch_calls(block: nn.Module, passed: Passed, attention: str | None) -> Iterator[list[Calls]]:
    """Watch the modules that are passed by while a block's own forward runs; at the end, the list has what was seen."""
    outputs: dict[str, Any] = {}
    found: list[Calls] = []

    def note(path: str) -> Any:
        return lambda module, args, output: outputs.__setitem__(path, output)

    hooks = [fetch(block, path).register_forward_hook(note(path)) for path in passed]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    found.append(Calls(frozenset(outputs), isinstance(outputs.get(attention or ""), tuple)))


def of_effect(passed: Passed, block: nn.Module, calls: Calls | None) -> Passed:
    """Those of the modules whose hooks have an effect without turbovlm: all where nothing could be watched."""
    if calls is None:
        return passed
    return {path: cls for path, cls in passed.items() if path in calls.called or _fuses(block, path) is not None}


def _fuses(block: nn.Module, path: str) -> bool | None:
    """Whether timm's attention around a module is fused, which does not call it; None where it is no such module."""
    around = path.rpartition(".")[0]
    fused: bool | None = getattr(fetch(block, around), "fused_attn", None) if around else None
    return fused


def check_adapters(name: str, block: nn.Module, passed: Passed) -> None:
    """See that no module of a block that is passed by is an adapter's, whose effect would be lost.

    Raises:
        UnsupportedModelError: one is.
    """
    for path in passed:
        module = fetch(block, path)
        if hasattr(module, ADAPTED):
            raise UnsupportedModelError(
                f"{name}.{path} is a {type(module).__name__}, whose adapter an accelerated block would not see, as it "
                f"reads the weights of attention itself: adapt its MLP instead, or merge the adapter first "
                "(merge_and_unload)"
            )


def through_module(layout: Layout, name: str, block: nn.Module, passed: Passed) -> bool:
    """Whether attention has to be called as a module, so that the hooks on it run.

    Raises:
        StateError: hooks, a forward or another class on a module that is passed by, which would have no effect.
    """
    through = False
    for path, cls in passed.items():
        module: Any = fetch(block, path)
        if type(module) is not cls:
            raise StateError(
                f"{name}.{path} was a {_path(cls)} when turbovlm was applied and is a {_path(type(module))} now, which "
                "an accelerated block does not call: handle.remove(), then apply again"
            )
        what = _hanging(module)
        if what is None or _fuses(block, path):
            continue
        if path != layout.attention:
            maps = ", and never builds its attention map" if "drop" in path else ""
            instead = "" if layout.attention is None else f", put it on {name}.{layout.attention},"
            raise StateError(
                f"{name}.{path} has {what}, but an accelerated block does not call it{maps}: take it off{instead} or "
                "call handle.remove()"
            )
        through = True
    return through


def has_hooks(module: nn.Module, kind: str) -> bool:
    """Whether a module has hooks of somebody's, in its dictionary `kind`."""
    hooks: Mapping[int, Any] = module.__dict__[kind]
    return bool(hooks) and any(getattr(hook, "__module__", None) != CAPTURE for hook in hooks.values())


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _hanging(module: Any) -> str | None:
    """What would have no effect if a module were not called; None for a plain one."""
    if any(has_hooks(module, kind) for kind in HOOKS):
        return "hooks"
    forward = module.__dict__.get(slot_of(module, "forward"))
    if forward is None or isinstance(forward, Patch) or getattr(forward, "__func__", None) is type(module).forward:
        return None
    return "a forward of its own"
