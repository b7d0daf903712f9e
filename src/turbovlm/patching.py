"""The one way to put something on a module, and to take it off again.

A `Patch` stands in a module's `__dict__` in place of one of its methods and is called instead of it. It is found by its
type, so whatever turbovlm has put into a model, or a copy of it, can be listed and removed at any time. It holds its
module weakly: a patched model is freed as soon as nobody else holds it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch.nn as nn

from turbovlm.errors import TurboError, UnsupportedModelError

ACCELERATE_HOOK, BELOW_HOOK = "_hf_hook", "_old_forward"
"""What accelerate's `add_hook_to_module` gives a module: its hook, and the forward that the hook calls."""


REPLICATE = "_replicate_for_data_parallel"
"""The method by which `nn.DataParallel` copies a module for another device, and what is in its `__dict__` with it."""


class Feature(Protocol):
    """One thing that turbovlm does to a model: an encoder that merges, a prompt that is shortened, a denoiser.

    It is shared by its patches, copied and pickled with the model, and holds none of the model's modules.

    Attributes:
        config: its settings.
        removed: whether its patches were taken off; those that another library still holds on to do nothing then.
        last: what it did in the last forward, None before; it is neither copied nor pickled.
    """

    config: Any
    removed: bool
    last: Any

    # A feature that also patches objects which are no part of the model has them in a property `beside`, a tuple.
    # One that leaves every token as it is has `keeps_tokens = True`: others may be applied to the same model.

    def patches(self, model: nn.Module) -> list[Patch]:
        """What to put where in the model that it was found in. Changes nothing."""

    def describe(self) -> list[str]:
        """Lines for `print(handle)`."""


def keeps_tokens(feature: Feature) -> bool:
    """Whether a feature leaves every token as it is, so that others may be applied to the same model."""
    return bool(getattr(feature, "keeps_tokens", False))


Function = Callable[..., Any]
"""`(patch, module, original, *args, **kwargs)`: what runs in place of a method of `module`. `original` is what ran
before, to be called without `self`; the rest are the method's own arguments."""


class Patch:
    """A callable in place of one method of one module, or of another object with a `__dict__`, such as a scheduler.

    Attributes:
        name: the method's name.
        function: what runs instead, see `Function`; defined in a module, so that it pickles.
        feature: what it belongs to.
        detail: what `function` needs to know beside the feature, such as the index of a block.
        by_name: whether `function` gets the method's arguments by name, however they came, without those left out.
        before: what stood in the module's own `__dict__` under that name; None where the class's method was used.
        method: the class's own method, unbound; None where it has none, as of `_compiled_call_impl`.
        is_static: whether that is a static one.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        function: Function,
        feature: Feature,
        detail: Any = None,
        by_name: bool = False,
    ) -> None:
        self._module = weakref.ref(module)
        self.name, self.function, self.feature, self.detail, self.by_name = name, function, feature, detail, by_name
        self.before: Any = None
        self.method: Any = getattr(type(module), name)
        self.is_static = isinstance(inspect.getattr_static(type(module), name), staticmethod)

    @property
    def module(self) -> Any:
        """The module that is patched."""
        return self._module()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        if args and args[0] is module:  # accelerate's unwrap_model binds what it finds below its wrappers to the model
            args = args[1:]
        if self.before is None:
            original = self.method if self.is_static else functools.partial(self.method, module)
        else:
            original = self.before
        if self.feature.removed:
            return original(*args, **kwargs)
        if self.by_name:
            return self.function(self, module, original, **self._by_name(args, kwargs))
        return self.function(self, module, original, *args, **kwargs)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, without those left out."""
        bound = self.__signature__.bind(*args, **kwargs)
        named = dict(bound.arguments)
        rest = next((p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        extra = named.pop(rest, {}) if rest is not None else {}
        return {**named, **extra}

    @property
    def __code__(self) -> Any:
        """That of the method, which `torch.export` names its symbols by."""
        return self.method.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.method)
        return signature.replace(parameters=list(signature.parameters.values())[0 if self.is_static else 1 :])

    def moved_to(self, module: Any) -> Patch:
        """The same patch, and those below it, on another module."""
        new = Patch(module, self.name, self.function, self.feature, self.detail, self.by_name)
        new.before = self.before.moved_to(module) if isinstance(self.before, Patch) else self.before
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        # The module is being copied itself, so its copy is known; a patch that is copied alone stays on its module.
        new = Patch(
            memo.get(id(self.module), self.module),
            self.name,
            self.function,
            copy.deepcopy(self.feature, memo),
            copy.deepcopy(self.detail, memo),
            self.by_name,
        )
        new.before = copy.deepcopy(self.before, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        made_of = self.module, self.name, self.function, self.feature, self.detail, self.by_name
        return Patch, made_of, {"before": self.before}


def slot_of(module: Any, name: str) -> str:
    """The attribute where a patch of method `name` belongs: a forward goes below accelerate's hook, where there is one.

    So the hook moves inputs and weights before the patch runs.
    """
    return BELOW_HOOK if name == "forward" and BELOW_HOOK in module.__dict__ else name


def install(patches: Iterable[Patch]) -> None:
    """Put patches on their modules, in order; a later one on the same method goes around the earlier one."""
    modules: dict[int, Patch] = {}
    for patch in patches:
        _put_on(patch)
        if isinstance(patch.module, nn.Module):
            modules.setdefault(id(patch.module), patch)
    for patch in modules.values():
        _put_on(Patch(patch.module, REPLICATE, replicate, patch.feature))


def _put_on(patch: Patch) -> None:
    slot = slot_of(patch.module, patch.name)
    patch.before = patch.module.__dict__.get(slot)
    setattr(patch.module, slot, patch)


def replicate(patch: Patch, module: nn.Module, original: Any, /) -> nn.Module:
    """Make a module's replica, as `nn.DataParallel` does for every device, whose patches run on the replica."""
    replica: nn.Module = original()
    for slot, value in list(replica.__dict__.items()):
        if isinstance(value, Patch):
            replica.__dict__[slot] = value.moved_to(replica)
    return replica


def patches_on(model: nn.Module) -> Iterator[Patch]:
    """Every patch in `model` that does something, of nested ones the outer first; then those beside it."""
    beside: dict[int, Any] = {}
    for module in model.modules():
        for patch in patches_of(module):
            yield patch
            beside |= {id(each): each for each in getattr(patch.feature, "beside", ())}
    for each in beside.values():
        yield from patches_of(each)


def patches_of(module: Any) -> Iterator[Patch]:
    """Every patch of one module or other object.

    Not of removed features: a library may put such a patch back that it had found there and kept.
    """
    for value in list(module.__dict__.values()):
        while isinstance(value, Patch):
            if not value.feature.removed:
                yield value
            value = value.before


def remove(patches: Iterable[Patch]) -> None:
    """Put back what was there before each patch, the outer of nested ones first, and end their features."""
    found = list(patches)
    for patch in found:
        patch.feature.removed = True
    take_off(found)


def take_off(patches: Iterable[Patch]) -> None:
    """Put back what was there before each patch, the outer of nested ones first."""
    for patch in patches:
        for slot, value in list(patch.module.__dict__.items()):
            if value is patch:
                _put_back(patch, slot)


def _put_back(patch: Patch, slot: str) -> None:
    before = patch.before
    while isinstance(before, Patch) and before.feature.removed:  # one that was taken off while this one lay on it
        before = before.before
    if before is not None:
        setattr(patch.module, slot, before)
    elif slot == patch.name:
        del patch.module.__dict__[slot]
    else:  # accelerate's hook came after the patch and keeps it: it needs a method to call
        setattr(patch.module, slot, patch.method.__get__(patch.module))


def check_forwards(modules: Iterable[tuple[str, nn.Module]], one_device: bool = True) -> None:
    """See that the forward of each module, paired with its path, can be patched.

    Args:
        one_device: whether the modules hand tokens on to each other, so that all must run on one device.

    Raises:
        TurboError: it has been replaced already, by something other than accelerate.
        UnsupportedModelError: accelerate runs the modules on several devices.
    """
    devices: dict[str, str] = {}
    for name, module in modules:
        own = module.__dict__.get(slot_of(module, "forward"))
        while isinstance(own, Patch):  # of a feature that others may stand beside
            own = own.before
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            raise TurboError(
                f"{name or 'the model'} has a forward of its own, set by another library: apply turbovlm before it"
            )
        device = _device(module)
        if one_device and device is not None:
            devices.setdefault(device, name)
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise UnsupportedModelError(
            f"one encoder on several devices: {places}; what is known of merged tokens does not move with them: give "
            "the whole encoder one device in device_map"
        )


def _device(module: nn.Module) -> str | None:
    hook: Any = getattr(module, ACCELERATE_HOOK, None)
    hooks = getattr(hook, "hooks", (hook,))
    found = [device for each in hooks if (device := getattr(each, "execution_device", None)) is not None]
    return str(found[-1]) if found else None
