"""Plots of studies, with matplotlib."""

from __future__ import annotations

from pathlib import Path

from turbovlm.errors import TurboError
from turbovlm_lab.evaluate.study import Study

OURS, OTHERS = "#0b6e99", "0.45"


def save_study(study: Study, path: str | Path) -> None:
    """Draw the first metric of every setting against its cost, with 95 % intervals.

    Args:
        study: with the unmerged model first.
        path: a `.png`, `.svg` or `.pdf` file.

    Raises:
        TurboError: the file cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for row in study.rows:
        value = row.metrics[0].value
        colour = OURS if row.setting == "turbovlm" else OTHERS
        reach = [[value.value - value.low], [value.high - value.value]]
        axis.errorbar(row.ratio, value.value, yerr=reach, marker="o", capsize=3, color=colour)
        axis.annotate(row.setting, (row.ratio, value.value), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axis.axhline(study.rows[0].metrics[0].value.value, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("share of the encoder's multiply-accumulates")
    axis.set_ylabel(study.rows[0].metrics[0].name)
    axis.set_title(f"{study.task}: {study.model} on {study.data}, {study.samples} samples", fontsize=9, loc="left")
    axis.margins(x=0.2, y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise TurboError(f"{path}: {error.strerror}") from error
