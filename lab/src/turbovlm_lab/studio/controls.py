"""The left side of the first tab: the controls that say what is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from turbovlm_lab.studio.choices import AMOUNTS, DEFAULT, OPTIONS, RANGES, SCHEDULES, STEPS, Choice, Range
from turbovlm_lab.studio.photos import photos_of, pictures
from turbovlm_lab.studio.subjects import IMAGE, RECORDING, Models, Subject
from turbovlm_lab.studio.uploads import FORMATS, MEGABYTES, MEGAPIXELS, SECONDS

PAGE = Path(__file__).parent / "page"
ASK = {
    IMAGE: {
        "ask": f"Drop an image here, or choose a file ({', '.join(FORMATS)}; {MEGABYTES} MB, {MEGAPIXELS} megapixels)",
        "accept": ",".join(f"image/{name.lower()}" for name in FORMATS),
    },
    RECORDING: {"ask": f"Drop a WAV file here, or choose one ({SECONDS} seconds at most)", "accept": ".wav,audio/wav"},
}
"""What the place for uploads says, and which files it offers, by what a subject takes."""


@dataclass(frozen=True, eq=False)
class Controls:
    """The components of the left side, which say what is run."""

    model: gr.Dropdown
    about: gr.Markdown
    picked: gr.HTML
    drop: gr.HTML
    words: gr.Textbox
    amount: gr.Radio
    flops: gr.HTML
    keep: gr.HTML
    r: gr.HTML
    visual_keep: gr.HTML
    steps: gr.HTML
    alpha: gr.Number
    degree: gr.Dropdown
    similarity: gr.Dropdown
    partition: gr.Dropdown
    visual_select: gr.Dropdown
    schedule: gr.Dropdown
    listed: gr.Textbox

    def of_choice(self, choice: Choice, subject: Subject) -> dict[Any, Any]:
        """What the controls are to show."""
        on = subject.settings
        updates: dict[Any, Any] = {
            self.amount: gr.update(choices=[(AMOUNTS[name], name) for name in subject.amounts], value=choice.amount),
            self.steps: gr.update(value=choice.steps or STEPS[0], **seen(subject.steps is not None)),
            self.alpha: gr.update(value=choice.alpha, **seen("alpha" in on)),
            self.schedule: gr.update(value=choice.schedule, **seen("schedule" in on)),
            self.listed: gr.update(value=choice.listed, **seen(choice.schedule == "list")),
        }
        for name in AMOUNTS:
            value = choice.value if name == choice.amount else subject.amounts.get(name, RANGES[name].high)
            updates[getattr(self, name)] = gr.update(value=value, **seen(name == choice.amount))
        for name in OPTIONS:
            updates[getattr(self, name)] = gr.update(value=getattr(choice, name), **seen(name in on))
        return updates

    def of_subject(self, subject: Subject, choice: Choice, picked: str, words: str) -> dict[Any, Any]:
        """The same, for another model: also what it takes."""
        return {
            self.model: subject.key,
            self.about: subject.about,
            self.picked: gr.update(items=pictures(photos_of(subject), picked), value=picked),
            self.drop: gr.update(**seen(subject.takes in ASK), **ASK.get(subject.takes, {})),
            self.words: gr.update(label=subject.words, value=words, **seen(subject.words is not None)),
            **self.of_choice(choice, subject),
        }


def add_controls(shop: Models, first: Subject) -> tuple[Controls, dict[str, gr.HTML], gr.Button]:
    """Add the components; also the lines for what is wrong, and the button that goes back to the defaults."""
    choice, slots = Choice.default(first), {"link": gr.HTML("", elem_id="problem-link")}
    titles = [(subject.title, key) for key, subject in shop.subjects.items()]
    model = gr.Dropdown(titles, value=first.key, label="Model", elem_id="model", filterable=False)
    about = gr.Markdown(first.about)
    photos = photos_of(first)
    picked = gr.HTML(
        photos[0].key if photos else "",
        html_template="${items}",
        items=pictures(photos, photos[0].key if photos else ""),
        js_on_load=page_file("picker.js"),
        elem_id="picker",
    )
    drop = gr.HTML(
        "",
        html_template=page_file("drop.html"),
        js_on_load=page_file("drop.js"),
        megabytes=MEGABYTES,
        **ASK.get(first.takes, ASK[IMAGE]),
        **seen(first.takes in ASK),
        elem_id="drop",
    )
    words = gr.Textbox(
        first.default_words,
        label=first.words,
        **seen(first.words is not None),
        elem_id="words",
        max_lines=4,
        max_length=4000,
    )
    slots["sample"] = gr.HTML("", elem_id="problem-sample")
    amounts = [(AMOUNTS[name], name) for name in first.amounts]
    amount = gr.Radio(amounts, value=choice.amount, label="How much is merged", elem_id="amount")
    values = {
        name: _slider(name, name, span, first.amounts.get(name, span.high), name == choice.amount)
        for name, span in RANGES.items()
    }
    slots["amount"] = gr.HTML("", elem_id="problem-amount")
    steps = _slider("steps", "denoising steps", Range(*STEPS, 1), STEPS[0], first.steps is not None)
    with gr.Accordion("Which tokens, and where", open=False, elem_id="more"):
        alpha = gr.Number(None, label="α · weight of the semantic value (empty: the library's)", elem_id="alpha")
        drops = {
            name: gr.Dropdown(
                [("the library's", DEFAULT), *options],
                value=DEFAULT,
                label=name,
                **seen(name in first.settings),
                elem_id=name,
            )
            for name, options in OPTIONS.items()
        }
        slots["ranking"] = gr.HTML("", elem_id="problem-ranking")
        schedule = gr.Dropdown(
            [(title, key) for key, title in SCHEDULES.items()], value=DEFAULT, label="schedule", elem_id="schedule"
        )
        listed = gr.Textbox("", label="tokens merged in each block", **seen(False), elem_id="listed", max_length=400)
        slots["schedule"] = gr.HTML("", elem_id="problem-schedule")
    reset = gr.Button("Reset to defaults", size="sm", elem_id="reset")
    kept = {"model": model, "about": about, "picked": picked, "drop": drop, "words": words, "amount": amount}
    rest = {"steps": steps, "alpha": alpha, "schedule": schedule, "listed": listed}
    return Controls(**kept, **rest, **values, **drops), slots, reset


def _slider(name: str, label: str, span: Range, value: float, visible: bool) -> gr.HTML:
    parts: dict[str, Any] = {"html_template": page_file("slider.html"), "js_on_load": page_file("slider.js")}
    span_of = {"label": label, "low": span.low, "high": span.high, "step": span.step}
    return gr.HTML(value, **parts, **span_of, **seen(visible), elem_id=name)


def seen(on: bool) -> dict[str, Any]:
    """What of a component says whether it is shown, as keywords.

    Not `visible`: Gradio forgets what it is told of that while the component's tab has not been opened.
    """
    return {"elem_classes": [] if on else ["unseen"]}


def page_file(name: str) -> str:
    """A file of the page's."""
    return (PAGE / name).read_text(encoding="utf-8")
