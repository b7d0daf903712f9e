"""Methods side by side on the same images: what each costs, how far it drifts, and what it merged."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.calibration.outputs import count_images, select_images
from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.demo.report import FEW, label_of, method_settings, unsteady
from turbovlm_lab.demo.result import (
    METHODS,
    SMALLER,
    TURBO,
    UNMERGED,
    Cost,
    Machine,
    Method,
    Settings,
    Timing,
    describe_machine,
)
from turbovlm_lab.demo.versions import (
    Agreement,
    Encoder,
    Version,
    agreement,
    costs,
    count_forwards,
    in_turn,
    timing_of,
    trace_of,
    versions_of,
)
from turbovlm_lab.studio.image_sets import MOST_IMAGES, ImageSet, Named
from turbovlm_lab.studio.jobs import Report

if TYPE_CHECKING:
    from PIL.Image import Image

    from turbovlm.encoder.state import BlockTrace
    from turbovlm_lab.studio.subjects import Encodes

JSON_FORMAT = 1
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Of the multiply-accumulates, that can be asked for."""
SHOWN = 6
"""Images of which is kept what was merged."""
SIDE = 224
"""Pixels per side of a drawing."""


@dataclass(frozen=True)
class Row:
    """One method at one share, against the unmerged model."""

    cost: Cost
    kept: Agreement


@dataclass(frozen=True, eq=False)
class Merged:
    """What a version made of the images that are shown.

    Attributes:
        traces: of each block; none where nothing merges.
        side: patches per side of the images that it reads.
    """

    traces: tuple[BlockTrace, ...]
    side: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that was measured; `rows` begin with the unmerged model's.

    Attributes:
        title: the model's.
        names: of the images, in order; `left_out`: why others were not read, and a method not measured.
        shown: the first of them, as the model saw them; `merged`: by method and share, what became of those.
    """

    title: str
    machine: Machine
    settings: Settings
    methods: tuple[Method, ...]
    timing: Timing
    rows: tuple[Row, ...]
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    shown: tuple[Named, ...]
    merged: Mapping[tuple[str, float], Merged]
    seconds: float

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return len(self.merged[TURBO.key, self.settings.shares[0]].traces)


def compare(
    loaded: Encodes, title: str, pictures: ImageSet, settings: Settings, methods: Sequence[Method], report: Report
) -> Comparison:
    """Measure every method at every share, in turn.

    Args:
        methods: beside `TURBO`, which is always measured: the others cost what it turns out to cost.

    Raises:
        ConfigError: fewer than two images, too many, or no shares.
        Stopped: somebody has asked for it.
    """
    images = [named.image for named in pictures.images]
    check(len(images), settings.shares)
    methods = tuple(method for method in METHODS if method is TURBO or method in methods)
    started = time.perf_counter()
    encoder = Encoder(loaded.model, loaded.side, loaded.patch, loaded.encode, loaded.fixed)
    with torch.inference_mode():
        report.begin("preparing versions of equal cost", len(settings.shares))
        without = _not_smaller(encoder) if SMALLER in methods else None
        if without is not None:
            methods = tuple(method for method in methods if method is not SMALLER)
        versions = versions_of(encoder, settings.shares, methods, report.advance)
        report.begin("preparing the images")
        pixels = {side: loaded.prepare(images, side) for side in {version.side for version in versions}}
        report.begin("encoding, all versions in turn", count_forwards(len(images), settings, len(methods)))
        finish = partial(_vectors, encoder)
        runs = in_turn(versions, pixels, encoder.encode, finish, settings, report.advance)
        report.begin("recording what was merged", len(versions))
        merged = _merged(encoder, versions[1:], pixels, settings.shown, report)
    whole = next(iter(runs.values())).output
    return Comparison(
        title=title,
        machine=describe_machine(),
        settings=settings,
        methods=methods,
        timing=timing_of(runs),
        rows=tuple(Row(cost, agreement(whole.float(), output.float())) for cost, output in costs(runs)),
        names=pictures.names,
        left_out=pictures.left_out if without is None else (*pictures.left_out, without),
        shown=tuple(Named(named.name, _seen(loaded, named.image)) for named in pictures.images[: settings.shown]),
        merged=merged,
        seconds=time.perf_counter() - started,
    )


def check(images: int, shares: Sequence[float]) -> None:
    """See that there is enough to compare, and not too much.

    Raises:
        ConfigError: there is not.
    """
    if images < 2:
        raise ConfigError(f"images: {images or 'none'}; give at least two, as drift is measured from their mean")
    if images > MOST_IMAGES:
        raise ConfigError(f"images: {images}; at most {MOST_IMAGES} are taken")
    if not shares:
        raise ConfigError("shares: choose at least one share of the multiply-accumulates")


def warnings(found: Comparison) -> list[str]:
    """What a reader must know before trusting the numbers, one sentence each."""
    few = [f"Drift is measured on {len(found.names)} images only."] if len(found.names) < FEW else []
    return [*found.left_out, *unsteady(found.timing, found.settings.rounds), *few]


def summary(found: Comparison) -> list[str]:
    """What each share came to, one sentence each."""
    said = []
    for share in found.settings.shares:
        own, *others = [row for row in found.rows if row.cost.share == share]
        beside = ", ".join(f"{label_of(row.cost)} {_drift(row):.3f}" for row in others)
        slower = "" if own.cost.speedup >= 1 else ", which is slower than unmerged,"
        said.append(
            f"At {own.cost.macs:.0%} of the multiply-accumulates turbovlm is {own.cost.speedup:.2f}× as fast{slower} "
            f"and drifts {_drift(own):.3f}{f' ({beside})' if beside else ''}."
        )
    return said


def points(found: Comparison) -> list[tuple[Cost, float]]:
    """Each version's cost and drift."""
    return [(row.cost, 0.0 if row.cost.method == UNMERGED.key else _drift(row)) for row in found.rows]


def to_json(found: Comparison) -> str:
    """The measurements; drawings are left out."""
    content: dict[str, Any] = {
        "format": JSON_FORMAT,
        "model": found.title,
        "machine": dataclasses.asdict(found.machine),
        "settings": {name: value for name, value in dataclasses.asdict(found.settings).items() if name != "shown"},
        "methods": {method.key: method_settings(method) for method in found.methods},
        "timing": dataclasses.asdict(found.timing),
        "rows": [_flat(row) for row in found.rows],
        "images": list(found.names),
        "left_out": list(found.left_out),
        "seconds": found.seconds,
    }
    return json.dumps(content, indent=2) + "\n"


def to_csv(found: Comparison) -> str:
    """A line for each version."""
    rows = [_flat(row) for row in found.rows]
    written = io.StringIO()
    writer = csv.DictWriter(written, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def drawings(found: Comparison, share: float, block: int, place: int) -> dict[str, tuple[int, Image]]:
    """Of one image, by method: the tokens left and which patches have become one token, each in its mean colour.

    Args:
        share: one of those that were measured; `block`: the block after which to draw, from 0; `place`: of the image
            among those shown.
    """
    from turbovlm.visualize import groups

    drawn, image = {}, found.shown[place].image
    for method in found.methods:
        merged = found.merged[method.key, share]
        if merged.traces:
            trace = merged.traces[block]
            cell = max(SIDE // merged.side, 3)
            tokens = trace.sizes.shape[1]
            drawn[method.key] = (tokens, groups(merged.traces, image, block=trace.block, batch_index=place, cell=cell))
        else:
            drawn[method.key] = (_row(found, method, share).cost.tokens, _cells(image, merged.side))
    return drawn


def _vectors(encoder: Encoder, version: Version, output: Tensor) -> Tensor:
    """What an image is compared by, `[images, width]`: an embedding, or all tokens, those of a smaller image resized.

    Tokens are kept in bfloat16, as those of 200 images by a dozen versions would fill a gigabyte.
    """
    if output.ndim != 3:
        return output.flatten(1)
    side, whole = version.side // encoder.patch, encoder.side // encoder.patch
    if side != whole:
        prefix = output.shape[1] - side**2
        grid = output[:, prefix:].transpose(1, 2).reshape(len(output), -1, side, side)
        resized = F.interpolate(grid, size=(whole, whole), mode="bilinear").flatten(2).transpose(1, 2)
        output = torch.cat([output[:, :prefix], resized], dim=1)
    return output.flatten(1).bfloat16()


def _merged(
    encoder: Encoder, versions: Sequence[Version], pixels: Mapping[int, Any], shown: int, report: Report
) -> dict[tuple[str, float], Merged]:
    made = {}
    for version in versions:
        assert version.share is not None, "the unmerged one is not among them"
        some = range(min(shown, count_images(pixels[version.side])))
        traces = tuple(trace_of(encoder, version, select_images(pixels[version.side], some)))
        made[version.method.key, version.share] = Merged(traces, version.side // encoder.patch)
        report.advance()
    return made


def _seen(loaded: Encodes, image: Image) -> Image:
    return loaded.seen(image).resize((SIDE, SIDE))


def _not_smaller(encoder: Encoder) -> str | None:
    """Why the encoder cannot be given smaller images, in a sentence; None where it can."""
    whole, less = (torch.zeros(1, 3, side, side) for side in (encoder.side, encoder.side - encoder.patch))
    try:
        given, wanted = encoder.encode(encoder.model, less), encoder.encode(encoder.model, whole)
    except TurboError as error:
        return f"Smaller images are left out: {error}."
    if given.ndim != 3 and given.shape != wanted.shape:
        return "Smaller images are left out: the model gives fewer values of them, which cannot be compared."
    return None


def _cells(image: Image, side: int) -> Image:
    """An image of that many patches per side, each in its mean colour with a white border."""
    from PIL.Image import Resampling

    cell = SIDE // side
    drawn = image.resize((side, side), Resampling.BOX).resize((side * cell, side * cell), Resampling.NEAREST)
    white = (255, 255, 255)
    for line in range(cell - 1, side * cell, cell):
        drawn.paste(white, (line, 0, line + 1, drawn.height))
        drawn.paste(white, (0, line, drawn.width, line + 1))
    return drawn


def _row(found: Comparison, method: Method, share: float) -> Row:
    return next(row for row in found.rows if row.cost.method == method.key and row.cost.share == share)


def _drift(row: Row) -> float:
    assert row.kept.drift is not None, "there are two images at least"
    return row.kept.drift


def _flat(row: Row) -> dict[str, Any]:
    """One level of names, as a table has them."""
    cost = dataclasses.asdict(row.cost)
    low, high = cost.pop("speedup_range")
    kept = {"drift": row.kept.drift, "cosine": row.kept.cosine, "cosine_worst": row.kept.worst}
    return {**cost, "speedup_low": low, "speedup_high": high, **kept}
