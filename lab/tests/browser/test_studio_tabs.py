"""The studio's second and third tab, driven in a browser as a person would."""

from __future__ import annotations

import csv
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("playwright.sync_api")

from PIL import Image
from playwright import sync_api

from turbovlm_lab.studio.app import Settings, serve
from turbovlm_lab.studio.encoders import ImageEncoder
from turbovlm_lab.studio.subjects import IMAGE, Models, Subject
from turbovlm_lab.zoo import clip

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium in the PATH")
SECONDS = 60_000
"""Of patience, in milliseconds: other tests may use the processor too."""


def small_clip() -> ImageEncoder:
    """CLIP's image tower of 197 tokens with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = CLIPVisionConfig(**size, image_size=224, patch_size=16, projection_dim=clip.WIDTH)
    model = CLIPVisionModelWithProjection(config).eval()
    return ImageEncoder(model, 224, 16, clip.preprocess, clip.embed, lambda *_: {"labels": {"a": 0.5}}, "a tower")


def images(folder: Path, count: int) -> list[Path]:
    """Small images of noise, all different."""
    folder.mkdir(exist_ok=True)
    generator, files = torch.Generator().manual_seed(0), []
    for place in range(count):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        files.append(folder / f"noise{place:02}.png")
        Image.fromarray(pixels.numpy()).resize((48, 48)).save(files[-1])
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="module")
def shop(folder) -> Models:
    images(folder / "holiday", 4)
    (folder / "holiday" / "broken.png").write_text("no image")
    subject = Subject("small", "small ViT", "", IMAGE, small_clip, encodes=True)
    return Models([subject], (folder / "holiday",))


@pytest.fixture(scope="module")
def address(shop) -> Iterator[str]:
    found: list[str] = []
    ready, until = threading.Event(), threading.Event()

    def begun(url: str) -> None:
        found.append(url)
        ready.set()

    served = threading.Thread(target=serve, args=(Settings(port=0), begun, until, shop), daemon=True)
    served.start()
    assert ready.wait(60), "the studio does not answer"
    yield found[0]
    until.set()
    served.join(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser, address) -> Iterator[sync_api.Page]:
    """A page on which nothing may go wrong in the console, and which asks nobody else for anything."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(SECONDS)
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    opened.close()
    assert said == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def open_tab(page: sync_api.Page, address: str, query: str) -> None:
    page.goto(f"{address}?{query}")
    page.locator(f"#{re.search('tab=([a-z]+)', query)[1]}-start").wait_for()
    page.wait_for_function("window.studio && window.studio.asked === null")


def test_methods_are_compared_on_three_photographs(page, address, tmp_path) -> None:
    open_tab(page, address, "tab=compare&compare-count=3&compare-shares=0.6&compare-rounds=2")
    page.click("#compare-start")
    page.locator("#compare-table table").wait_for()
    rows = page.locator("#compare-table tbody tr")
    methods = [row.locator("td").first.inner_text() for row in rows.all()]
    assert methods == ["unmerged", "turbovlm", "ToMe", "random", "smaller image"]
    assert page.locator("#compare-chart svg").get_attribute("aria-label").startswith("Drift over time: turbovlm")
    assert "3 images only" in page.locator("#compare-said").inner_text()
    strips = page.locator("#compare-patches .strip")
    assert strips.count() == 3
    assert strips.first.locator("img").count() == 5
    with page.expect_download() as saved:
        page.click("#compare-csv")
    lines = list(csv.DictReader(Path(saved.value.path()).read_text().splitlines()))
    assert [line["method"] for line in lines] == ["unmerged", "turbo", "tome", "random", "smaller"]
    with page.expect_download() as saved:
        page.click("#compare-json")
    assert json.loads(Path(saved.value.path()).read_text())["model"] == "small ViT"
    before = strips.first.locator("img").nth(1).get_attribute("src")
    page.locator("#compare-block input[type=number]").fill("1")
    page.locator("#compare-block input[type=number]").press("Enter")
    page.wait_for_function("before => document.querySelectorAll('#compare-patches img')[1].src !== before", arg=before)
