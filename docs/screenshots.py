"""Takes the studio's pictures of docs, in Debian's Chromium:  python docs/screenshots.py [NAME …]

studio-look.png: CLIP names a cat; one token is lit up.
studio-scenes.png: the scene reader with three tenths of its tokens.
studio-narrow.png: a heat map, on a telephone's screen.
studio-compare.png: methods compared by the ViT-S/14 on seven photographs.
studio-calibrate.png: settings calibrated for the ViT-S/14 on 32 crops of these photographs.
"""

import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

IMAGES = Path(__file__).parent / "images"
WIDTH, MOST_BYTES = 1280, 300_000
PATIENCE = 600_000
"""Milliseconds that a run may take."""
CROPS = 32


def main() -> None:
    from playwright.sync_api import sync_playwright

    from turbovlm_lab.studio.app import Settings, serving

    wanted = sys.argv[1:] or list(SHOTS)
    with serving(Settings(port=0)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in wanted:
            page = browser.new_page(viewport={"width": WIDTH, "height": 900}, base_url=url)
            page.set_default_timeout(PATIENCE)
            save(name, SHOTS[name](page))
            page.close()
        browser.close()


def save(name: str, shot: bytes) -> None:
    """As a PNG of 256 colours, which the page hardly has more of."""
    IMAGES.mkdir(exist_ok=True)
    file = IMAGES / f"studio-{name}.png"
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(256).save(file, optimize=True)
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{file}: {size} bytes are too many; at most {MOST_BYTES}")


def open_tab(page: Any, tab: str, **asked: Any) -> None:
    query = "&".join(f"{tab}-{name}={value}" for name, value in asked.items())
    page.goto(f"/?tab={tab}&{query}")
    page.locator(f"#{tab}-start").wait_for()
    page.wait_for_function("window.studio && window.studio.asked === null")


def look(page: Any, link: str, width: int, patch: int | None = None) -> bytes:
    """The first tab, with the pointer on a patch if one is given."""
    page.set_viewport_size({"width": width, "height": 860})
    page.goto(link)
    page.locator("#costs .cards[data-stage=done]").wait_for()
    if patch is not None:
        page.hover(f'[data-patch="{patch}"]')
    shot: bytes = page.screenshot(full_page=True)
    return shot


def compare(page: Any) -> bytes:
    open_tab(page, "compare", model="saliency", count=7, shares="0.8,0.6,0.4", rounds=4)
    page.click("#compare-start")
    page.locator("#compare-table table").wait_for()
    page.locator("#compare-share").get_by_text("60%").click()
    page.wait_for_timeout(2000)
    bottom = page.locator("#compare-patches .strip").nth(2).bounding_box()
    height = round(bottom["y"] - 12 + page.evaluate("scrollY"))
    shot: bytes = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
    return shot


def calibrate(page: Any) -> bytes:
    open_tab(page, "calibrate", model="saliency", value=0.6, effort=4)
    with tempfile.TemporaryDirectory() as folder:
        page.locator("#calibrate-files input[type=file]").set_input_files(crops(Path(folder)))
        page.locator("#calibrate-files").get_by_text("astronaut").first.wait_for()
        page.click("#calibrate-start")
        page.locator("#calibrate-said .promise").wait_for()
    page.wait_for_timeout(1000)
    shot: bytes = page.screenshot(full_page=True)
    return shot


def crops(folder: Path) -> list[Path]:
    """The built-in photographs and crops of them, and some of these mirrored, as files."""
    from turbovlm_lab.demo.photos import load_photos

    photos, files = load_photos(), []
    mirrored = [(f"{photo.name}-mirrored", photo.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for photo in photos]
    for name, image in [*((photo.name, photo.image) for photo in photos), *mirrored][:CROPS]:
        files.append(folder / f"{name}.jpg")
        image.save(files[-1])
    return files


SHOTS: Mapping[str, Callable[[Any], bytes]] = {
    "look": lambda page: look(page, "/?model=clip&image=chelsea&block=7", 1280, 118),
    "scenes": lambda page: look(page, "/?model=scenes&image=scene-0&amount=keep&value=0.3", 1280),
    "narrow": lambda page: look(page, "/?model=saliency&image=coffee", 390),
    "compare": compare,
    "calibrate": calibrate,
}

if __name__ == "__main__":
    main()
