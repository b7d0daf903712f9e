"""Plots of measured comparisons, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbovlm.errors import TurboError
from turbovlm.profile.comparison import IMAGE, STEP, Comparison
from turbovlm.profile.timing import Quartiles

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
        medians, label = [q.median for q in quartiles], "measured, with quartiles"
        speed.bar(names, medians, width=0.55, color=TURBO, yerr=_whiskers(quartiles), capsize=4, label=label)
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
    _save(figure, path)


def save_drifts(comparisons: Mapping[str, Comparison], path: str | Path, *, title: str = "") -> None:
    """Draw what speed costs: drift of the latent against the step's speed-up, PSNR against the image's.

    Args:
        comparisons: of image generation, by the images' size; a row of the figure each.
        path: a `.png`, `.svg` or `.pdf` file.
        title: above the figure.

    Raises:
        TurboError: the file cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 + 3.3 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), 2, squeeze=False)
    for (name, comparison), (latent, decoded) in zip(comparisons.items(), axes):
        drifts = {run.name: run.drift for run in comparison.runs[1:] if run.drift is not None}
        _curve(latent, comparison, STEP, {name: drift.latent for name, drift in drifts.items()})
        _curve(decoded, comparison, IMAGE, {name: drift.psnr for name, drift in drifts.items()})
        latent.set_ylim(bottom=0)
        latent.set_xlabel(f"speed-up of a denoising step ({comparison.clock})")
        latent.set_ylabel("drift of the last latent")
        decoded.set_xlabel("speed-up of an image")
        decoded.set_ylabel("PSNR of the image [dB]")
        latent.set_title(f"{name} pixels\n{comparison.conditions}", fontsize=9, loc="left")
    figure.suptitle(title)
    _save(figure, path)


def _curve(axis: Any, comparison: Comparison, timing: str, values: Mapping[str, float]) -> None:
    """Draw versions as points joined in the order of their speed, with quartiles."""
    speedups = {name: comparison.speedup(name, timing) for name in values}
    order = sorted(values, key=lambda name: speedups[name].median)
    medians, heights = [speedups[name].median for name in order], [values[name] for name in order]
    axis.errorbar(
        medians, heights, xerr=_whiskers([speedups[name] for name in order]), fmt="none", ecolor=TURBO, capsize=3
    )
    axis.plot(medians, heights, marker="o", color=TURBO)
    for name, x, y in zip(order, medians, heights):
        axis.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.15, y=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def _whiskers(quartiles: list[Quartiles]) -> list[list[float]]:
    return [[q.median - q.low for q in quartiles], [q.high - q.median for q in quartiles]]


def _save(figure: Any, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise TurboError(f"{path}: {error.strerror}") from error
