"""Faster vision transformers without retraining, by merging the tokens that carry least information."""

import importlib
from types import ModuleType

from turbovlm import functional
from turbovlm.calibration.calibrate import calibrate
from turbovlm.config import TurboConfig
from turbovlm.errors import ConfigError, StateError, TurboError, UnsupportedModelError
from turbovlm.handle import Handle, apply, get_handle
from turbovlm.schedule import Schedule
from turbovlm.state import BlockTrace

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


def __getattr__(name: str) -> ModuleType:
    if name in ("profile", "visualize", "zoo"):
        return importlib.import_module(f"turbovlm.{name}")
    raise AttributeError(f"module 'turbovlm' has no attribute {name!r}")
