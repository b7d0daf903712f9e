"""A line chart as an inline SVG of matplotlib's."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from turbovlm_lab.demo.result import METHODS, UNMERGED, Cost

STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "turbovlm",  # the same chart gives the same file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
}
LOOKS = {
    "turbo": ("#0060a8", "o", "-"),
    "tome": ("#c2410c", "s", "--"),
    "random": ("#666666", "^", ":"),
    "smaller": ("#2f855a", "D", "-."),
}
"""Of each method's curve: colour, marker and line."""


@dataclass(frozen=True)
class Curve:
    """Points `(x, y, label)` joined by a line; `mark` and `dash` are matplotlib's marker and line style."""

    name: str
    color: str
    mark: str
    dash: str
    points: tuple[tuple[float, float, str], ...]


def method_curves(values: Sequence[tuple[Cost, float]], x: Callable[[Cost], float]) -> list[Curve]:
    """A curve for each method that was measured, from the unmerged model on; points are labelled with their MACs."""
    curves = []
    for method in METHODS:
        found = [(cost, value) for cost, value in values if cost.method in (UNMERGED.key, method.key)]
        points = tuple((x(cost), value, f"{cost.macs:.0%}") for cost, value in found)
        if any(cost.method == method.key for cost, _ in found):
            curves.append(Curve(method.label, *LOOKS[method.key], points))
    return curves


def line_chart(curves: Sequence[Curve], x_label: str, y_label: str, description: str) -> str:
    """An `<svg>` element with axes, curves and a legend; no references outside itself.

    Args:
        curves: at least one, with at least one point each; the last point of each is labelled.
        description: what the chart shows, for readers who do not see it.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = io.StringIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        axis = figure.subplots()
        for number, curve in enumerate(curves):
            xs, ys, labels = zip(*curve.points)
            axis.plot(xs, ys, color=curve.color, marker=curve.mark, linestyle=curve.dash, label=curve.name)
            last, aside = (xs[-1], ys[-1]), (0, 6 if number % 2 else -14)
            axis.annotate(labels[-1], last, aside, textcoords="offset points", color=curve.color, ha="right")
        axis.margins(0.08, 0.12)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.set_axisbelow(True)
        axis.legend(loc="best", frameon=False)
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    said = f' role="img" aria-label="{escape(description)}" class="chart"'
    return f"<svg{said} {svg.removeprefix('<svg').strip()}"
