"""Which parts are left whole: those inside of which something stands that may look at positions.

Whatever stands around a part, such as its block, hooks on the part itself and caches enabled later, is given all tokens
and gives all of them back. What stands inside would be given merged ones. The library's own attention processors treat
tokens alike wherever they lie; of other code that is not known, be it a processor that keeps its maps, a hook on a
projection or another forward. A part that has such reads all tokens, and `print(handle)` says so.
"""

from __future__ import annotations

import functools
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.modules.module as torch_module

from turbovlm.diffusion.families import Block, Part
from turbovlm.ops.tracing import constant_in_graphs
from turbovlm.patching import ACCELERATE_HOOK, Patch, slot_of

HARMLESS = ("torch.", "accelerate.", "peft.", "torchao.", "bitsandbytes.", "turbovlm.")
"""Packages whose hooks see to weights, devices and dtypes, never to positions."""

PLACING = ("diffusers.hooks.layerwise_casting", "diffusers.hooks.group_offloading")
"""Where those hooks of `diffusers` are that see to devices and dtypes only."""

WRAPPERS = ("accelerate.hooks", "diffusers.hooks.hooks")
"""Where the functions are that hooks put in place of a forward, which they have as `__wrapped__`."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in HOOKS)
"""Those of all modules, in `torch.nn.modules.module`."""

CUT_THE_BATCH = "PAG"
"""What the names of those processors of `diffusers.models` begin with that treat the images of a batch differently."""


def reason_to_leave_whole(patch: Patch, module: Any, text: Any, mask: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a call of a part has to read all tokens; None where it can read merged ones.

    Args:
        patch: of the part's module, with its `Site`.
        text, mask, kwargs: what else it is given: `encoder_hidden_states`, `attention_mask`, the rest by name.
    """
    if patch.detail.part.component == "cross_attention":
        mask = None  # of the words
    masks = kwargs.get("ip_adapter_masks")
    if mask is not None or masks is not None:
        name = "attention_mask" if masks is None else "ip_adapter_masks"
        return f"it is given {name}, which are of the image's positions"
    alone = getattr(module, "is_cross_attention", None) is False and getattr(module, "add_k_proj", None) is None
    if alone and text is not None:
        return "it attends to other tokens than its own, given as encoder_hidden_states"
    return what_stands_inside(patch, module)


def reason_to_leave_block_whole(block: Any, kind: Block, given: dict[str, Any]) -> str | None:
    """Why a block has to read all tokens; None where it can read merged ones.

    Args:
        given: its arguments, by name.
    """
    for name in kind.whole_if:
        value = given.get(name, getattr(block, name, None))
        if value is not None and value is not False:
            return f"its {name} is set, by which positions are not alike"
    if kind.reason is not None and (reason := kind.reason(given)) is not None:
        return reason
    for value in given.values():
        if isinstance(value, dict):
            for name in POSITIONAL:
                if value.get(name) is not None:
                    return f"it is given {name}, by which positions are not alike"
    return what_stands_in_block(block, kind)


POSITIONAL = ("ip_adapter_masks", "gligen", "kv_cache_mode")
"""Entries of arguments such as `cross_attention_kwargs` that are of the image's positions, or treat some of them
differently: FLUX.2 keeps the keys of its references for later steps."""


@constant_in_graphs
def what_stands_in_block(block: Any, kind: Block) -> str | None:
    """What would be given merged tokens in a block and may look at positions; None where nothing does."""
    for part in kind.parts:
        module = getattr(block, part.path, None)
        if module is None:
            continue
        found = _code_inside(module, part, kind.library)
        if found is None:
            found = _forward_below(module, module.__dict__.get(slot_of(module, "forward")))
        if found is not None:
            return f"{part.path}: {found}"
    return _hooks_inside(block)


@constant_in_graphs
def what_stands_on(block: Any) -> str | None:
    """What others have put on a block and would be called with what it is given or gives; None where nothing is."""
    return _stands_on(block)


@constant_in_graphs
def what_stands_inside(patch: Patch, module: Any) -> str | None:
    """What would be given merged tokens in a part and may look at positions; None where nothing does."""
    return _inside(module, patch.detail.part, patch.detail.library, patch.before)


def what_stood_inside(module: Any, part: Part, library: str) -> str | None:
    """The same of a part that is not patched yet."""
    return _inside(module, part, library, module.__dict__.get(slot_of(module, "forward")))


def _inside(module: Any, part: Part, library: str, before: Any) -> str | None:
    return _code_inside(module, part, library) or _forward_below(module, before) or _hooks_inside(module)


def own_call(layer: Any) -> Any:
    """The layer, or what its class does, past hooks and forwards that are not to know of a call of ours."""
    return layer if _stands_on(layer) is None else functools.partial(type(layer).forward, layer)


def _code_inside(module: Any, part: Part, library: str) -> str | None:
    """Other code than the library's that a call of the module runs: a class, a processor, PyTorch's attention."""
    if part.one_layer:
        return None
    kind: Any = _own_class(module)
    if not _is_of(kind, library) or not _is_of(kind.forward, library):
        return f"it is a {_named(kind if not _is_of(kind, library) else kind.forward)}"
    if part.component == "ffn":
        return None
    processor: Any = getattr(module, "processor", None)
    kind = type(processor)
    if processor is not None and not (_is_of(kind, library) and not kind.__name__.startswith(CUT_THE_BATCH)):
        return f"its processor is a {_named(kind)}"
    if processor is not None and not _is_of(kind.__call__, library):
        return f"its processor's __call__ is {_named(kind.__call__)}"
    if torch.compiler.is_compiling():
        return None
    attend: Any = F.scaled_dot_product_attention
    if not isinstance(attend, BuiltinFunctionType):
        return f"torch.nn.functional.scaled_dot_product_attention is {_named(attend)}"
    stack: Any = torch.overrides._get_current_function_mode_stack
    modes = [type(mode) for mode in stack()]
    other = next((mode for mode in modes if not mode.__module__.startswith(HARMLESS)), None)
    return None if other is None else f"it runs within a {_named(other)}"


def _forward_below(module: Any, before: Any) -> str | None:
    """A forward that was there before the patch, which would be given merged tokens."""
    found = None if before is None else _other_forward(module, before)
    if found is not None:
        return f"it has a forward of its own, {_named(found)}"
    registry = getattr(module, "_diffusers_hook", None)
    if before is None or registry is None:
        return None
    # caches, the stateful ones, are refused below a merge, so those that are there came after it
    hooks = [hook for hook in registry.hooks.values() if not hook._is_stateful]
    return _first_of(hook for hook in hooks if type(hook).__module__ not in PLACING)


def _other_forward(module: Any, forward: Any) -> Any:
    """What is called in place of the class's forward, below placing hooks and patches; None where it is that."""
    while isinstance(forward, Patch) or (
        isinstance(forward, functools.partial) and forward.func.__module__ in WRAPPERS
    ):
        forward = forward.before if isinstance(forward, Patch) else forward.__wrapped__  # type: ignore[attr-defined]
    if forward is None:
        return None
    owner, own = getattr(forward, "__self__", None), getattr(type(module), "forward", None)
    return None if owner is module and getattr(forward, "__func__", None) is own else forward


def patches_below(forward: Any) -> list[Patch]:
    """The patches among what is called in place of a forward, below hooks that libraries put around it."""
    found = []
    while forward is not None:
        if isinstance(forward, Patch):
            found.append(forward)
            forward = forward.before
        elif isinstance(forward, functools.partial) and forward.func.__module__ in WRAPPERS:
            forward = forward.__wrapped__  # type: ignore[attr-defined]
        else:
            break
    return found


def _hooks_inside(module: Any) -> str | None:
    for kind in GLOBAL_HOOKS:
        for hook in getattr(torch_module, kind).values():
            if _is_foreign(hook):
                return f"every module has a hook, {_named(hook)}"
    return _hooks_below(module)


def _hooks_below(module: Any, path: str = "") -> str | None:
    """What stands on the modules below one. Called for every part in every forward, so it makes as little as it can."""
    for name, inner in module._modules.items():
        if inner is None:
            continue
        if (found := _stands_on(inner)) is not None:
            return f"its {path}{name} has {found}"
        if inner._modules and (found := _hooks_below(inner, f"{path}{name}.")) is not None:
            return found
    return None


@constant_in_graphs
def _stands_on(layer: Any) -> str | None:
    """What others have put on a layer and would be called with what it is given; None where there is nothing."""
    own = layer.__dict__
    for kind in HOOKS:
        if own[kind]:
            for hook in own[kind].values():
                if _is_foreign(hook):
                    return f"a hook, {_named(hook)}"
    if "forward" not in own:
        return None
    registry, placed = own.get("_diffusers_hook"), own.get(ACCELERATE_HOOK)
    found = None
    if registry is not None:
        found = _first_of(hook for hook in registry.hooks.values() if type(hook).__module__ not in PLACING)
    elif placed is not None:
        found = _first_of(hook for hook in getattr(placed, "hooks", (placed,)) if _is_foreign(type(hook)))
    forward = _other_forward(layer, own["forward"])
    owner = getattr(forward, "__self__", None)
    # An adapter is a module whose forward stands in for that of the layer that it adapts.
    if found is not None or forward is None or (isinstance(owner, nn.Module) and owner is not layer):
        return found
    return f"a forward of its own, {_named(forward)}"


def _first_of(hooks: Any) -> str | None:
    first = next(iter(hooks), None)
    return None if first is None else f"a {_named(type(first))}"


def _own_class(module: Any) -> Any:
    """The class of a module, a layer of PyTorch's as well, past what PyTorch puts in front of it, as FSDP does."""
    names = ((kind, kind.__module__) for kind in type(module).__mro__)
    return next(kind for kind, name in names if not name.startswith("torch.") or name.startswith("torch.nn.modules."))


def _is_of(code: Any, library: str) -> bool:
    """Whether a class or function is from the library."""
    module = str(getattr(code, "__module__", None))
    return module == library or module.startswith(f"{library}.")


def _is_foreign(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return not str(getattr(function, "__module__", None)).startswith(HARMLESS)


def _named(code: Any) -> str:
    """A class or function by its name and where it is from."""
    while isinstance(code, functools.partial):
        code = code.func
    code = code if hasattr(code, "__qualname__") else type(code)
    return f"{code.__qualname__} of {code.__module__}"
