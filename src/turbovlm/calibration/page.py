"""The report of a calibration, one HTML page: the settings, what they promise, and the curve that was walked."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from turbovlm.calibration.result import Calibration
from turbovlm.errors import TurboError

_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>turbovlm calibrate</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }}
td:first-child, th:first-child {{ text-align: left; }} svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
<p>{promise}</p>
{curve}
<h2>Settings</h2>
<table>{settings}</table>
<h2>Tokens merged in each block</h2>
<table>{blocks}</table>
<p><code>{command}</code><br>{about}</p>
</body></html>
"""


def sentence(calibration: Calibration) -> str:
    """What the settings promise."""
    promise = calibration
    faster = "" if promise.speedup is None else f", {promise.speedup:.2f} times faster as measured here"
    return (
        f"{promise.flops:.1%} of the encoder's multiply-accumulates are left{faster}. On {promise.images} images that "
        f"took no part in the search the mean drift is {promise.drift:.4f}. At least {promise.coverage:.0%} of as "
        f"many other images like these drift no further than {promise.bound:.4f}, with a probability of 95 %."
    )


def write_page(calibration: Calibration, path: Path, title: str, command: str, about: str) -> None:
    """Write the page.

    Raises:
        TurboError: the file cannot be written.
    """
    config: Any = calibration.config
    shown = {"degree": config.degree, "alpha": config.alpha, "similarity": config.similarity}
    shown |= {"partition": config.partition, "seed": config.seed, "dense": config.dense}
    amounts: Sequence[int] = config.r if isinstance(config.r, tuple) else ()
    text = _PAGE.format(
        title=escape(title),
        promise=escape(sentence(calibration)),
        curve=_curve(calibration),
        settings="".join(f"<tr><td>{name}</td><td>{escape(str(value))}</td></tr>" for name, value in shown.items()),
        blocks=_row("th", ["block", *map(str, range(len(amounts)))]) + _row("td", ["r", *map(str, amounts)]),
        command=escape(command),
        about=escape(about),
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TurboError(f"{path}: {error.strerror}") from error


def _row(cell: str, values: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{cell}>{value}</{cell}>' for value in values)}</tr>"


def _curve(calibration: Calibration) -> str:
    """Drift over cost, as SVG."""
    from matplotlib.figure import Figure

    promise = calibration
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*promise.curve), marker="o", markersize=4, color="#0b6e99")
    axis.plot(
        [promise.flops] * 2,
        [promise.drift, promise.bound],
        marker="_",
        markersize=8,
        color="#c2571a",
        label=f"these settings, and what {promise.coverage:.0%} of images stay below",
    )
    axis.invert_xaxis()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("share of the encoder's multiply-accumulates")
    axis.set_ylabel("drift")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]
