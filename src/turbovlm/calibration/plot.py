"""A figure of a calibration: drift over cost, and the tokens merged in each block."""

from __future__ import annotations

from pathlib import Path

from turbovlm.calibration.result import Calibration
from turbovlm.config import TurboConfig
from turbovlm.errors import TurboError

CURVE, FOUND = "#0b6e99", "#c2571a"


def save_calibration(calibration: Calibration, path: str | Path, *, title: str = "") -> None:
    """Draw what a calibration measured.

    Args:
        calibration: what `turbovlm.calibrate` returned.
        path: a `.png`, `.svg` or `.pdf` file.
        title: above the figure.

    Raises:
        TurboError: the file cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    config = calibration.config
    amounts = config.r if isinstance(config, TurboConfig) and isinstance(config.r, tuple) else ()
    figure = Figure(figsize=(9 if amounts else 5.5, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if amounts else 1, squeeze=False)[0]
    costs, drifts = zip(*calibration.curve)
    axes[0].plot(costs, drifts, marker="o", markersize=4, color=CURVE)
    bound = f"these settings: mean, and what {calibration.coverage:.0%} stay below"
    ends = [calibration.drift, calibration.bound]
    axes[0].plot([calibration.flops] * 2, ends, marker="_", markersize=9, color=FOUND, label=bound)
    axes[0].invert_xaxis()
    axes[0].set_ylim(bottom=0)
    axes[0].set_xlabel("share of the multiply-accumulates left")
    axes[0].set_ylabel("drift")
    axes[0].legend(frameon=False, fontsize=8)
    if amounts:
        axes[1].bar(range(len(amounts)), amounts, color=CURVE)
        axes[1].set_xlabel("block")
        axes[1].set_ylabel("tokens merged" + (", on average" if config.thresholds else ""))  # type: ignore[union-attr]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise TurboError(f"{path}: {error.strerror}") from error
