"""The first tab: one image, one model, and what merging does to both."""

from __future__ import annotations

from turbovlm_lab.studio.subjects import Models


def tab(shop: Models) -> None:
    """Add the tab's components."""
    import gradio as gr

    gr.Dropdown(list(shop.subjects), label="Model")
