"""Stands in for the module of this name of the web UIs."""

from __future__ import annotations

from contextlib import contextmanager

import gradio as gr


@contextmanager
def InputAccordion(value, label):
    """A panel whose heading is a checkbox."""
    yield gr.Checkbox(value, label=label)
