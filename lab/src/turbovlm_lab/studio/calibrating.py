"""The third tab: settings for a model, found on a user's own images or prompts."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from turbovlm.calibration.calibrate import FEWEST, check_count
from turbovlm.calibration.plot import save_calibration
from turbovlm.calibration.result import format_drift
from turbovlm.cli.calibrate import EFFORT
from turbovlm.errors import ConfigError
from turbovlm_lab.studio import links, render
from turbovlm_lab.studio.calibration import (
    STEPS,
    TARGETS,
    Calibrated,
    Wanted,
    calibrate_encoder,
    calibrate_pipeline,
    check_images,
    lines_of,
    prompts_in,
)
from turbovlm_lab.studio.controls import seen
from turbovlm_lab.studio.image_sets import MOST_IMAGES, files_in, read_files
from turbovlm_lab.studio.jobs import Report, in_words
from turbovlm_lab.studio.running import Runner, Updates, Work
from turbovlm_lab.studio.subjects import WORDS, Models
from turbovlm_lab.studio.uploads import FORMATS, MEGABYTES, MEGAPIXELS, inside_uploads

UPLOAD, FOLDER = "upload", "folder"
EFFORTS = (1, 16, EFFORT)
"""At least, at most, at first."""
MOST_STEPS = 50
DEPENDING = ("images", "files", "prompts", "effort", "per_image", "dense", "steps")
"""Controls that there are for some models only."""
FILE = "turbo.json"
CHECKED = {"true": True, "false": False}
"""A checkbox as a link has it."""


@dataclass(frozen=True, eq=False)
class _Controls:
    model: gr.Dropdown
    images: gr.Radio
    files: gr.File
    prompts: gr.Textbox
    target: gr.Radio
    value: gr.Number
    effort: gr.Slider
    per_image: gr.Checkbox
    dense: gr.Checkbox
    steps: gr.Slider

    @property
    def all(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True, eq=False)
class _Results:
    said: gr.HTML
    figure: gr.HTML
    settings: gr.DownloadButton
    lines: gr.HTML
    held: gr.HTML

    @property
    def all(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def of(self, made: Calibrated, folder: Path) -> Updates:
        """What a calibration is shown as; its file is written into the folder."""
        own = Path(tempfile.mkdtemp(dir=folder))
        made.found.save(own / FILE)
        save_calibration(made.found, own / "turbo.png", title=made.subject.title)
        return {
            self.said: said(made),
            self.figure: figure(made, own / "turbo.png"),
            self.settings: gr.update(value=str(own / FILE), **seen(True)),
            self.lines: f"<h3>In Python</h3><pre class='code' tabindex='0'>{escape(lines_of(made, FILE))}</pre>",
            self.held: held(made),
        }


def tab(shop: Models) -> None:
    """Add the tab's components."""
    if not _subjects(shop):
        gr.Markdown("None of the models here can be calibrated: there is neither an encoder of images nor a pipeline.")
        return
    written = tempfile.TemporaryDirectory(prefix="turbovlm-calibrate-")  # lives as long as the page
    with gr.Row(elem_classes="studio"):
        with gr.Column(scale=2, min_width=300):
            controls = _left(shop)
            runner = Runner.add("calibrate", "Calibrate")
        with gr.Column(scale=4, min_width=300):
            results = _right()
    runner.wire(
        shop, partial(_prepare, shop), controls.all, lambda made: results.of(made, Path(written.name)), results.all
    )
    again = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    depending = [getattr(controls, name) for name in DEPENDING]
    gr.on(
        [controls.model.input, controls.images.input],
        partial(_depending, shop),
        [controls.model, controls.images],
        depending,
        **again,
    )
    controls.target.input(_of_target, controls.target, controls.value, **again)
    links.keep("calibrate", {name: getattr(controls, name) for name in _readers(shop)})

    def open_link(request: gr.Request) -> Updates:
        values, wrong = links.read("calibrate", _readers(shop), request)
        chosen = {name: gr.update(value=value) for name, value in values.items()}
        model = values.get("model", _first(shop))
        for name, update in zip(DEPENDING, _depending(shop, model, values.get("images", UPLOAD))):
            chosen[name] = {**update, **chosen.get(name, {})}
        if "target" in values:
            chosen["value"] = {**_of_target(values["target"]), **chosen.get("value", {})}
        return {**{getattr(controls, name): update for name, update in chosen.items()}, runner.problem: wrong}

    gr.context.Context.root_block.load(open_link, None, [*controls.all, runner.problem], **again)


def said(made: Calibrated) -> str:
    """What was found and what it promises, in words and as a few numbers."""
    found = made.found
    left_out = "".join(f"<p class='warned'>{escape(why)}</p>" for why in made.left_out)
    faster = "" if found.speedup is None else render.card("Speed-up", f"{found.speedup:.2f}×", "as measured")
    cards = (
        render.card("Multiply-accumulates", f"{found.flops:.1%}", "of them are left"),
        render.card("Drift", format_drift(found.drift), f"mean over {found.images} held out"),
        render.card("Bound", format_drift(found.bound), f"for {found.coverage:.0%} of others like these"),
        faster or render.card("Search", in_words(made.seconds), f"on {len(made.searched)} {made.noun}"),
    )
    return f"<div class='cards'>{''.join(cards)}</div><p class='promise'>{escape(str(found))}</p>{left_out}"


def figure(made: Calibrated, path: Path) -> str:
    """The drawing of a file: drift over cost, and tokens merged in each block."""
    alt = "Drift over the share of multiply-accumulates left: " + ", ".join(
        f"{share:.0%} {format_drift(drift)}" for share, drift in made.found.curve
    )
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
    return f"<figure class='paper wider'><img src='{source}' alt='{escape(alt, quote=True)}'></figure>"


def held(made: Calibrated) -> str:
    """What took no part in the search, by name."""
    names = ", ".join(made.held)
    return (
        f"<details class='held'><summary>{len(made.held)} of {len(made.held) + len(made.searched)} {made.noun} were "
        f"held out: drift and bound are measured on these</summary><p class='note'>{escape(names)}</p></details>"
    )


def _subjects(shop: Models) -> dict[str, str]:
    """Titles of what can be calibrated, by key: encoders of images, and pipelines that are given prompts."""
    return {
        key: subject.title
        for key, subject in shop.subjects.items()
        if subject.encodes or (subject.denoises and subject.takes == WORDS)
    }


def _first(shop: Models) -> str:
    """The first that can be loaded here, or the first."""
    keys = list(_subjects(shop))
    return next((key for key in keys if shop.subjects[key].needs() is None), keys[0])


def _left(shop: Models) -> _Controls:
    models = [(title, key) for key, title in _subjects(shop).items()]
    folders = [(folder.name, f"{FOLDER}{place}") for place, folder in enumerate(shop.folders, 1)]
    first, target = _first(shop), next(iter(TARGETS))
    images, files, prompts, effort, per_image, dense, steps = _depending(shop, first, UPLOAD)
    return _Controls(
        model=gr.Dropdown(models, value=first, label="Model", elem_id="calibrate-model", filterable=False),
        images=gr.Radio(
            [("my own", UPLOAD), *folders],
            value=UPLOAD,
            label="Images",
            elem_id="calibrate-images",
            elem_classes=images["elem_classes"],
        ),
        files=gr.File(
            file_count="multiple",
            file_types=["image"],
            label=f"{FEWEST} to {MOST_IMAGES} images, {MEGABYTES} MB each",
            elem_id="calibrate-files",
            elem_classes=files["elem_classes"],
            height=180,
        ),
        prompts=gr.Textbox(
            prompts.get("value", ""),
            lines=8,
            max_lines=8,
            max_length=40_000,
            label=f"{FEWEST} prompts or more, each in a line",
            elem_id="calibrate-prompts",
            elem_classes=prompts["elem_classes"],
        ),
        target=gr.Radio(
            [(f"{name} · {title}", name) for name, (title, _) in TARGETS.items()],
            value=target,
            label="What is asked for",
            elem_id="calibrate-target",
        ),
        value=gr.Number(TARGETS[target][1], label=target, elem_id="calibrate-value", step=0.01, buttons=[]),
        effort=gr.Slider(
            *EFFORTS,
            step=1,
            label="Effort: passes of the search",
            elem_id="calibrate-effort",
            buttons=[],
            elem_classes=effort["elem_classes"],
        ),
        per_image=gr.Checkbox(
            False,
            label="Images with more redundancy lose more, for images one at a time",
            elem_id="calibrate-per_image",
            elem_classes=per_image["elem_classes"],
        ),
        dense=gr.Checkbox(
            False,
            label="Dense: what reads the model needs every position",
            elem_id="calibrate-dense",
            elem_classes=dense["elem_classes"],
        ),
        steps=gr.Slider(
            1,
            MOST_STEPS,
            STEPS,
            step=1,
            label="Denoising steps",
            elem_id="calibrate-steps",
            buttons=[],
            elem_classes=steps["elem_classes"],
        ),
    )


def _right() -> _Results:
    start = (
        "<p class='note'>Images need no labels: give those that the model will see. Half of them are searched on, by "
        "chance; on the others it is measured what can be promised. This takes minutes, and the model stays as it is."
        f"</p><p class='note'>{', '.join(FORMATS)}; at most {MEGABYTES} MB and {MEGAPIXELS} megapixels each. They stay "
        "in this process.</p>"
    )
    return _Results(
        gr.HTML(start, elem_id="calibrate-said"),
        gr.HTML("", elem_id="calibrate-figure"),
        gr.DownloadButton(f"Download {FILE}", size="md", **seen(False), elem_id="calibrate-settings"),
        gr.HTML("", elem_id="calibrate-lines"),
        gr.HTML("", elem_id="calibrate-held"),
    )


def _depending(shop: Models, model: str, images: str) -> tuple[dict[str, Any], ...]:
    """What there is of the other controls for a model and where its images are, as `DEPENDING`."""
    encodes = shop.subjects[model].encodes
    return (
        gr.update(**seen(encodes and bool(shop.folders))),
        gr.update(**seen(encodes and images == UPLOAD)),
        gr.update(**seen(not encodes), **({} if encodes else {"value": "\n".join(_prompts(model))})),
        gr.update(**seen(encodes)),
        gr.update(**seen(encodes)),
        gr.update(**seen(encodes)),
        gr.update(**seen(not encodes)),
    )


def _prompts(model: str) -> list[str]:
    """Such as a built-in pipeline has learnt, evenly spaced; none of others."""
    if model != "emoji":
        return []
    from turbovlm_lab.zoo.emoji import emoji_prompts

    known = emoji_prompts()
    return [known[place * len(known) // FEWEST] for place in range(FEWEST)]


def _of_target(target: str) -> dict[str, Any]:
    updated: dict[str, Any] = gr.update(value=TARGETS[target][1], label=target)
    return updated


def _prepare(
    shop: Models,
    model: str,
    images: str,
    files: Sequence[str] | None,
    prompts: str,
    target: str,
    value: float | None,
    effort: int,
    per_image: bool,
    dense: bool,
    steps: int,
) -> Work:
    """What there is to do, checked as far as it can be without the model."""
    subject = shop.subjects[model]
    if value is None:
        raise ConfigError(f"{target}: give a number, such as {TARGETS[target][1]}")
    wanted = Wanted(target, float(value), int(effort), bool(per_image), bool(dense), int(steps))

    def loaded(report: Report) -> Any:
        if not shop.is_loaded(model):
            report.begin(f"loading {subject.title}")
        return shop[model]

    if not subject.encodes:
        given = prompts_in(prompts)
        check_count("prompts", len(given))
        return lambda report: calibrate_pipeline(loaded(report).model, subject, given, wanted, report)
    paths = _files(shop, images, files)
    check_images(len(paths))

    def work(report: Report) -> Calibrated:
        encoder = loaded(report)
        report.begin("reading the images", len(paths))
        pictures = read_files(paths, report.advance)
        return calibrate_encoder(encoder, subject, pictures, wanted, report)

    return work


def _files(shop: Models, images: str, files: Sequence[str] | None) -> list[Path]:
    if images == UPLOAD:
        return [inside_uploads(file) for file in files or ()]
    return files_in(shop.folders[int(images.removeprefix(FOLDER)) - 1])


def _readers(shop: Models) -> dict[str, links.Reader]:
    """Of what a link has."""
    kinds = [UPLOAD, *(f"{FOLDER}{place}" for place in range(1, len(shop.folders) + 1))]
    return {
        "model": links.one_of({key: key for key in _subjects(shop)}),
        "images": links.one_of({kind: kind for kind in kinds}),
        "target": links.one_of({target: target for target in TARGETS}),
        "value": links.number(0, 100, float),
        "effort": links.number(*EFFORTS[:2]),
        "per_image": links.one_of(CHECKED),
        "dense": links.one_of(CHECKED),
        "steps": links.number(1, MOST_STEPS),
    }
