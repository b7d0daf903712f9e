"""Faster vision transformers without retraining, by merging the tokens that carry least information."""

import importlib
from typing import TYPE_CHECKING, Any

from turbovlm import process

if process.is_command():  # PyTorch, which all that follows imports, reads its environment, and takes seconds
    process.begin()

from turbovlm.apply import Handle, apply, get_handle
from turbovlm.calibration.result import Calibration
from turbovlm.config import DenoiseConfig, ReadConfig, TurboConfig
from turbovlm.errors import ConfigError, StateError, TurboError, UnsupportedModelError
from turbovlm.registry import register

if TYPE_CHECKING:
    from turbovlm.calibration.calibrate import calibrate
    from turbovlm.encoder.schedule import Schedule
    from turbovlm.encoder.state import BlockTrace
    from turbovlm.sharing import share_weights
    from turbovlm.windows import batch_windows

__version__ = "0.2.0"

__all__ = [
    "BlockTrace",
    "Calibration",
    "ConfigError",
    "DenoiseConfig",
    "Handle",
    "ReadConfig",
    "Schedule",
    "StateError",
    "TurboConfig",
    "TurboError",
    "UnsupportedModelError",
    "apply",
    "batch_windows",
    "calibrate",
    "get_handle",
    "ops",
    "profile",
    "register",
    "share_weights",
    "visualize",
]

_WHERE = {
    "calibrate": "turbovlm.calibration.calibrate",
    "Schedule": "turbovlm.encoder.schedule",
    "BlockTrace": "turbovlm.encoder.state",
    "share_weights": "turbovlm.sharing",
    "batch_windows": "turbovlm.windows",
}
"""Names that are imported when they are used."""


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in ("ops", "profile", "visualize"):
        return importlib.import_module(f"turbovlm.{name}")
    raise AttributeError(f"module 'turbovlm' has no attribute {name!r}")
