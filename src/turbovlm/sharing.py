"""Copies of models and pipelines that share their weights, such as one for each thread."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch.nn as nn

from turbovlm.errors import TurboError, UnsupportedModelError
from turbovlm.patching import ACCELERATE_HOOK

Model = TypeVar("Model")


def share_weights(model: Model) -> Model:
    """Copy a model or a pipeline without its weights, which the copy shares.

    All else is the copy's own: modules, hooks, what `turbovlm.apply` has put there, and of a pipeline its scheduler,
    its tokenizers and the state of its autoencoder. So one can be accelerated, or set free of it, while the other stays
    as it is, and each thread can have a copy, where a pipeline itself makes one image at a time. A copy of an
    accelerated model is accelerated; `turbovlm.get_handle(copy)` has its handle. Copies are for inference: weights that
    are changed in place, and their gradients, change in all of them. What was compiled is compiled anew.

    Args:
        model: a module, or a `diffusers` pipeline.

    Returns:
        One of the same class.

    Raises:
        UnsupportedModelError: neither a module nor something that holds modules.
        TurboError: weights that are moved between devices in every forward, which threads would take from each other.
    """
    held = [model] if isinstance(model, nn.Module) else list(getattr(model, "__dict__", {}).values())
    modules = [part for part in held if isinstance(part, nn.Module)]
    if not modules:
        raise UnsupportedModelError(
            f"a {type(model).__name__} is neither a torch.nn.Module nor a pipeline of them: it has no weights to share"
        )
    for module in modules:
        _check_weights_stay(module)
    return _copied(model, modules)


def twin(model: nn.Module) -> nn.Module:
    """A copy of a module that shares its weights, to run in turn with it in one thread, in eval mode."""
    return _copied(model, [model]).eval()


def _copied(model: Model, modules: list[nn.Module]) -> Model:
    """A copy of everything but the tensors of these modules."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _check_weights_stay(model: nn.Module) -> None:
    """Raises `TurboError` where a hook moves weights between devices."""
    for name, module in model.named_modules():
        hook: Any = getattr(module, ACCELERATE_HOOK, None)
        hooks = [*getattr(hook, "hooks", (hook,)), *_own_hooks(module)]
        moving = next((each for each in hooks if _moves(each)), None)
        if moving is not None:
            raise TurboError(
                f"{name or type(model).__name__} is offloaded ({type(moving).__name__}): its weights move in every "
                "forward, so that copies would take them from each other; switch offloading off first"
            )


def _own_hooks(module: Any) -> list[Any]:
    """Hooks of `diffusers`."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())


def _moves(hook: Any) -> bool:
    return "Offload" in type(hook).__name__ or bool(getattr(hook, "offload", False))
