"""Faster vision transformers without retraining, by merging the tokens that carry least information."""

import importlib
from typing import TYPE_CHECKING, Any

from turbovlm import ops
from turbovlm.apply import Handle, apply, get_handle
from turbovlm.config import TurboConfig
from turbovlm.encoder.schedule import Schedule
from turbovlm.encoder.state import BlockTrace
from turbovlm.errors import ConfigError, StateError, TurboError, UnsupportedModelError

if TYPE_CHECKING:
    from turbovlm.calibration.calibrate import calibrate
    from turbovlm.calibration.pictures import calibrate_pictures
    from turbovlm.calibration.reading import calibrate_reading

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
    "calibrate_pictures",
    "calibrate_reading",
    "get_handle",
    "ops",
    "profile",
    "visualize",
]

CALIBRATIONS = {"calibrate": "calibrate", "calibrate_pictures": "pictures", "calibrate_reading": "reading"}
"""Where they are; imported when they are used."""


def __getattr__(name: str) -> Any:
    if name in CALIBRATIONS:
        return getattr(importlib.import_module(f"turbovlm.calibration.{CALIBRATIONS[name]}"), name)
    if name in ("profile", "visualize"):
        return importlib.import_module(f"turbovlm.{name}")
    raise AttributeError(f"module 'turbovlm' has no attribute {name!r}")
