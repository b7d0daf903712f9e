"""Takes the studio's screenshots:  python docs/screenshots.py; writes docs/images/studio-*.png.

Needs gradio, playwright and Debian's chromium.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from turbovlm_lab.studio.app import Settings, serving

IMAGES = Path(__file__).parent / "images"
DONE = "#costs .cards[data-stage=done]"
SHOTS = {
    "look": ("?model=clip&image=chelsea&block=7", 1280, 118),
    "scenes": ("?model=scenes&image=scene-0&amount=keep&value=0.3", 1280, None),
    "narrow": ("?model=saliency&image=coffee", 390, None),
}
"""Of each picture: the link, the width of the window, and the patch that the pointer is on."""


def main() -> None:
    with serving(Settings(port=0)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (link, width, patch) in SHOTS.items():
            page = browser.new_page(viewport={"width": width, "height": 860})
            page.goto(url + link)
            page.wait_for_selector(DONE, timeout=240_000)
            take(page, patch, IMAGES / f"studio-{name}.png")
            page.close()
        browser.close()


def take(page: Any, patch: int | None, file: Path) -> None:
    """A picture of the whole page in 255 colours."""
    if patch is not None:
        page.hover(f'[data-patch="{patch}"]')
    page.screenshot(path=file, full_page=True)
    with Image.open(file) as shot:
        small = shot.convert("RGB").quantize(255, dither=Image.Dither.NONE)
    small.save(file, optimize=True)


if __name__ == "__main__":
    main()
