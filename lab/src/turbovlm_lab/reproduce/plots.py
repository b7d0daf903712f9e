"""The plots of tables and figures, with matplotlib, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbovlm_lab.evaluate.settings import SMALLER
from turbovlm_lab.evaluate.study import Row
from turbovlm_lab.reproduce.declared import Line
from turbovlm_lab.reproduce.running import Finished
from turbovlm_lab.reproduce.tracing import TOP, Blocks

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = {
    "turbovlm": "#0b6e99",
    "turbovlm's partition and order": "#0b6e99",
    "paper": "#c2571a",
    "turbo": "#c2571a",
    "as published": "#c2571a",
    "ToMe": "#5b8c3a",
    "redundancy": "#5b8c3a",
    "tome": "#5b8c3a",
    "semantics": "#8a4f9e",
    "random": "#888888",
    "uniform": "#bbbbbb",
}


def save_table(finished: Finished, path: Path) -> None:
    """What each setting keeps of the first metric, with 95 % intervals, and hollow, what is printed."""
    shown = [(line, row) for line, row in finished.rows if row is not finished.own]
    figure, axis = _figure(7, 1.2 + 0.27 * len(shown))
    is_share = any(row is not None and row.metrics[0].kept is not None for _, row in shown)
    for place, (line, row) in enumerate(shown):
        if row is not None:
            value = (row.metrics[0].kept if is_share else None) or row.metrics[0].value
            reach = [[value.value - value.low], [value.high - value.value]]
            axis.errorbar(value.value, place, xerr=reach, marker="o", capsize=3, color=colour_of(line))
        printed = finished.printed_kept(line)
        if printed is not None:
            axis.plot(printed, place, marker="D", markersize=6, markerfacecolor="none", color="black")
    own, name = finished.own.metrics[0].value.value, finished.own.metrics[0].name
    axis.axvline(1 if is_share else own, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(shown)), [_label(line, row) for line, row in shown], fontsize=8)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    beside = " (◇ printed)" if any(finished.printed_kept(line) for line, _ in shown) else ""
    axis.set_xlabel(f"{name}, share kept{beside}" if is_share else f"{name} (dotted: unmerged)")
    axis.grid(axis="x", alpha=0.3)
    _save(figure, axis, finished.declared.title, path)


def save_curves(finished: Finished, path: Path) -> None:
    """Figures 4 and 5: what is kept of the first metric over what is swept, a curve per method."""
    figure, axis = _figure(6.5, 4)
    curves: dict[str, list[tuple[float, Any]]] = {}
    for line, row in finished.rows:
        if row is not None and line.curve:
            curves.setdefault(line.curve, []).append((line.x, row.metrics[0].kept or row.metrics[0].value))
    for number, (name, points) in enumerate(curves.items()):
        x = [where for where, _ in points]
        y = [value.value for _, value in points]
        low, high = [value.low for _, value in points], [value.high for _, value in points]
        colour = COLOURS.get(name, f"C{number}")
        axis.plot(x, y, marker="o", markersize=4, color=colour, label=name)
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    if finished.declared.name == "figure5":
        axis.set_xscale("symlog", linthresh=2)
        axis.set_xlim(left=0)
    else:
        axis.invert_xaxis()
    axis.set_xlabel(finished.declared.axis)
    axis.set_ylabel(f"{finished.own.metrics[0].name}, share kept")
    axis.legend(fontsize=8, frameon=False)
    _save(figure, axis, finished.declared.title, path)


def save_overview(kept: Mapping[str, Mapping[str, Mapping[str, float]]], names: Sequence[str], path: Path) -> None:
    """Share kept, with 95 % intervals: a panel per task, a row per setting.

    Args:
        kept: by task and setting: `value`, `low` and `high`.
        names: of the settings, from top to bottom.
        path: without its ending.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 1.9 * len(kept), 1.0 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(kept), sharey=True)
    for axis, (task, points) in zip(panels, kept.items()):
        for place, name in enumerate(names):
            if name in points:
                value, low, high = (points[name][each] for each in ("value", "low", "high"))
                reach = [[value - low], [high - value]]
                axis.errorbar(value, place, xerr=reach, marker="o", markersize=5, capsize=2, color=_colour(name))
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(task, fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("score kept", fontsize=9)
    _write(figure, path)


def save_savings(savings: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Table 11: how many times fewer multiply-accumulates, per task and method; 1 where nothing passes."""
    figure, axis = _figure(6.5, 3.5)
    methods = list(next(iter(savings.values())))
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        heights = [savings[task][method] for task in savings]
        places = [i + (number - (len(methods) - 1) / 2) * width for i in range(len(savings))]
        axis.bar(places, heights, width * 0.9, color=COLOURS.get(method), label=method)
    axis.set_xticks(range(len(savings)), list(savings))
    axis.set_ylabel("times fewer multiply-accumulates")
    axis.legend(fontsize=8, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    _save(figure, axis, "Table 11: largest saving within a drop of 5 %", path)


def save_blocks(blocks: Blocks, path: Path) -> None:
    """Figure 3: redundancy and concentration of attention, block by block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    named = ((left, blocks.redundancy, "mean R"), (right, blocks.concentration, f"A in {TOP:.0%} of the patches"))
    for axis, values, label in named:
        axis.errorbar(range(1, len(values) + 1), *zip(*values), marker="o", capsize=3, color=COLOURS["turbovlm"])
        axis.set_xlabel("block")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def save_images(sheet: Image, names: Sequence[str], path: Path) -> None:
    """Figure 6: a sheet of images under the names of its columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(sheet.width / 150, sheet.height / 150 + 0.3), layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet)
    places = [(i + 0.5) * sheet.width / len(names) for i in range(len(names))]
    axis.set_xticks(places, names)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    _write(figure, path)


def colour_of(line: Line) -> str:
    """By its method."""
    return _colour(line.name)


def _colour(name: str) -> str:
    return "#d4a017" if name == SMALLER else COLOURS.get(name.partition(",")[0].partition(" ")[0], "0.45")


def _label(line: Line, row: Row | None) -> str:
    return line.name if row is None else f"{line.name} ({row.ratio:.0%} of MACs)"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axis: Any, title: str, path: Path) -> None:
    axis.set_title(title, fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=130)
