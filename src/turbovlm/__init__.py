"""Faster vision transformers without retraining, by merging the tokens that carry least information."""

import importlib
from typing import TYPE_CHECKING, Any

from turbovlm import functional
from turbovlm.config import TurboConfig
from turbovlm.errors import ConfigError, StateError, TurboError, UnsupportedModelError
from turbovlm.handle import Handle, apply, get_handle
from turbovlm.schedule import Schedule
from turbovlm.state import BlockTrace

if TYPE_CHECKING:
    from turbovlm.calibration.calibrate import calibrate

__version__ = "0.1.0"

__all__ = [
    "BlockTrace",
    "ConfigError",
    "Handle",
    "Schedule",
    "StateError",
    "TurboConfig",
    "TurboError",
    "UnsupportedModelError",
    "apply",
    "calibrate",
    "functional",
    "get_handle",
    "profile",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name == "calibrate":
        return importlib.import_module("turbovlm.calibration.calibrate").calibrate
    if name in ("profile", "visualize", "zoo"):
        return importlib.import_module(f"turbovlm.{name}")
    raise AttributeError(f"module 'turbovlm' has no attribute {name!r}")
