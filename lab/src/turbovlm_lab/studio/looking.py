"""The first tab: one sample, one model, and what merging does to both."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from turbovlm.errors import DataError, TurboError
from turbovlm_lab.studio import render
from turbovlm_lab.studio.choices import AMOUNTS, DEFAULT, OPTIONS, RANGES, SCHEDULES, STEPS, Choice, written
from turbovlm_lab.studio.patches import as_json, payload
from turbovlm_lab.studio.photos import demo_photos, pictures
from turbovlm_lab.studio.subjects import IMAGE, Loaded, Models, Outcome, Photo, Sample, Subject
from turbovlm_lab.studio.uploads import FORMATS, MEGABYTES, MEGAPIXELS, inside_uploads, read_upload

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE = Path(__file__).parent / "page"
UPLOADED = "upload"
SLOTS: Mapping[str, tuple[str, ...]] = {
    "sample": ("image", "recording", "labels", "question", "prompt", "words"),
    "ranking": ("alpha", "degree", "similarity", "partition", "visual_select"),
    "schedule": ("schedule", "listed", "steps"),
}
"""Where a message stands, by the setting that it begins with; all others stand beside the amount."""
ASK = f"Drop an image here, or choose a file ({', '.join(FORMATS)}; {MEGABYTES} MB, {MEGAPIXELS} megapixels at most)"


@dataclass(frozen=True, eq=False)
class _Controls:
    """The components of the left side, which say what is run."""

    model: gr.Dropdown
    about: gr.Markdown
    picked: gr.HTML
    drop: gr.HTML
    words: gr.Textbox
    amount: gr.Radio
    value: gr.Slider
    steps: gr.Slider
    alpha: gr.Number
    degree: gr.Dropdown
    similarity: gr.Dropdown
    partition: gr.Dropdown
    visual_select: gr.Dropdown
    schedule: gr.Dropdown
    listed: gr.Textbox

    def of_choice(self, choice: Choice, subject: Subject) -> dict[Any, Any]:
        """What the controls are to show."""
        low, high, step = RANGES[choice.amount]
        on = subject.settings
        updates: dict[Any, Any] = {
            self.amount: gr.update(choices=[(AMOUNTS[name], name) for name in subject.amounts], value=choice.amount),
            self.value: gr.update(minimum=low, maximum=high, step=step, value=choice.value, label=choice.amount),
            self.steps: gr.update(value=choice.steps or STEPS[0], visible=subject.steps is not None),
            self.alpha: gr.update(value=choice.alpha, visible="alpha" in on),
            self.schedule: gr.update(value=choice.schedule, visible="schedule" in on),
            self.listed: gr.update(value=choice.listed, visible=choice.schedule == "list"),
        }
        for name in OPTIONS:
            updates[getattr(self, name)] = gr.update(value=getattr(choice, name), visible=name in on)
        return updates

    def of_subject(self, subject: Subject, choice: Choice, picked: str, words: str) -> dict[Any, Any]:
        """The same, for another model: also what it takes."""
        return {
            self.model: subject.key,
            self.about: subject.about,
            self.picked: gr.update(items=pictures(photos_of(subject), picked), value=picked),
            self.drop: gr.update(visible=subject.takes == IMAGE),
            self.words: gr.update(label=subject.words, value=words, visible=subject.words is not None),
            **self.of_choice(choice, subject),
        }


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
        return {
            self.costs: render.costs(outcome),
            self.answers: render.answers(outcome),
            self.view: as_json({**payload(outcome.view), "link": link}),
            self.code: render.code(line, outcome.said),
            **dict.fromkeys(self.slots.values(), ""),
        }

    def of_error(self, error: TurboError) -> dict[Any, Any]:
        """The message beside the control that it is about; what was shown before is gone."""
        name = (re.match(r"\w+", str(error)) or [""])[0]
        slot = next((slot for slot, names in SLOTS.items() if name in names), "amount")
        shown = {
            component: render.problem(str(error) if key == slot else None) for key, component in self.slots.items()
        }
        not_run = "<p class='note'>Nothing was run: see the message beside the control.</p>"
        return {self.costs: not_run, self.answers: "", self.view: "", self.code: "", **shown}


def photos_of(subject: Subject) -> list[Photo]:
    """The built-in images of a subject; none where it takes words alone."""
    if subject.photos is not None:
        return list(subject.photos())
    return list(demo_photos()) if subject.takes == IMAGE else []


def tab(shop: Models) -> None:
    """Add the tab's components."""
    first = next(iter(shop.subjects.values()))
    uploaded = gr.State(None, time_to_live=3600)
    with gr.Row(elem_classes="studio"):
        with gr.Column(scale=2, min_width=300):
            controls, slots, reset = _left(shop, first)
        with gr.Column(scale=4, min_width=300):
            results = _right(slots)
    _wire(shop, controls, results, uploaded, reset)


def _left(shop: Models, first: Subject) -> tuple[_Controls, dict[str, gr.HTML], gr.Button]:
    choice, slots = Choice.default(first), {}
    titles = [(subject.title, key) for key, subject in shop.subjects.items()]
    model = gr.Dropdown(titles, value=first.key, label="Model", elem_id="model", filterable=False)
    about = gr.Markdown(first.about)
    photos = photos_of(first)
    picked = gr.HTML(
        photos[0].key if photos else "",
        html_template="${items}",
        items=pictures(photos, photos[0].key if photos else ""),
        js_on_load=_page("picker.js"),
        elem_id="picker",
    )
    drop = gr.HTML(
        "", html_template=_page("drop.html"), js_on_load=_page("drop.js"), ask=ASK, megabytes=MEGABYTES, elem_id="drop"
    )
    words = gr.Textbox(first.default_words, label=first.words, elem_id="words", max_lines=4, max_length=4000)
    slots["sample"] = gr.HTML("", elem_id="problem-sample")
    amounts = [(AMOUNTS[name], name) for name in first.amounts]
    amount = gr.Radio(amounts, value=choice.amount, label="How much is merged", elem_id="amount")
    low, high, step = RANGES[choice.amount]
    value = gr.Slider(low, high, choice.value, step=step, label=choice.amount, elem_id="value", buttons=[])
    slots["amount"] = gr.HTML("", elem_id="problem-amount")
    steps = gr.Slider(*STEPS, STEPS[0], step=1, label="denoising steps", visible=False, elem_id="steps", buttons=[])
    with gr.Accordion("Which tokens, and where", open=False, elem_id="more"):
        alpha = gr.Number(None, label="α · weight of the semantic value (empty: the library's)", elem_id="alpha")
        drops = {
            name: gr.Dropdown([("the library's", DEFAULT), *options], value=DEFAULT, label=name, elem_id=name)
            for name, options in OPTIONS.items()
        }
        slots["ranking"] = gr.HTML("", elem_id="problem-ranking")
        schedule = gr.Dropdown(
            [(title, key) for key, title in SCHEDULES.items()], value=DEFAULT, label="schedule", elem_id="schedule"
        )
        listed = gr.Textbox("", label="tokens merged in each block", visible=False, elem_id="listed", max_length=400)
        slots["schedule"] = gr.HTML("", elem_id="problem-schedule")
    reset = gr.Button("Reset to defaults", size="sm", elem_id="reset")
    kept = {"model": model, "about": about, "picked": picked, "drop": drop, "words": words, "amount": amount}
    rest = {"value": value, "steps": steps, "alpha": alpha, "schedule": schedule, "listed": listed}
    return _Controls(**kept, **rest, **drops), slots, reset


def _right(slots: dict[str, gr.HTML]) -> _Results:
    costs = gr.HTML("<p class='note'>Loading the model …</p>", elem_id="costs", min_height=90)
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            view = gr.HTML("", html_template=_page("patches.html"), js_on_load=_page("patches.js"), elem_id="view")
        with gr.Column(scale=2, min_width=240):
            answers = gr.HTML("", elem_id="answers")
    with gr.Accordion("In Python", open=False):
        code = gr.HTML("", elem_id="code")
    return _Results(costs, answers, view, code, slots)


def _wire(shop: Models, controls: _Controls, results: _Results, uploaded: gr.State, reset: gr.Button) -> None:
    every = [getattr(controls, field.name) for field in fields(_Controls)]
    chosen = [component for component in every if component not in (controls.about, controls.drop)]
    names = [field.name for field in fields(_Controls) if field.name not in ("about", "drop")]
    running = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "always_last"}
    running |= {"show_progress": "minimal", "show_progress_on": [results.costs]}

    def show(progress: gr.Progress, upload: Image | None, *values: Any) -> dict[Any, Any]:
        given = dict(zip(names, values))
        subject = shop.subjects[given["model"]]
        try:
            if not shop.is_loaded(subject.key):
                progress(0.3, f"loading {subject.title}")
            with shop.computing:
                return _run(subject, shop[subject.key], given, upload, results)
        except TurboError as error:
            return results.of_error(error)

    def run(upload: Image | None, *values: Any, progress: gr.Progress = gr.Progress()) -> dict[Any, Any]:  # noqa: B008
        return show(progress, upload, *values)

    def choose_model(key: str) -> dict[Any, Any]:
        subject = shop.subjects[key]
        photos = photos_of(subject)
        first = photos[0].key if photos else ""
        return controls.of_subject(subject, Choice.default(subject), first, subject.default_words)

    def choose_amount(model: str, amount: str) -> Any:
        low, high, step = RANGES[amount]
        value = shop.subjects[model].amounts[amount]
        return gr.update(minimum=low, maximum=high, step=step, value=value, label=amount)

    def take(value: str) -> dict[Any, Any]:
        try:
            image = read_upload(inside_uploads(json.loads(value)["path"]))
        except DataError as error:
            return {results.slots["sample"]: render.problem(str(error))}
        return {uploaded: image, controls.picked: UPLOADED, results.slots["sample"]: UPLOAD_HAS_NO_LINK}

    def open_link(request: gr.Request) -> dict[Any, Any]:
        return _linked(shop, dict(request.query_params), controls, results)

    blocks = gr.context.Context.root_block
    again = {"fn": run, "inputs": [uploaded, *chosen], "outputs": results.all, **running}
    blocks.load(open_link, None, [*every, *results.slots.values()], queue=False, show_progress="hidden").then(**again)
    controls.model.input(choose_model, controls.model, every, queue=False, show_progress="hidden").then(**again)
    reset.click(
        lambda model: controls.of_choice(Choice.default(shop.subjects[model]), shop.subjects[model]),
        controls.model,
        every,
        queue=False,
        show_progress="hidden",
    ).then(**again)
    controls.amount.input(
        choose_amount, [controls.model, controls.amount], controls.value, queue=False, show_progress="hidden"
    ).then(**again)
    controls.schedule.input(
        lambda schedule: gr.update(visible=schedule == "list"),
        controls.schedule,
        controls.listed,
        queue=False,
        show_progress="hidden",
    ).then(**again)
    controls.drop.upload(
        take,
        controls.drop,
        [uploaded, controls.picked, results.slots["sample"]],
        show_progress="hidden",
    ).success(**again)
    moved = [controls.picked.input, controls.value.input, controls.steps.input]
    moved += [getattr(controls, name).input for name in OPTIONS]
    typed = (controls.words, controls.alpha, controls.listed)
    gr.on([*moved, *(each.submit for each in typed), *(each.blur for each in typed)], **again)


UPLOAD_HAS_NO_LINK = (
    "<p class='note'>Your image stays in this page: the link shows a built-in one to whoever else opens it.</p>"
)


def _run(
    subject: Subject, loaded: Loaded, given: Mapping[str, Any], upload: Image | None, results: _Results
) -> dict[Any, Any]:
    """Run what the controls say, once."""
    picked = given["picked"]
    values = {field.name: given[field.name] for field in fields(Choice)}
    if subject.steps is None:
        values["steps"] = None
    choice = Choice(**values)
    words, link = given["words"] or "", {"model": subject.key}
    if picked == UPLOADED and upload is not None:
        sample = Sample(f"{UPLOADED}:{id(upload)}", upload, words=words)
    else:
        photo = next((photo for photo in photos_of(subject) if photo.key == picked), None)
        sample = Sample(picked, None if photo is None else photo.image, words=words)
        link |= {} if photo is None else {"image": photo.key}
    settings = choice.settings(subject, loaded.depth)
    configs = choice.configs(subject, loaded.depth, loaded.model)
    outcome = loaded.run(sample, configs)
    named = choice.to_link(subject)
    names = ["image", *(field.name for field in fields(Choice)), "words"]
    said = {**dict.fromkeys(names, ""), **link, **named}
    said["words"] = words if words != subject.default_words else ""
    line = f"import turbovlm\n\nhandle = turbovlm.apply(model, {written(settings)})"
    return results.of(outcome, line, said)


def _linked(shop: Models, query: Mapping[str, str], controls: _Controls, results: _Results) -> dict[Any, Any]:
    """What the controls are to show for a link, and what is wrong with it."""
    wrong = []
    key = query.get("model", next(iter(shop.subjects)))
    if key not in shop.subjects:
        wrong.append(f"model={key[:40]}: there is no such model here; there are {', '.join(shop.subjects)}")
        key = next(iter(shop.subjects))
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
        **dict.fromkeys(results.slots.values(), ""),
        results.slots["sample"]: render.problem("; ".join(wrong) or None),
    }


def _page(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")
