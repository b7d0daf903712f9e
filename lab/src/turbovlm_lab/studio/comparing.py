"""The second tab: methods side by side on many images."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from turbovlm_lab.demo.result import METHODS, TURBO, Settings
from turbovlm_lab.studio import compared, links
from turbovlm_lab.studio.comparison import SHARES, SHOWN, Comparison, check, compare, to_csv, to_json
from turbovlm_lab.studio.controls import seen
from turbovlm_lab.studio.image_sets import MOST_IMAGES, built_in, files_in, read_files
from turbovlm_lab.studio.jobs import Report
from turbovlm_lab.studio.running import Runner, Updates, Work
from turbovlm_lab.studio.subjects import Models
from turbovlm_lab.studio.uploads import FORMATS, MEGABYTES, MEGAPIXELS, inside_uploads

DEMO, UPLOAD, FOLDER = "demo", "upload", "folder"
BATCH = 8
ROUNDS = (2, 12, 4)
"""Rounds of timing: at least, at most, at first."""
SECONDS = 300
"""After which no further round of timing begins."""
COUNTS = (2, 28, 7)
"""Built-in images: at least, at most, at first."""
FIRST_SHARES = (0.8, 0.6, 0.4)
OTHERS = tuple(method for method in METHODS if method is not TURBO)


@dataclass(frozen=True, eq=False)
class _Controls:
    model: gr.Dropdown
    images: gr.Radio
    count: gr.Slider
    files: gr.File
    methods: gr.CheckboxGroup
    shares: gr.CheckboxGroup
    rounds: gr.Slider

    @property
    def all(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True, eq=False)
class _Results:
    found: gr.State
    said: gr.HTML
    chart: gr.HTML
    table: gr.HTML
    csv: gr.DownloadButton
    json: gr.DownloadButton
    share: gr.Radio
    block: gr.Slider
    patches: gr.HTML

    @property
    def all(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def of(self, found: Comparison, folder: Path) -> Updates:
        """What a comparison is shown as; its files are written into the folder."""
        share, depth = found.settings.shares[0], found.depth
        shares = [(f"{each:.0%}", each) for each in found.settings.shares]
        return {
            self.found: found,
            self.said: compared.said(found),
            self.chart: compared.chart(found),
            self.table: compared.table(found),
            self.csv: gr.update(value=_written(folder, "comparison.csv", to_csv(found)), **seen(True)),
            self.json: gr.update(value=_written(folder, "comparison.json", to_json(found)), **seen(True)),
            self.share: gr.update(choices=shares, value=share, **seen(True)),
            self.block: gr.update(maximum=depth, value=depth, **seen(True)),
            self.patches: compared.patches(found, share, depth),
        }


def tab(shop: Models) -> None:
    """Add the tab's components."""
    if not shop.encoders:
        gr.Markdown("None of the models here encodes images; methods are compared on encoders.")
        return
    written = tempfile.TemporaryDirectory(prefix="turbovlm-compare-")  # lives as long as the page
    with gr.Row(elem_classes="studio"):
        with gr.Column(scale=2, min_width=300):
            controls = _left(shop)
            runner = Runner.add("compare", "Compare")
        with gr.Column(scale=4, min_width=300):
            results = _right()
    runner.wire(
        shop, partial(_prepare, shop), controls.all, lambda found: results.of(found, Path(written.name)), results.all
    )
    again = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    controls.images.input(partial(_of_images, shop), controls.images, [controls.count, controls.files], **again)
    shown = [results.found, results.share, results.block]
    gr.on(
        [results.share.input, results.block.input],
        _patches,
        shown,
        results.patches,
        trigger_mode="always_last",
        **again,
    )
    links.keep("compare", {name: getattr(controls, name) for name in _readers(shop)})

    def open_link(request: gr.Request) -> Updates:
        return _of_link(shop, controls, runner, request)

    gr.context.Context.root_block.load(open_link, None, [*controls.all, runner.problem], **again)


def _left(shop: Models) -> _Controls:
    models = [(subject.title, key) for key, subject in shop.encoders.items()]
    folders = [(folder.name, f"{FOLDER}{place}") for place, folder in enumerate(shop.folders, 1)]
    first = next((key for key, subject in shop.encoders.items() if subject.needs() is None), models[0][1])
    low, high, count = COUNTS
    return _Controls(
        model=gr.Dropdown(models, value=first, label="Model", elem_id="compare-model", filterable=False),
        images=gr.Radio(
            [("built in", DEMO), *folders, ("my own", UPLOAD)], value=DEMO, label="Images", elem_id="compare-images"
        ),
        count=gr.Slider(low, high, count, step=1, label="How many of them", elem_id="compare-count", buttons=[]),
        files=gr.File(
            file_count="multiple",
            file_types=["image"],
            label=f"2 to {MOST_IMAGES} images, {MEGABYTES} MB each",
            elem_id="compare-files",
            **seen(False),
            height=180,
        ),
        methods=gr.CheckboxGroup(
            [(method.label, method.key) for method in OTHERS],
            value=[method.key for method in OTHERS],
            label="Beside turbovlm, at its cost",
            elem_id="compare-methods",
        ),
        shares=gr.CheckboxGroup(
            [(f"{share:.0%}", share) for share in SHARES],
            value=list(FIRST_SHARES),
            label="Multiply-accumulates left",
            elem_id="compare-shares",
        ),
        rounds=gr.Slider(*ROUNDS, step=1, label="Rounds of timing", elem_id="compare-rounds", buttons=[]),
    )


def _right() -> _Results:
    start = (
        "<p class='note'>Every method encodes the same images, in turn, round by round, at the cost that turbovlm "
        "turns out to have at each share. Drift is how far the model's output moves from the unmerged one's. "
        f"Press Compare.</p><p class='note'>Images of yours: {', '.join(FORMATS)}; at most {MEGABYTES} MB and "
        f"{MEGAPIXELS} megapixels each. They stay in this process.</p>"
    )
    said = gr.HTML(start, elem_id="compare-said")
    chart = gr.HTML("", elem_id="compare-chart")
    table = gr.HTML("", elem_id="compare-table")
    with gr.Row():
        csv = gr.DownloadButton("CSV", size="sm", **seen(False), elem_id="compare-csv", min_width=100)
        json_ = gr.DownloadButton("JSON", size="sm", **seen(False), elem_id="compare-json", min_width=100)
    share = gr.Radio([], label="What was merged, at", **seen(False), elem_id="compare-share")
    block = gr.Slider(1, 12, 12, step=1, label="behind block", **seen(False), elem_id="compare-block", buttons=[])
    patches = gr.HTML("", elem_id="compare-patches")
    return _Results(gr.State(None, time_to_live=3600), said, chart, table, csv, json_, share, block, patches)


def _prepare(
    shop: Models,
    model: str,
    images: str,
    count: int,
    files: Sequence[str] | None,
    methods: Sequence[str],
    shares: Sequence[float],
    rounds: int,
) -> Work:
    """What there is to do, checked as far as it can be without the model."""
    paths: list[Path] = []
    if images == UPLOAD:
        paths = [inside_uploads(file) for file in files or ()]
    elif images != DEMO:
        paths = files_in(shop.folders[int(images.removeprefix(FOLDER)) - 1], int(count))
    found = int(count) if images == DEMO else len(paths)
    check(found, shares)
    falling = tuple(sorted(shares, reverse=True))
    settings = Settings(falling, min(BATCH, found), int(rounds), SECONDS, SHOWN)
    chosen = [method for method in OTHERS if method.key in methods]
    title = shop.encoders[model].title

    def work(report: Report) -> Comparison:
        if not shop.is_loaded(model):
            report.begin(f"loading {title}")
        loaded: Any = shop[model]
        report.begin("reading the images", len(paths))
        pictures = built_in(int(count)) if images == DEMO else read_files(paths, report.advance)
        return compare(loaded, title, pictures, settings, chosen, report)

    return work


def _of_images(shop: Models, images: str) -> tuple[Any, Any]:
    """The controls beneath, for this kind of images."""
    low, high, first = COUNTS
    if images not in (DEMO, UPLOAD):
        high, first = MOST_IMAGES, 32
    count = gr.update(**seen(images != UPLOAD), maximum=high, minimum=low, value=first)
    return count, gr.update(**seen(images == UPLOAD))


def _patches(found: Comparison | None, share: float, block: int) -> str:
    return "" if found is None else compared.patches(found, share, int(block))


def _readers(shop: Models) -> dict[str, links.Reader]:
    """Of what a link has."""
    kinds = [DEMO, UPLOAD, *(f"{FOLDER}{place}" for place in range(1, len(shop.folders) + 1))]
    return {
        "model": links.one_of({key: key for key in shop.encoders}),
        "images": links.one_of({kind: kind for kind in kinds}),
        "count": links.number(COUNTS[0], MOST_IMAGES),
        "methods": links.some_of({method.key: method.key for method in OTHERS}),
        "shares": links.some_of({f"{share:g}": share for share in SHARES}),
        "rounds": links.number(*ROUNDS[:2]),
    }


def _of_link(shop: Models, controls: _Controls, runner: Runner, request: gr.Request) -> Updates:
    """What the controls show for a link, and what is wrong with it."""
    values, wrong = links.read("compare", _readers(shop), request)
    images = values.get("images", DEMO)
    count, files = _of_images(shop, images)
    most = COUNTS[1] if images == DEMO else MOST_IMAGES
    if "count" in values:
        count["value"] = min(values.pop("count"), most)
    chosen = {getattr(controls, name): gr.update(value=value) for name, value in values.items()}
    return {**chosen, controls.count: count, controls.files: files, runner.problem: wrong}


def _written(folder: Path, name: str, text: str) -> str:
    """The path of a file with that text, in a folder of its own, so that several may have the same name."""
    path = Path(tempfile.mkdtemp(dir=folder)) / name
    path.write_text(text, encoding="utf-8")
    return str(path)
