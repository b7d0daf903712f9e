"""What a calibration found: settings, and what was measured of them on samples that they were not found on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbovlm import config as configs
from turbovlm.checks import brief, check_number
from turbovlm.config import Config, TurboConfig
from turbovlm.errors import ConfigError

MEASURED = ("flops", "drift", "bound", "coverage", "images")
"""Fields that are numbers in every file."""


def format_drift(drift: float) -> str:
    """Four digits behind the point, or two that are not zero: `"0.0123"`, `"3.5e-05"`."""
    return f"{drift:.4f}" if drift >= 0.001 or drift <= 0 else f"{drift:.2g}"


@dataclass(frozen=True)
class Calibration:
    """Settings, and what they promise: measured on samples, images or prompts, that took no part in the search.

    `turbovlm.apply` takes it as it takes its `config`; `print` says it in words.

    Attributes:
        config: the settings.
        flops: share of the multiply-accumulates left.
        drift: 1 − cosine of what the model gives to what it gives unmerged, the mean over the samples.
        bound: with a probability of 95 %, at least `coverage` of as many other samples like these drift no further.
        images: number of samples that it was measured on.
        speedup: times faster, measured; None where that was not asked for.
        measured_on: what the speed-up was measured on, in words: how many samples at once, device and dtype. None where
            there is no speed-up, or in files of earlier releases.
        curve: shares of multiply-accumulates, each with its mean drift, of the same settings at other costs, by numbers
            and not by thresholds.
    """

    config: Config
    flops: float
    drift: float
    bound: float
    coverage: float
    images: int
    speedup: float | None
    curve: tuple[tuple[float, float], ...]
    measured_on: str | None = None

    def __str__(self) -> str:
        samples = "images" if isinstance(self.config, TurboConfig) else "prompts"
        faster = "" if self.speedup is None else f", {self.speedup:.2f} times faster as measured"
        faster += "" if self.measured_on is None else f" with {self.measured_on}"
        return (
            f"{self.config.amount}: {self.flops:.1%} of the multiply-accumulates are left{faster}. On {self.images} "
            f"{samples} that took no part in the search the mean drift is {format_drift(self.drift)}. At least "
            f"{self.coverage:.0%} of as many other {samples} like these drift no further than "
            f"{format_drift(self.bound)}, with a probability of 95 %."
        )

    def save(self, path: str | Path) -> None:
        """Write the settings and what they promise as JSON; `load` of the config's class reads it too."""
        measured = asdict(self)
        del measured["config"]
        from turbovlm.settings_file import write_settings

        write_settings(path, self.config, promise=measured)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` has written.

        Raises:
            ConfigError: no such file, another format, settings that were not calibrated, or a promise that is none.
        """
        from turbovlm.settings_file import make_config, read_content

        content = read_content(path)
        promise: Any = content.get("promise")
        if promise is None:
            raise ConfigError(f"{path}: these settings were not calibrated: read them with {content['kind']}.load")
        config = make_config(path, getattr(configs, content["kind"]), content["settings"])
        try:
            numbers = {name: promise[name] for name in MEASURED}
            curve = tuple((float(share), float(drift)) for share, drift in promise["curve"])
            found = cls(config, **{**promise, "curve": curve})
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise ConfigError(f"{path}: its promise is none of a calibration ({brief(error)})") from error
        for name, value in numbers.items():
            check_number(f"{path}: {name}", value)
        if found.speedup is not None:
            check_number(f"{path}: speedup", found.speedup)
        return found
