"""The page: its tabs, its looks, and the server on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from turbovlm.errors import TurboError
from turbovlm_lab.studio import calibrating, comparing, encoders, generating, looking
from turbovlm_lab.studio.folders import folder_subject
from turbovlm_lab.studio.jobs import stop_all
from turbovlm_lab.studio.subjects import Models, Subject
from turbovlm_lab.studio.uploads import MEGABYTES

PAGE = Path(__file__).parent / "page"
LAST_SECONDS = 30
"""That what computes is waited for at the end, at most: a batch of images, or a picture's denoising."""
FONTS = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
TABS: tuple[tuple[str, str, Callable[[Models], None]], ...] = (
    ("look", "Look", looking.tab),
    ("compare", "Compare", comparing.tab),
    ("calibrate", "Calibrate", calibrating.tab),
)
"""Of each tab: its name in links, its title, and what adds its components."""


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        host, port: where the page is served; port 0 takes a free one.
        folders: of models, which are offered beside the built-in ones.
        images: folders of images, which methods can be compared on.
        opens: whether to open it in the browser.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    folders: tuple[Path, ...] = ()
    opens: bool = False
    images: tuple[Path, ...] = ()


def subjects(settings: Settings) -> list[Subject]:
    """The built-in models and those of the folders."""
    return [*encoders.BUILT_IN, *generating.BUILT_IN, *map(folder_subject, settings.folders)]


def build(settings: Settings, shop: Models | None = None) -> gr.Blocks:
    """The page, not yet served.

    Args:
        shop: the models; those of the settings if None.
    """
    shop = Models(subjects(settings), settings.images) if shop is None else shop
    with gr.Blocks(title="turbovlm studio", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML("<h1>turbovlm studio</h1><p>See which tokens become one, what it saves, and what it costs.</p>")
        with gr.Tabs(elem_id="tabs") as tabs:
            for key, title, add in TABS:
                with gr.Tab(title, id=key) as each:
                    add(shop)
                each.select(None, js=f"() => {{ window.studio.tab('{key}'); }}")
        opened = page.load(_tab_of_link, None, tabs, queue=False, show_progress="hidden")
        opened.then(None, js="() => { window.studio.asked = null; }")
    return page


def serve(settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C, or until the process is asked to end (SIGTERM).

    Args:
        ready: called with the page's address once it answers.

    Raises:
        TurboError: see `serving`.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serving(settings) as url:
            ready(url)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def serving(settings: Settings, shop: Models | None = None) -> Iterator[str]:
    """Serve the page inside; gives its address, with the first model loaded.

    Uploads lie in a folder of this process, which is removed at the end. Behind it no other thread runs a model of
    `shop`.

    Args:
        shop: the models; those of the settings if None.

    Raises:
        TurboError: the port is taken, or no model can be loaded.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    shop = Models(subjects(settings), settings.images) if shop is None else shop
    with tempfile.TemporaryDirectory(prefix="turbovlm-studio-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(settings, shop).queue(max_size=64)
        looking.warm(shop)
        try:
            _, url, _ = page.launch(
                server_name=settings.host,
                server_port=settings.port or _free_port(settings.host),
                inbrowser=settings.opens,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                allowed_paths=[],
                max_file_size=MEGABYTES * 1_000_000,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                theme=gr.themes.Base(primary_hue="blue", font=FONTS, font_mono=("ui-monospace", "monospace")),
                css_paths=[PAGE / "studio.css", PAGE / "tabs.css"],
                head=f"<script>{(PAGE / 'studio.js').read_text(encoding='utf-8')}</script>",
            )
        except OSError as error:
            raise TurboError(
                f"--host {settings.host} --port {settings.port}: cannot be served ({error.strerror or 'it is taken'}); "
                "--port 0 takes a free one"
            ) from error
        try:
            yield url
        finally:
            page.close(verbose=False)
            stop_all(LAST_SECONDS)
            shop.computing.acquire(timeout=LAST_SECONDS)  # for good: a thread that computes while Python ends aborts it


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as taken:
        taken.bind((host, 0))
        port: int = taken.getsockname()[1]
        return port


def _tab_of_link(request: gr.Request) -> gr.Tabs:
    asked = request.query_params.get("tab")
    keys = [key for key, _, _ in TABS]
    return gr.Tabs(selected=asked if asked in keys else keys[0])
