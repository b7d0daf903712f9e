"""The studio's second and third tab, driven in a browser as a person would."""

from __future__ import annotations

import csv
import json
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
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

import turbovlm
from turbovlm.patching import patches_on
from turbovlm_lab.studio.app import Settings, serve
from turbovlm_lab.studio.encoders import ImageEncoder
from turbovlm_lab.studio.subjects import IMAGE, Models, Subject
from turbovlm_lab.zoo import clip

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium in the PATH")
SECONDS = 15_000
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
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(SECONDS)
    said, asked = [], []
    context.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: said.append(str(error.error)))
    context.on("request", lambda request: asked.append(request.url))
    yield context.new_page()
    assert said == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    context.close()


def open_tab(page: sync_api.Page, address: str, query: str) -> None:
    page.goto(f"{address}?{query}")
    page.locator(f"#{re.search('tab=([a-z]+)', query)[1]}-start").wait_for()
    page.wait_for_function("window.studio && window.studio.asked === null")


def stopped(shop: Models, seconds: float = 20) -> bool:
    """Whether nothing computes any more, and nothing is left on the model."""
    if not shop.computing.acquire(timeout=seconds):
        return False
    shop.computing.release()
    return next(iter(patches_on(shop["small"].model)), None) is None


def upload(page: sync_api.Page, tab: str, files: Sequence[Path]) -> None:
    page.locator(f"#{tab}-files input[type=file]").set_input_files(files)
    page.locator(f"#{tab}-files").get_by_text(files[0].name.removesuffix(".png")).first.wait_for()


def saved(page: sync_api.Page, button: str) -> str:
    with page.expect_download() as download:
        page.click(button)
    return Path(download.value.path()).read_text()


def test_methods_are_compared_on_three_photographs(page, address) -> None:
    open_tab(page, address, "tab=compare&compare-count=3&compare-shares=0.6&compare-rounds=2")
    page.click("#compare-start")
    page.locator("#compare-table table").wait_for()
    rows = page.locator("#compare-table tbody tr").all()
    methods = ["unmerged", "turbovlm", "ToMe", "random", "smaller image"]
    assert [row.locator("td").first.inner_text() for row in rows] == methods
    assert page.locator("#compare-chart svg").get_attribute("aria-label").startswith("Drift over time: turbovlm")
    assert "3 images only" in page.locator("#compare-said").inner_text()
    strips = page.locator("#compare-patches .strip")
    assert strips.count() == 3
    assert strips.first.locator("img").count() == len(methods)
    lines = list(csv.DictReader(saved(page, "#compare-csv").splitlines()))
    assert [line["method"] for line in lines] == ["unmerged", "turbo", "tome", "random", "smaller"]
    assert json.loads(saved(page, "#compare-json"))["model"] == "small ViT"
    before = strips.first.locator("img").nth(1).get_attribute("src")
    page.locator("#compare-block input[type=number]").fill("1")
    page.wait_for_function("before => document.querySelectorAll('#compare-patches img')[1].src !== before", arg=before)


def test_a_folder_is_compared_by_keyboard_on_a_narrow_screen(page, address) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    open_tab(
        page,
        address,
        "tab=compare&compare-images=folder1&compare-methods=smaller&compare-shares=0.7,0.5&compare-rounds=2",
    )
    page.locator("#compare-start").focus()
    page.keyboard.press("Enter")
    page.locator("#compare-table table").wait_for()
    assert page.locator("#compare-table tbody tr").count() == 5
    assert "left out: broken.png: is not an image" in page.locator("#compare-said").inner_text()
    width, shown = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= shown
    page.locator("#compare-share").get_by_text("50%").click()
    page.locator("#compare-patches .strip").first.wait_for()


def test_controls_are_in_the_address_and_back(page, address) -> None:
    open_tab(page, address, "tab=compare")
    page.locator("#compare-methods").get_by_text("ToMe").click()
    page.locator("#compare-shares").get_by_text("30%").click()
    page.locator("#compare-images").get_by_text("holiday").click()
    page.wait_for_url("**compare-images=folder1**")
    again = page.context.new_page()
    open_tab(again, page.url.partition("?")[0], page.url.partition("?")[2])
    again.wait_for_function("document.querySelectorAll('#compare-shares input:checked').length === 4")
    assert not again.locator("#compare-methods").get_by_label("ToMe").is_checked()
    assert again.locator("#compare-images").get_by_label("holiday").is_checked()


def test_an_address_that_names_what_there_is_not(page, address) -> None:
    open_tab(page, address, "tab=compare&compare-shares=0.61&compare-images=../etc")
    said = page.locator("#problem-compare .problem")
    said.wait_for()
    assert "compare-shares=0.61" in said.inner_text()
    assert "compare-images=../etc" in said.inner_text()


def test_settings_are_calibrated_on_thirty_images(page, address, folder) -> None:
    open_tab(page, address, "tab=calibrate&calibrate-effort=1&calibrate-value=0.7")
    upload(page, "calibrate", images(folder / "thirty", 30))
    page.click("#calibrate-start")
    page.locator("#calibrate-said .promise").wait_for()
    assert "70." in page.locator("#calibrate-said .card").first.inner_text()
    assert "15 of 30 images were held out" in page.locator("#calibrate-held").inner_text()
    lines = page.locator("#calibrate-lines").inner_text()
    assert "TurboConfig.load" in lines
    (folder / "turbo.json").write_text(saved(page, "#calibrate-settings"))
    found = turbovlm.Calibration.load(folder / "turbo.json")
    assert str(found) == page.locator("#calibrate-said .promise").inner_text()
    assert found.images == 15


def test_too_few_images_and_files_that_are_none(page, address, folder) -> None:
    open_tab(page, address, "tab=calibrate")
    few = images(folder / "few", 3)
    few[1].write_text("text with the name of an image")
    upload(page, "calibrate", few)
    page.click("#calibrate-start")
    said = page.locator("#problem-calibrate .problem")
    said.wait_for()
    assert said.inner_text().startswith("images: 3 are too few, at least 30 are needed")
    page.locator("#calibrate-value input").fill("1.5")
    page.click("#calibrate-start")
    page.wait_for_function("document.querySelector('#problem-calibrate').innerText.includes('flops=1.5')")
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-images").get_by_text("my own").click()
    upload(page, "compare", few)
    page.locator("#compare-shares").get_by_text("80%").click()
    page.click("#compare-start")
    page.locator("#compare-table table").wait_for()
    assert "noise01.png: is not an image" in page.locator("#compare-said").inner_text()


def test_cancel_stops_what_runs(page, address, folder, shop) -> None:
    open_tab(page, address, "tab=calibrate&calibrate-target=max_drift&calibrate-value=0.5&calibrate-effort=16")
    upload(page, "calibrate", images(folder / "forty", 40))
    page.click("#calibrate-start")
    page.locator("#calibrate-bar progress[value]").wait_for()
    assert re.search(r"calibrating: \d+ of \d+", page.locator("#calibrate-bar").inner_text())
    page.click("#calibrate-cancel")
    page.get_by_text("Cancelled after").wait_for()
    assert page.locator("#calibrate-start").is_enabled()
    assert stopped(shop)


def test_a_closed_page_stops_what_runs(browser, address, folder, shop) -> None:
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    open_tab(page, address, "tab=calibrate&calibrate-target=max_drift&calibrate-value=0.5&calibrate-effort=16")
    upload(page, "calibrate", images(folder / "forty", 40))
    page.click("#calibrate-start")
    page.locator("#calibrate-bar progress[value]").wait_for()
    page.close()
    assert stopped(shop)
