"""What a comparison found, as HTML."""

from __future__ import annotations

from html import escape

from turbovlm_lab.demo.chart import line_chart, method_curves
from turbovlm_lab.demo.page import cost_table
from turbovlm_lab.demo.report import COST_HEADINGS, cost_cells, machine_line
from turbovlm_lab.demo.result import UNMERGED
from turbovlm_lab.studio.comparison import Comparison, Row, drawings, points, summary, warnings
from turbovlm_lab.studio.patches import data_uri

HEADINGS = (*COST_HEADINGS, "ms", "drift", "cosine", "worst")


def said(found: Comparison) -> str:
    """What each share came to, and what must be known to read it."""
    warned = "".join(f"<p class='warned'>{escape(warning)}</p>" for warning in warnings(found))
    return f"<ul class='said'>{''.join(f'<li>{escape(line)}</li>' for line in summary(found))}</ul>{warned}"


def chart(found: Comparison) -> str:
    """Drift over the measured time, a curve for each method."""
    curves = method_curves(points(found), lambda cost: 100 / cost.speedup)
    values = "; ".join(f"{c.name} " + ", ".join(f"{x:.0f} %: {y:.3f}" for x, y, _ in c.points) for c in curves)
    x_label = "measured time per image, % of the unmerged model's"
    drawn = line_chart(curves, x_label, "drift", f"Drift over time: {values}")
    caption = "Left is faster, low is closer to the unmerged model. Beside the last points: multiply-accumulates left."
    return f"<figure class='paper'>{drawn}<figcaption class='note'>{caption}</figcaption></figure>"


def table(found: Comparison) -> str:
    """A line for each version."""
    rows = [(row.cost, _cells(row)) for row in found.rows]
    own = found.rows[0].cost
    return (
        f"<div class='wide' tabindex='0' role='region' aria-label='Measurements'>{cost_table(HEADINGS, rows)}</div>"
        f"<p class='note'>{escape(found.title)}, {len(found.names)} images. <b>MACs</b>: multiply-accumulates, of "
        f"{own.gmacs:.3g}·10⁹ per image. <b>Speed-up</b>: median over {found.timing.rounds} rounds, in small type its "
        "quartiles; <b>ms</b>: CPU time per image, all threads. <b>Drift</b>: 1 − cosine with the mean over these "
        "images taken off; <b>cosine</b>: as it is, mean and smallest. The others are set to what turbovlm turned out "
        f"to cost. {escape(machine_line(found.machine))}.</p>"
    )


def patches(found: Comparison, share: float, block: int) -> str:
    """Of each image shown, which patches every method has made one token behind a block, counted from 1."""
    return "".join(_image(found, share, block - 1, place) for place in range(len(found.shown)))


def _image(found: Comparison, share: float, block: int, place: int) -> str:
    name = found.shown[place].name
    shown = [_figure(data_uri(found.shown[place].image), name, f"the image {name}")]
    for key, (tokens, drawn) in drawings(found, share, block, place).items():
        label = next(method.label for method in found.methods if method.key == key)
        shown.append(_figure(data_uri(drawn, sharp=True), f"{label}: {tokens} tokens", f"{name}: tokens of {label}"))
    return f"<div class='strip'>{''.join(shown)}</div>"


def _figure(source: str, caption: str, alt: str) -> str:
    said = escape(alt, quote=True)
    return f"<figure><img src='{source}' alt='{said}'><figcaption>{escape(caption)}</figcaption></figure>"


def _cells(row: Row) -> tuple[str, ...]:
    how, tokens, macs, speedup = cost_cells(row.cost)
    if row.cost.method == UNMERGED.key:
        return how, tokens, macs, speedup, f"{row.cost.ms:.0f}", "0", "1", "1"
    drift = "" if row.kept.drift is None else f"{row.kept.drift:.3f}"
    return how, tokens, macs, speedup, f"{row.cost.ms:.0f}", drift, f"{row.kept.cosine:.3f}", f"{row.kept.worst:.3f}"
