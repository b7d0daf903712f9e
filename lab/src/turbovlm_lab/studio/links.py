"""A tab's state in the page's address: each control under its name, with the tab's in front."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from turbovlm_lab.studio import render

NONE = "none"
"""In an address, a choice of nothing."""
Reader = Callable[[str], Any]
"""Text of an address → a control's value; raises `ValueError` where it is none that can be chosen."""


def one_of(values: Mapping[str, Any]) -> Reader:
    """Of the values that a control offers, by their text."""

    def read(text: str) -> Any:
        if text not in values:
            raise ValueError(text)
        return values[text]

    return read


def some_of(values: Mapping[str, Any]) -> Reader:
    """Several of them, separated by commas."""
    one = one_of(values)
    return lambda text: [] if text == NONE else [one(each) for each in text.split(",")]


def number(low: float, high: float, kind: type[int] | type[float] = int) -> Reader:
    """A number in a range."""

    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return read


def keep(tab: str, controls: Mapping[str, Any]) -> None:
    """Have the address say what the controls of a tab say, from when they are moved."""
    names = [f"{tab}-{name}" for name in controls]
    script = (
        f"(...values) => {{ const names = {json.dumps(names)};"
        f" window.studio.link(Object.fromEntries(names.map((name, place) =>"
        f" [name, Array.isArray(values[place]) && !values[place].length ? '{NONE}' : String(values[place])]))); }}"
    )
    moved = [each.input for each in controls.values()]
    how = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    gr.on(moved, None, list(controls.values()), js=script, **how)


def read(tab: str, readers: Mapping[str, Reader], request: gr.Request) -> tuple[dict[str, Any], str]:
    """What an address says of a tab's controls, and what is wrong with it, as HTML."""
    values, wrong = {}, []
    for name, reader in readers.items():
        text = request.query_params.get(f"{tab}-{name}")
        if text is None:
            continue
        try:
            values[name] = reader(text)
        except ValueError:
            wrong.append(f"{tab}-{name}={text[:40]}: cannot be chosen here")
    return values, render.problem("; ".join(wrong) or None)
