"""Plots of measured comparisons, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from turbovlm.errors import TurboError
from turbovlm.profile.compare import Comparison

TURBO, ARITHMETIC = "#0b6e99", "#c8102e"


def save_speedups(comparisons: Mapping[str, Comparison], path: str | Path, *, title: str = "") -> None:
    """Draw each version's speed-up beside what arithmetic allows, and its peak memory beside the model's own.

    Args:
        comparisons: by the encoder's name; a row of the figure each.
        path: a `.png`, `.svg` or `.pdf` file.
        title: above the figure.

    Raises:
        TurboError: the file cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 + 3.1 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), 2, squeeze=False)
    for (name, comparison), (speed, memory) in zip(comparisons.items(), axes):
        names = [run.name for run in comparison.runs[1:]]
        quartiles = [comparison.speedup(n) for n in names]
        medians = [q.median for q in quartiles]
        whiskers = [[q.median - q.low for q in quartiles], [q.high - q.median for q in quartiles]]
        speed.bar(names, medians, width=0.55, color=TURBO, yerr=whiskers, capsize=4, label="measured, with quartiles")
        speed.plot(
            names,
            [comparison.macs_ratio(n) for n in names],
            linestyle="none",
            marker="_",
            markersize=34,
            markeredgewidth=2,
            color=ARITHMETIC,
            label="ratio of multiply-accumulates",
        )
        speed.axhline(1, color="black", linewidth=0.8)
        speed.set_ylabel(f"speed-up ({comparison.clock})")
        speed.set_ylim(bottom=0)
        speed.set_title(f"{name}\n{comparison.conditions}", fontsize=9, loc="left")
        speed.legend(fontsize=8, loc="lower right")
        peaks = [run.peak_bytes for run in comparison.runs]
        if None in peaks:
            memory.axis("off")
        else:
            megabytes = [peak / 1e6 for peak in peaks if peak is not None]
            memory.bar(
                [run.name for run in comparison.runs], megabytes, width=0.55, color=["0.6"] + [TURBO] * len(names)
            )
            memory.set_ylabel("peak memory of a forward [MB]")
        for axis in (speed, memory):
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise TurboError(f"{path}: {error.strerror}") from error
