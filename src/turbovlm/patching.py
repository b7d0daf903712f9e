"""Where a forward goes in a module that `accelerate` moves between devices or memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn as nn

from turbovlm.errors import TurboError, UnsupportedModelError

_HOOK, _BELOW = "_hf_hook", "_old_forward"
"""What accelerate's `add_hook_to_module` gives a module: its hook, and the forward that the hook calls."""


def slot_of(module: nn.Module) -> str:
    """The attribute that a module's forward is put in: below accelerate's hook, where there is one."""
    return _BELOW if _BELOW in module.__dict__ else "forward"


def check_hooks(modules: Iterable[tuple[str, nn.Module]], one_device: bool = True) -> None:
    """See that the forward of each module, given with its path, can be replaced.

    Raises:
        TurboError: it has been replaced already, by something other than accelerate.
        UnsupportedModelError: the modules, which hand tokens on to each other, run on several devices.
    """
    devices: dict[str, str] = {}
    for name, module in modules:
        slot = slot_of(module)
        own = module.__dict__.get(slot)
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
    hook: Any = getattr(module, _HOOK, None)
    hooks = getattr(hook, "hooks", (hook,))
    found = [device for each in hooks if (device := getattr(each, "execution_device", None)) is not None]
    return str(found[-1]) if found else None
