"""Families that turbovlm knows: its own, and those that other packages register.

A family is one entry of data: an encoder's `Layout`, a vision-language model's `VlmFamily`, a `Denoiser`.
Models are recognised by the dotted path of a class or of one of its base classes, so no library is imported for it.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch.nn as nn

from turbovlm.errors import ConfigError

ENTRY_POINTS = "turbovlm.families"
"""Group of entry points by which other packages bring families: each names a module with a tuple `FAMILIES`."""


class Family(Protocol):
    """What an entry has, whatever it describes."""

    @property
    def kind(self) -> str:
        """`"encoder"`, `"vlm"` or `"denoiser"`."""

    @property
    def family(self) -> str:
        """Name for people."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Dotted paths of the classes by which a model is recognised."""


OWN = {
    "encoder": ("turbovlm.encoder.families", ()),
    "vlm": ("turbovlm.vlm.families", ("transformers.",)),
    "denoiser": ("turbovlm.diffusion.families", ("diffusers.", "comfy.ldm.", "backend.nn.")),
}
"""Where turbovlm's own families of each kind are, and what the paths of all their classes begin with: they are imported
when such a class is seen."""

_FAMILIES: dict[str, dict[str, Family]] = {kind: {} for kind in OWN}
_LOADED: set[str] = set()


def register(*entries: Any) -> None:
    """Make families known, so that `turbovlm.apply` finds them.

    Args:
        entries: `turbovlm.encoder.Layout`, `turbovlm.vlm.VlmFamily` or `turbovlm.diffusion.Denoiser`.

    Raises:
        ConfigError: an entry is none of these, or its classes are registered already. Nothing is registered then.
    """
    new: dict[tuple[str, str], Family] = {}
    for entry in entries:
        if getattr(entry, "kind", None) not in OWN:
            raise ConfigError(f"{entry!r}: must be an encoder's Layout, a VlmFamily or a Denoiser")
        _load_own(entry.kind)
        for path in entry.classes:
            known = _FAMILIES[entry.kind].get(path) or new.get((entry.kind, path))
            if known is not None:
                raise ConfigError(
                    f"{path} is registered already, as {known.family}; turbovlm.registry.unregister forgets an entry"
                )
            new[entry.kind, path] = entry
    for (kind, path), entry in new.items():
        _FAMILIES[kind][path] = entry


def unregister(*entries: Any) -> None:
    """Forget families that `register` has made known; models accelerated by them stay as they are."""
    for entry in entries:
        for path in entry.classes:
            _FAMILIES[entry.kind].pop(path, None)


def family_of(kind: str, module: nn.Module) -> Any:
    """The family of that kind that a module's class belongs to, or None."""
    paths = class_paths(module)
    if any(path.startswith(OWN[kind][1]) for path in paths) or not OWN[kind][1]:
        _load_own(kind)
    _load_added()
    known = _FAMILIES[kind]
    return next((known[path] for path in paths if path in known), None)


def families(kind: str) -> tuple[Any, ...]:
    """All families of that kind, turbovlm's own first."""
    _load_own(kind)
    _load_added()
    return tuple(dict.fromkeys(_FAMILIES[kind].values()))


def named(kind: str, path: str) -> Any:
    """The family of that kind whose classes have the dotted path.

    Raises:
        ConfigError: none is registered in this process.
    """
    _load_own(kind)
    _load_added()
    if path not in _FAMILIES[kind]:
        raise ConfigError(f"{path}: no family of it is registered in this process; call turbovlm.register first")
    return _FAMILIES[kind][path]


def class_paths(module: Any) -> list[str]:
    """Dotted paths of the class of a module, or of anything else, and its bases."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


def _load_own(kind: str) -> None:
    if kind not in _LOADED:
        _LOADED.add(kind)
        register(*importlib.import_module(OWN[kind][0]).FAMILIES)


def _load_added() -> None:
    """Register what other packages bring, all of it or nothing.

    Raises:
        ConfigError: a package's families cannot be loaded, or are registered already; every later call says so again.
    """
    if ENTRY_POINTS in _LOADED:
        return
    found: list[Family] = []
    for point in entry_points(group=ENTRY_POINTS):
        try:
            found += point.load().FAMILIES
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the families of {point.value}, an entry point of the group {ENTRY_POINTS}, cannot be loaded: "
                f"{error!r}; update or uninstall the package that has it"
            ) from error
    register(*found)
    _LOADED.add(ENTRY_POINTS)
