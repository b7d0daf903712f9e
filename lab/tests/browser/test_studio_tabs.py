"""The studio's second and third tab, driven as a person would: methods compared, settings calibrated."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'turbovlm-lab[studio]'")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

import turbovlm

Images = Callable[[int], list[Path]]
TINY = "model=folder-tiny"
LONG = "tab=calibrate&calibrate-model=saliency&calibrate-target=max_drift&calibrate-value=0.9&calibrate-effort=16"
"""A run of a minute, unless it is stopped: the tiny model's is over before a busy browser has pressed a button."""


def open_tab(page: Any, query: str) -> None:
    page.goto(f"/?{query}")
    page.locator(f"#{re.search('tab=([a-z]+)', query)[1]}-start").wait_for()
    page.wait_for_function("window.studio && window.studio.asked === null")


def upload(page: Any, tab: str, files: Sequence[Path]) -> None:
    page.locator(f"#{tab}-files input[type=file]").set_input_files(files)
    page.locator(f"#{tab}-files").get_by_text(files[0].stem).first.wait_for()


def saved(page: Any, button: str) -> str:
    with page.expect_download() as download:
        page.click(button)
    return Path(download.value.path()).read_text()


def problem(page: Any, tab: str) -> str:
    said = page.locator(f"#problem-{tab} .problem")
    said.wait_for()
    return said.inner_text()


def test_methods_are_compared_on_three_photographs(page: Any) -> None:
    open_tab(page, f"tab=compare&compare-{TINY}&compare-count=3&compare-shares=0.6&compare-rounds=2")
    page.click("#compare-start")
    page.locator("#compare-table table").wait_for()
    rows = page.locator("#compare-table tbody tr").all()
    assert [row.locator("td").first.inner_text() for row in rows] == ["unmerged", "turbovlm", "ToMe", "random"]
    assert page.locator("#compare-chart svg").get_attribute("aria-label").startswith("Drift over time: turbovlm")
    said = page.locator("#compare-said").inner_text()
    assert "3 images only" in said
    assert "Smaller images are left out" in said
    strips = page.locator("#compare-patches .strip")
    assert strips.count() == 3
    assert strips.first.locator("img").count() == len(rows)
    lines = list(csv.DictReader(saved(page, "#compare-csv").splitlines()))
    assert [line["method"] for line in lines] == ["unmerged", "turbo", "tome", "random"]
    assert json.loads(saved(page, "#compare-json"))["images"] == ["astronaut", "chelsea", "coffee"]
    before = strips.first.locator("img").nth(2).get_attribute("src")
    page.locator("#compare-block input[type=number]").fill("1")
    page.wait_for_function("before => document.querySelectorAll('#compare-patches img')[2].src !== before", arg=before)


def test_a_folder_is_compared_by_keyboard_on_a_narrow_screen(narrow_page: Any) -> None:
    page, asked = narrow_page, "compare-images=folder1&compare-methods=none&compare-shares=0.7,0.5&compare-rounds=2"
    open_tab(page, f"tab=compare&compare-{TINY}&{asked}")
    page.locator("#compare-start").focus()
    page.keyboard.press("Enter")
    page.locator("#compare-table table").wait_for()
    assert page.locator("#compare-table tbody tr").count() == 3
    assert "left out: broken.png: is not an image" in page.locator("#compare-said").inner_text()
    width, shown = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= shown
    before = page.locator("#compare-patches img").nth(1).get_attribute("src")
    page.locator("#compare-share").get_by_text("50%").click()
    page.wait_for_function("before => document.querySelectorAll('#compare-patches img')[1].src !== before", arg=before)


def test_controls_are_in_the_address_and_back(page: Any) -> None:
    open_tab(page, "tab=compare")
    page.locator("#compare-methods").get_by_text("ToMe").click()
    page.locator("#compare-shares").get_by_text("30%").click()
    page.locator("#compare-images").get_by_text("holiday").click()
    page.wait_for_url("**compare-images=folder1**")
    again = page.context.new_page()
    open_tab(again, page.url.partition("?")[2])
    again.wait_for_function("document.querySelectorAll('#compare-shares input:checked').length === 4")
    assert not again.locator("#compare-methods").get_by_label("ToMe").is_checked()
    assert again.locator("#compare-images").get_by_label("holiday").is_checked()


def test_an_address_that_names_what_there_is_not(page: Any) -> None:
    open_tab(page, "tab=compare&compare-shares=0.61&compare-images=../etc")
    said = problem(page, "compare")
    assert "compare-shares=0.61" in said
    assert "compare-images=../etc" in said


def test_settings_are_calibrated_on_thirty_images(page: Any, images: Images, tmp_path: Path) -> None:
    open_tab(page, f"tab=calibrate&calibrate-{TINY}&calibrate-effort=1&calibrate-value=0.7")
    upload(page, "calibrate", images(30))
    page.click("#calibrate-start")
    page.locator("#calibrate-said .promise").wait_for()
    assert "15 of 30 images were held out" in page.locator("#calibrate-held").inner_text()
    assert "TurboConfig.load" in page.locator("#calibrate-lines").inner_text()
    (tmp_path / "turbo.json").write_text(saved(page, "#calibrate-settings"))
    found = turbovlm.Calibration.load(tmp_path / "turbo.json")
    assert str(found) == page.locator("#calibrate-said .promise").inner_text()
    assert found.images == 15
    assert found.flops == pytest.approx(0.7, abs=0.02)


def test_too_few_images_and_files_that_are_none(page: Any, images: Images) -> None:
    open_tab(page, f"tab=calibrate&calibrate-{TINY}&compare-{TINY}&compare-rounds=2&compare-methods=none")
    few = images(3)
    few[1].write_text("text with the name of an image")
    upload(page, "calibrate", few)
    page.click("#calibrate-start")
    assert problem(page, "calibrate").startswith("images: 3 are too few, at least 30 are needed")
    page.locator("#calibrate-value input").fill("1.5")
    page.click("#calibrate-start")
    page.wait_for_function("document.querySelector('#problem-calibrate').innerText.includes('flops=1.5')")
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-images").get_by_text("my own").click()
    upload(page, "compare", few)
    page.click("#compare-start")
    page.locator("#compare-table table").wait_for()
    assert "noise01.png: is not an image" in page.locator("#compare-said").inner_text()


def test_a_pipeline_is_given_prompts_in_place_of_images(page: Any) -> None:
    open_tab(page, "tab=calibrate&calibrate-model=emoji&calibrate-steps=3")
    prompts = page.locator("#calibrate-prompts textarea")
    prompts.wait_for()
    assert len(set(prompts.input_value().splitlines())) == 30
    assert page.locator("#calibrate-steps input[type=number]").input_value() == "3"
    assert not page.locator("#calibrate-files").is_visible()
    prompts.fill("red apple\n\npizza")
    page.click("#calibrate-start")
    assert problem(page, "calibrate").startswith("prompts: 2 are too few")


def test_a_link_reaches_tabs_that_are_opened_later(page: Any) -> None:
    page.goto("/?calibrate-model=emoji&compare-images=folder1")
    page.locator("#costs").get_by_text("CPU time").wait_for()
    page.get_by_role("tab", name="Calibrate").click()
    page.locator("#calibrate-prompts textarea").wait_for()
    assert not page.locator("#calibrate-files").is_visible()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-start").wait_for()
    assert page.locator("#compare-images").get_by_label("holiday").is_checked()
    assert page.locator("#compare-count").is_visible()
    assert not page.locator("#compare-files").is_visible()


def test_cancel_and_a_closed_page_stop_what_runs(page: Any, images: Images) -> None:
    files = images(40)
    open_tab(page, LONG)
    upload(page, "calibrate", files)
    page.click("#calibrate-start")
    page.locator("#calibrate-bar").get_by_text(re.compile(r"calibrating: \d+ of \d+")).wait_for()
    page.locator("#calibrate-bar progress[value]").wait_for()
    page.click("#calibrate-cancel")
    page.get_by_text("Cancelled after").wait_for()
    page.click("#calibrate-start")
    page.locator("#calibrate-bar progress[value]").wait_for()
    other = page.context.new_page()
    open_tab(other, LONG)
    upload(other, "calibrate", files)
    other.click("#calibrate-start")
    other.get_by_text("waiting for another run to end").wait_for()
    look = page.context.new_page()
    look.goto("/")
    look.get_by_text("Waiting for a run in another tab").wait_for()
    page.close()
    other.locator("#calibrate-bar progress[value]").wait_for()
    other.click("#calibrate-cancel")
    other.get_by_text("Cancelled after").wait_for()
