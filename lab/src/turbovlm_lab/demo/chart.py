"""A line chart as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 16, 46
NICE_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Curve:
    """Points `(x, y, label)` joined by a line; `mark` is "circle", "square" or "triangle", `dash` an SVG dash array."""

    name: str
    color: str
    mark: str
    dash: str
    points: tuple[tuple[float, float, str], ...]


def line_chart(curves: Sequence[Curve], x_label: str, y_label: str, description: str) -> str:
    """An `<svg>` element with axes, curves and a legend; no references outside itself.

    Args:
        curves: at least one, with at least one point each.
        description: what the chart shows, for readers who do not see it.
    """
    x_ticks = ticks(*_extent([x for curve in curves for x, _, _ in curve.points]))
    y_ticks = ticks(*_extent([y for curve in curves for _, y, _ in curve.points]))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}" class="chart">',
        f"<title>{escape(description)}</title>",
        *(_x_tick(value, x_ticks) for value in x_ticks),
        *(_y_tick(value, y_ticks) for value in y_ticks),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="14" y="{(TOP + HEIGHT - BOTTOM) / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(TOP + HEIGHT - BOTTOM) / 2:.0f})">{escape(y_label)}</text>',
    ]
    for number, curve in enumerate(curves):
        places = [(_x(x, x_ticks), _y(y, y_ticks)) for x, y, _ in curve.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{curve.color}" stroke-width="2" '
            f'stroke-dasharray="{curve.dash}"/>'
        )
        for (x, y), (_, _, label) in zip(places, curve.points):
            parts.append(_mark(curve, x, y, f"{curve.name}, {label}"))
        last_x, last_y = places[-1]
        parts.append(
            f'<text x="{last_x:.1f}" y="{last_y + (-10 if number % 2 else 18):.1f}" text-anchor="end" '
            f'fill="{curve.color}">'
            f"{escape(curve.points[-1][2])}</text>"
        )
        parts += _legend_entry(curve, number, len(curves))
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round, evenly spaced values from at most `low` to at least `high`, about `wanted` of them."""
    raw = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in NICE_STEPS if power * nice >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _extent(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-6 else (low - 0.05, high + 0.05)


def _x(value: float, scale: list[float]) -> float:
    return LEFT + (value - scale[0]) / (scale[-1] - scale[0]) * (WIDTH - LEFT - RIGHT)


def _y(value: float, scale: list[float]) -> float:
    return HEIGHT - BOTTOM - (value - scale[0]) / (scale[-1] - scale[0]) * (HEIGHT - TOP - BOTTOM)


def _x_tick(value: float, scale: list[float]) -> str:
    x = _x(value, scale)
    return (
        f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" class="grid"/>'
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
    )


def _y_tick(value: float, scale: list[float]) -> str:
    y = _y(value, scale)
    return (
        f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" class="grid"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    )


def _mark(curve: Curve, x: float, y: float, title: str) -> str:
    if curve.mark == "circle":
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"'
    elif curve.mark == "square":
        shape = f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
    else:
        shape = f'<polygon points="{x:.1f},{y - 5:.1f} {x - 5:.1f},{y + 4:.1f} {x + 5:.1f},{y + 4:.1f}"'
    return f'{shape} fill="{curve.color}"><title>{escape(title)}</title></{shape[1:].split()[0]}>'


def _legend_entry(curve: Curve, number: int, count: int) -> list[str]:
    x, y = LEFT + 14, HEIGHT - BOTTOM - 14 - 18 * (count - 1 - number)
    return [
        f'<line x1="{x - 8}" y1="{y}" x2="{x + 16}" y2="{y}" stroke="{curve.color}" stroke-width="2" '
        f'stroke-dasharray="{curve.dash}"/>',
        _mark(curve, x + 4, y, curve.name),
        f'<text x="{x + 22}" y="{y + 4}">{escape(curve.name)}</text>',
    ]
