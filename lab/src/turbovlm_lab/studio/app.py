"""The page: its tabs, its looks, and the server on loopback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm_lab.studio import encoders, looking
from turbovlm_lab.studio.subjects import Models, Subject

if TYPE_CHECKING:
    import gradio as gr

TABS: tuple[tuple[str, str, Callable[[Models], None]], ...] = (("look", "Look", looking.tab),)
"""Of each tab: its name in links, its title, and what adds its components."""


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        host, port: where the page is served; port 0 takes a free one.
        folders: of models, which are offered beside the built-in ones.
        opens: whether to open it in the browser.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    folders: tuple[Path, ...] = ()
    opens: bool = False


def subjects(settings: Settings) -> list[Subject]:
    """The built-in models and those of the folders."""
    return list(encoders.BUILT_IN)


def build(settings: Settings) -> gr.Blocks:
    """The page, not yet served."""
    import gradio as gr

    shop = Models(subjects(settings))
    with gr.Blocks(title="turbovlm studio", analytics_enabled=False) as page, gr.Tabs():
        for key, title, add in TABS:
            with gr.Tab(title, id=key):
                add(shop)
    return page
