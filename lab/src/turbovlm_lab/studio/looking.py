"""The first tab: one sample, one model, and what merging does to both."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import gradio as gr

from turbovlm.errors import DataError, TurboError
from turbovlm_lab.studio import render
from turbovlm_lab.studio.choices import AMOUNTS, OPTIONS, Choice, number, written
from turbovlm_lab.studio.controls import Controls, add_controls, page_file, seen
from turbovlm_lab.studio.patches import as_json, payload
from turbovlm_lab.studio.photos import photos_of
from turbovlm_lab.studio.subjects import RECORDING, Models, Outcome, Photo, Sample, Subject
from turbovlm_lab.studio.uploads import (
    inside_uploads,
    read_recording,
    read_upload,
)

UPLOADED = "upload"
WAITING = "<p class='note' role='status'>Waiting for a run in another tab or page to end …</p>"
SLOTS: Mapping[str, tuple[str, ...]] = {
    "sample": ("image", "recording", "labels", "question", "prompt", "words"),
    "ranking": ("alpha", "degree", "similarity", "partition", "visual_select"),
    "schedule": ("schedule", "listed", "steps"),
}
"""Where a message stands, by the setting that it begins with; all others stand beside the amount."""


@dataclass(frozen=True, eq=False)
class _Results:
    """The components of the right side, and the lines beside the controls for what is wrong."""

    costs: gr.HTML
    answers: gr.HTML
    view: gr.HTML
    code: gr.HTML
    slots: Mapping[str, gr.HTML]

    @property
    def all(self) -> list[Any]:
        return [self.costs, self.answers, self.view, self.code, *self.slots.values()]

    def of(self, outcome: Outcome, line: str, link: Mapping[str, str]) -> dict[Any, Any]:
        """All but the times."""
        return {
            self.costs: render.costs(outcome, None, link),
            self.answers: render.answers(outcome),
            self.view: as_json({**payload(outcome.view), "link": link}),
            self.code: render.code(line, outcome.said),
            **dict.fromkeys(self._of_runs.values(), ""),
        }

    @property
    def _of_runs(self) -> dict[str, gr.HTML]:
        """The lines that a run has something to say in; what is wrong with a link stays where it is."""
        return {key: each for key, each in self.slots.items() if key != "link"}

    def of_error(self, error: TurboError) -> dict[Any, Any]:
        """The message beside the control that it is about; what was shown before is gone."""
        name = (re.match(r"\w+", str(error)) or [""])[0]
        slot = next((slot for slot, names in SLOTS.items() if name in names), "amount")
        shown = {
            component: render.problem(str(error) if key == slot else None) for key, component in self.slots.items()
        }
        not_run = "<p class='note'>Nothing was run: see the message beside the control.</p>"
        return {self.costs: not_run, self.answers: "", self.view: "", self.code: "", **shown}


def warm(shop: Models) -> None:
    """Load the first model and run what the page shows at first, so that nobody waits for it.

    Raises:
        TurboError: the model cannot be loaded.
    """
    subject = shop.first
    loaded, choice = shop[subject.key], Choice.default(subject)
    photo = next(iter(photos_of(subject)), None)
    sample = Sample("" if photo is None else photo.key, photo and photo.image, words=subject.default_words)
    with shop.computing:
        loaded.run(sample, choice.configs(subject, loaded)).time()


def tab(shop: Models) -> None:
    """Add the tab's components."""
    first = shop.first
    uploaded = gr.State(None, time_to_live=3600)
    with gr.Row(elem_classes="studio"):
        with gr.Column(scale=2, min_width=300):
            controls, slots, reset = add_controls(shop, first)
        with gr.Column(scale=4, min_width=300):
            results = _right(slots)
    _wire(shop, controls, results, uploaded, reset)


def _right(slots: dict[str, gr.HTML]) -> _Results:
    costs = gr.HTML("<p class='note'>Loading the model …</p>", elem_id="costs", min_height=90)
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            drawing = {"html_template": page_file("patches.html"), "js_on_load": page_file("patches.js")}
            view = gr.HTML("", **drawing, elem_id="view")
        with gr.Column(scale=2, min_width=240):
            answers = gr.HTML("", elem_id="answers")
    with gr.Accordion("In Python", open=False):
        code = gr.HTML("", elem_id="code")
    return _Results(costs, answers, view, code, slots)


def _wire(shop: Models, controls: Controls, results: _Results, uploaded: gr.State, reset: gr.Button) -> None:
    """Run the model when something changes: one listener for all, so that the latest request wins."""
    every = [getattr(controls, field.name) for field in fields(Controls)]
    names = [field.name for field in fields(Controls) if field.name not in ("about", "drop")]
    chosen = [getattr(controls, name) for name in names]
    asked = gr.State(0.0)

    def run(upload: Photo | None, *values: Any) -> Iterator[dict[Any, Any]]:
        given = dict(zip(names, values))
        subject = shop.subjects[given["model"]]
        try:
            if shop.busy:
                yield {results.costs: WAITING, results.answers: ""}
            if not shop.is_loaded(subject.key):
                yield {results.costs: f"<p class='note'>Loading {subject.title} …</p>", results.answers: ""}
            yield from _run(shop, subject, given, upload, results)
        except TurboError as error:
            yield results.of_error(error)

    def choose_model(key: str) -> dict[Any, Any]:
        subject = shop.subjects[key]
        first = next((photo.key for photo in photos_of(subject)), "")
        shown = controls.of_subject(subject, Choice.default(subject), first, subject.default_words)
        return {**shown, results.slots["link"]: "", asked: time.monotonic()}

    def choose_amount(amount: str) -> dict[Any, Any]:
        shown = {getattr(controls, name): gr.update(**seen(name == amount)) for name in AMOUNTS}
        return {**shown, asked: time.monotonic()}

    def choose_schedule(schedule: str) -> dict[Any, Any]:
        return {controls.listed: gr.update(**seen(schedule == "list")), asked: time.monotonic()}

    def go_back(key: str) -> dict[Any, Any]:
        subject = shop.subjects[key]
        shown = controls.of_choice(Choice.default(subject), subject)
        return {**shown, results.slots["link"]: "", asked: time.monotonic()}

    def take(value: str, key: str) -> dict[Any, Any]:
        slot = results.slots["sample"]
        wave = None
        try:
            file = inside_uploads(json.loads(value)["path"])
            if shop.subjects[key].takes == RECORDING:
                wave, image = read_recording(file)
            else:
                image = read_upload(file)
        except DataError as error:
            return {slot: render.problem(str(error))}
        photo = Photo(f"{UPLOADED}-{time.time_ns()}", file.name, image, wave=wave)
        return {uploaded: photo, controls.picked: UPLOADED, asked: time.monotonic()}

    def open_link(request: gr.Request) -> dict[Any, Any]:
        return {**_linked(shop, dict(request.query_params), controls, results), asked: time.monotonic()}

    quick = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
    gr.on(None, open_link, None, [*every, asked, results.slots["link"]], **quick)  # when the page loads
    controls.model.input(choose_model, controls.model, [*every, asked, results.slots["link"]], **quick)
    controls.amount.input(choose_amount, controls.amount, [*(getattr(controls, a) for a in AMOUNTS), asked], **quick)
    controls.schedule.input(choose_schedule, controls.schedule, [controls.listed, asked], **quick)
    reset.click(go_back, controls.model, [*every, asked, results.slots["link"]], **quick)
    taken = [uploaded, controls.picked, results.slots["sample"], asked]
    controls.drop.upload(take, [controls.drop, controls.model], taken, **quick)
    moved = (controls.picked, controls.steps, *(getattr(controls, name) for name in (*AMOUNTS, *OPTIONS)))
    typed = (controls.words, controls.alpha, controls.listed)
    gr.on(
        [asked.change, *(each.input for each in moved), *(each.submit for each in typed)],
        run,
        [uploaded, *chosen],
        results.all,
        concurrency_limit=None,  # they wait for the lock, and say so
        trigger_mode="always_last",
        api_visibility="private",
        show_progress="minimal",
        show_progress_on=[results.costs],
    )


UPLOAD_HAS_NO_LINK = "What you upload stays in this page: the link leaves it out."


def _run(
    shop: Models, subject: Subject, given: Mapping[str, Any], upload: Photo | None, results: _Results
) -> Iterator[dict[Any, Any]]:
    """Run what the controls say, and then time it.

    Nothing is yielded with the lock held: each part of a generator may run in another thread, or none where the page is
    closed.
    """
    loaded = shop[subject.key]
    choice = _choice(subject, given)
    sample = _sample(subject, given, upload)
    settings = choice.settings(subject, loaded)
    with shop.computing:
        outcome = loaded.run(sample, choice.configs(subject, loaded))
    if sample.key.startswith(UPLOADED):
        outcome = replace(outcome, notes=(*outcome.notes, UPLOAD_HAS_NO_LINK))
    line = f"import turbovlm\n\nhandle = turbovlm.apply(model, {written(settings)})"
    link = _link(subject, choice, sample)
    yield results.of(outcome, line, link)
    with shop.computing:
        outcome, times = outcome.complete(), outcome.time()
    yield {results.costs: render.costs(outcome, times, link)}


def _choice(subject: Subject, given: Mapping[str, Any]) -> Choice:
    """What the controls say.

    Raises:
        ConfigError: a number that is none.
    """
    values = {field.name: given[field.name] for field in fields(Choice) if field.name != "value"}
    values |= {"value": number(given["amount"], given.get(given["amount"]))}
    values["steps"] = None if subject.steps is None else int(number("steps", given["steps"]))
    return Choice(**values)


def _sample(subject: Subject, given: Mapping[str, Any], upload: Photo | None) -> Sample:
    photos = {photo.key: photo for photo in photos_of(subject)}
    photo = upload if given["picked"] == UPLOADED else photos.get(given["picked"])
    steps = None if subject.steps is None else int(number("steps", given["steps"]))
    words = given["words"] or ""
    if photo is None or (photo.wave is None) == (subject.takes == RECORDING):
        return Sample("", words=words, steps=steps)
    return Sample(photo.key, photo.image, photo.wave, words, steps)


def _link(subject: Subject, choice: Choice, sample: Sample) -> dict[str, str]:
    """Every name that a link can have, empty where it is at its default."""
    names = ("model", "image", *(field.name for field in fields(Choice)), "words")
    own = {"model": subject.key, **choice.to_link(subject)}
    own["image"] = "" if sample.key.startswith(UPLOADED) else sample.key
    own["words"] = "" if sample.words == subject.default_words else sample.words
    return {**dict.fromkeys(names, ""), **own}


def _linked(shop: Models, query: Mapping[str, str], controls: Controls, results: _Results) -> dict[Any, Any]:
    """What the controls are to show for a link, and what is wrong with it."""
    wrong = []
    key = query.get("model", shop.first.key)
    if key not in shop.subjects:
        wrong.append(f"model={key[:40]}: there is no such model here; there are {', '.join(shop.subjects)}")
        key = shop.first.key
    subject = shop.subjects[key]
    choice, mistaken = Choice.of_link(subject, query)
    photos = {photo.key: photo for photo in photos_of(subject)}
    picked = query.get("image", next(iter(photos), ""))
    if photos and picked not in photos:
        wrong.append(f"image={picked[:40]}: there is no such image; there are {', '.join(photos)}")
        picked = next(iter(photos))
    words = query.get("words", subject.default_words)[:4000]
    wrong += [mistaken] if mistaken else []
    return {
        **controls.of_subject(subject, choice, picked, words),
        results.slots["link"]: render.problem("; ".join(wrong) or None),
    }
