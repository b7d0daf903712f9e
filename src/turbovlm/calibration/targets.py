"""What a calibration is asked to reach."""

from __future__ import annotations

from numbers import Real
from typing import Any

from turbovlm.errors import ConfigError


def check_targets(flops: Any, max_drift: Any, speedup: Any) -> None:
    """Exactly one, in its range.

    Raises:
        ConfigError: naming what was given and what is allowed.
    """
    named = (("flops", flops), ("max_drift", max_drift), ("speedup", speedup))
    given = {name: value for name, value in named if value is not None}
    if len(given) != 1:
        raise ConfigError(f"give exactly one of flops, max_drift and speedup: got {', '.join(given) or 'none of them'}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ConfigError(f"{name}={value!r}: must be a number")
    if flops is not None and not 0 < flops < 1:
        raise ConfigError(f"flops={flops!r}: must be a share in (0, 1)")
    if max_drift is not None and not 0 < max_drift < 1:
        raise ConfigError(f"max_drift={max_drift!r}: must be in (0, 1); 0 is the model itself")
    if speedup is not None and not speedup > 1:
        raise ConfigError(f"speedup={speedup!r}: must be more than 1")


def nothing(_: int) -> None:
    """Progress that nobody watches."""
