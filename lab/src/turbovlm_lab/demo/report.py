"""What `turbovlm demo` says: tables and sentences on the terminal, in Markdown, and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from turbovlm_lab.demo.result import METHODS, TURBO, UNMERGED, Cost, Machine, Method, Result, Row, SaliencyRow, Timing

if TYPE_CHECKING:
    from rich.table import Table

JSON_FORMAT = 2
COST_HEADINGS = ("how", "tokens left", "MACs", "speed-up")
CLIP_HEADINGS = ("same label", "cosine", "worst", "centred drift")
SALIENCY_HEADINGS = ("saliency IoU", "median", "worst")
FEW = 10
"""Fewer images than these say little of a method's quality."""


def to_json(result: Result) -> dict[str, Any]:
    """The measurements as plain JSON values; drawings are left out."""
    second = result.saliency
    return {
        "format": JSON_FORMAT,
        "machine": dataclasses.asdict(result.machine),
        "settings": dataclasses.asdict(result.settings),
        "seconds": result.seconds,
        "texts": dataclasses.asdict(result.texts),
        "methods": {method.key: method_settings(method) for method in METHODS},
        "timing": dataclasses.asdict(result.timing),
        "rows": [dataclasses.asdict(row) for row in result.rows],
        "images": [
            {
                "name": found.photo.name,
                "credit": found.photo.credit,
                "unmerged": {"label": found.label, "probability": found.probability},
                "merged": {"label": found.merged_label, "probability": found.merged_probability},
            }
            for found in result.found
        ],
        "saliency": None
        if second is None
        else {
            "timing": dataclasses.asdict(second.timing),
            "rows": [dataclasses.asdict(row) for row in second.rows],
        },
    }


def clip_cells(result: Result, row: Row) -> tuple[str, ...]:
    """Under `COST_HEADINGS` and `CLIP_HEADINGS`."""
    if row.cost.method == UNMERGED.key:
        return (*cost_cells(row.cost), "", "1", "1", "0")
    drift = "" if row.drift is None else f"{row.drift:.3f}"
    same = f"{row.same}/{len(result.found)}"
    return (*cost_cells(row.cost), same, f"{row.cosine:.3f}", f"{row.cosine_worst:.3f}", drift)


def saliency_cells(row: SaliencyRow) -> tuple[str, ...]:
    """Under `COST_HEADINGS` and `SALIENCY_HEADINGS`."""
    if row.cost.method == UNMERGED.key:
        return (*cost_cells(row.cost), "1", "1", "1")
    return (*cost_cells(row.cost), f"{row.iou:.3f}", f"{row.iou_median:.3f}", f"{row.iou_worst:.3f}")


def tables(result: Result) -> list[Table]:
    """For the terminal: what every version costs and keeps, what the photographs were called, and the second part."""
    rows = [(row.cost, clip_cells(result, row)) for row in result.rows]
    title = f"CLIP ViT-B/16 on {images(result)}, {len(result.texts.labels)} labels"
    made = [_measured(title, (*COST_HEADINGS, *CLIP_HEADINGS), rows), _labels(result)]
    if result.saliency is not None:
        second = [(row.cost, saliency_cells(row)) for row in result.saliency.rows]
        made.append(_measured(f"Saliency ViT-S/14 on {images(result)}", (*COST_HEADINGS, *SALIENCY_HEADINGS), second))
    return made


def markdown(result: Result) -> str:
    """The first of `tables`, as Markdown."""
    headings = ("CLIP ViT-B/16", *COST_HEADINGS, *CLIP_HEADINGS)
    lines = [f"| {' | '.join(headings)} |", f"|---|---|{'--:|' * (len(headings) - 2)}"]
    for row in result.rows:
        label = f"**{label_of(row.cost)}**" if row.cost.method == TURBO.key else label_of(row.cost)
        lines.append(f"| {' | '.join((label, *clip_cells(result, row)))} |")
    return "\n".join(lines)


def machine_line(machine: Machine) -> str:
    """Machine, threads, versions and date, in one line."""
    return (
        f"{machine.cpu}; {machine.threads} thread{'s' if machine.threads > 1 else ''}; turbovlm {machine.turbovlm}, "
        f"torch {machine.torch}, transformers {machine.transformers}, Python {machine.python}; {machine.date}"
    )


def summary(result: Result) -> list[str]:
    """What the default saved and cost at each share, one sentence each, and whose texts these were."""
    rows = [row for row in result.rows if row.cost.method == TURBO.key]
    return [
        *(
            f"turbovlm at {row.cost.macs:.0%} of the multiply-accumulates: {row.cost.speedup:.2f}× as fast, the same "
            f"label for {row.same} of {images(result)}, cosine {row.cosine:.3f}."
            for row in rows
        ),
        f"Texts: {result.texts.source}.",
    ]


def warnings(result: Result) -> list[str]:
    """What a reader must know before trusting the numbers, one sentence each."""
    found = unsteady(result.timing, result.settings.rounds)
    if result.saliency is not None:
        found += [f"Saliency: {said}" for said in unsteady(result.saliency.timing, result.settings.rounds)]
    if len(result.found) < FEW:
        found.append(f"Quality is measured on {images(result)} only.")
    return found


def images(result: Result) -> str:
    """How many."""
    return "1 image" if len(result.found) == 1 else f"{len(result.found)} images"


def label_of(cost: Cost) -> str:
    """What the method is called."""
    return next(method.label for method in (UNMERGED, *METHODS) if method.key == cost.method)


def method_settings(method: Method) -> str:
    """As they are written in code; empty where nothing is merged."""
    if not method.merges:
        return ""
    return ", ".join(f"{name}={value!r}" for name, value in method.settings.items()) or "turbovlm's defaults"


def cost_cells(cost: Cost) -> tuple[str, ...]:
    """Under `COST_HEADINGS`."""
    return (cost.setting, str(cost.tokens), f"{cost.macs:.0%}", f"{cost.speedup:.2f}×")


def unsteady(timing: Timing, rounds: int) -> list[str]:
    """What must be known of times that varied or were measured seldom, one sentence each."""
    found = []
    if timing.disturbed:
        low, high = timing.ms_range
        found.append(
            f"something else was using the processor: the unmerged model itself took between {low:.0f} and "
            f"{high:.0f} ms per image (10th and 90th percentile), so read the speed-ups with care."
        )
    if timing.rounds < rounds:
        found.append(f"timed in {timing.rounds} rounds instead of {rounds}: the machine is slow or busy.")
    return [said[0].upper() + said[1:] for said in found]


def _measured(title: str, headings: Sequence[str], rows: Sequence[tuple[Cost, tuple[str, ...]]]) -> Table:
    table = _table(title)
    table.add_column("method", no_wrap=True, vertical="bottom")
    for heading in headings:
        justify = "left" if heading == headings[0] else "right"
        table.add_column(heading.replace(" ", "\n", 1), justify=justify, vertical="bottom", no_wrap=True)
    for cost, cells in rows:
        if cost.method == TURBO.key:
            table.add_section()
        table.add_row(label_of(cost), *cells)
    return table


def _labels(result: Result) -> Table:
    shown = result.found[: result.settings.shown]
    left = len(result.found) - len(shown)
    share = result.settings.shares[0]
    table = _table(f"Likeliest label (merged: flops={share:g})")
    table.caption = f"and {left} more: --json has all" if left and result.settings.shown else None
    for heading, justify in (("image", "left"), ("unmerged", "left"), ("", "right"), ("merged", "left"), ("", "right")):
        table.add_column(heading, justify=justify, overflow="fold")
    for found in shown:
        whole, merged = f"{found.probability:.1%}", f"{found.merged_probability:.1%}"
        table.add_row(found.photo.name, found.label, whole, found.merged_label, merged)
    return table


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
