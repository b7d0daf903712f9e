"""The studio's first tab, driven as a person would: images, sliders, tokens under the pointer, links, uploads."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from PIL import Image, ImageChops

SIZES = re.compile(r"R (\S+) · A (\S+) · E (\S+) · size (\d+)")
TINY = "/?model=folder-tiny"


def settled(page: Any, *state: str) -> None:
    """Wait until the page shows what was run with this state, times and all."""
    has = "".join(f'[data-state*="{part}"]' for part in state)
    page.wait_for_selector(f"#costs .cards{has}[data-stage=done]")


def problem(page: Any, place: str) -> str:
    """Wait for the message beside a control."""
    found = page.locator(f"{place} .problem:not([hidden])")
    found.wait_for()
    text: str = found.inner_text()
    return text


def drawn(page: Any) -> Image.Image:
    return Image.open(io.BytesIO(page.locator(".drawing").screenshot())).convert("RGB")


def test_clip_names_an_image_and_shows_what_became_of_its_patches(page: Any) -> None:
    page.goto("/")
    settled(page, "model=clip", "image=astronaut")
    assert page.title() == "turbovlm studio"
    assert "197 →" in page.inner_text("#costs") and "60% of them left" in page.inner_text("#costs")
    assert page.inner_text(".labels .label b >> nth=0") == "astronaut"
    last = drawn(page)
    page.locator("input.block").fill("5")
    assert "after block 5 of 12" in page.inner_text(".said") and "block=5" in page.url
    fewer_merged = drawn(page)
    assert ImageChops.difference(last, fewer_merged).getbbox() is not None
    assert len(last.getcolors(1 << 24) or []) > 50
    page.hover('[data-patch="100"]')
    r, a, e, size = SIZES.search(page.inner_text(".line")).groups()  # type: ignore[union-attr]
    assert -1 <= float(r.replace("−", "-")) <= 1 and float(a) > 0 and float(e.replace("−", "-")) < 0
    assert page.locator(".cells .on").count() == int(size) >= 1
    sizes = set()
    for patch in range(0, 196, 13):
        page.hover(f'[data-patch="{patch}"]')
        sizes.add(page.locator(".cells .on").count())
    assert max(sizes) > 1


def test_a_slider_another_image_and_own_labels(page: Any) -> None:
    page.goto("/?value=0.9")
    settled(page, "value=0.9")
    words = page.locator("#words textarea")
    words.fill("a cat, a dog")
    words.press("Shift+Enter")
    page.locator("[name=picked][value=chelsea]").check(force=True)
    settled(page, "image=chelsea", "words=a cat, a dog")
    assert page.inner_text(".labels .label b >> nth=0") == "a cat"
    assert "image=chelsea" in page.url and "words=a+cat" in page.url


@pytest.mark.parametrize("width", [1280, 390])
def test_a_link_brings_back_the_same_state(browser: Any, studio: Any, width: int) -> None:
    link = f"{TINY}&image=coffee&amount=r&value=7&alpha=0.5&degree=damped&block=2"
    context = browser.new_context(viewport={"width": width, "height": 800}, base_url=studio.url)
    page = context.new_page()
    page.goto(link)
    settled(page, "model=folder-tiny", "image=coffee", "amount=r", "value=7", "alpha=0.5", "degree=damped")
    assert page.locator("[name=picked]:checked").get_attribute("value") == "coffee"
    assert page.locator("#r .field").input_value() == "7"
    assert page.get_by_label("r · tokens merged per block").is_checked()
    assert "after block 2 of 4" in page.inner_text(".said")
    for part in link.removeprefix("/?").split("&"):
        assert part in page.url
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_what_a_link_has_wrong_is_said(page: Any) -> None:
    page.goto(f"{TINY}&image=nothing&degree=best&value=many")
    text = problem(page, "#problem-link")
    assert "image=nothing" in text and "degree=best" in text and "value=many" in text
    settled(page, "model=folder-tiny", "image=astronaut", "value=0.6")
    assert problem(page, "#problem-link") == text
    page.get_by_text("Reset to defaults").click()
    page.locator("#problem-link .problem").wait_for(state="hidden")


def test_uploads_and_what_is_refused(page: Any, tmp_path: Any) -> None:
    page.goto(TINY)
    settled(page, "image=astronaut")
    drop = page.locator("#drop input[type=file]")
    false = tmp_path / "false.png"
    false.write_text("this is a text")
    drop.set_input_files(false)
    assert problem(page, "#problem-sample") == "false.png: is not an image; PNG, JPEG, WEBP, BMP, GIF are taken"
    wide = tmp_path / "wide.png"
    Image.new("1", (9000, 5000)).save(wide)
    drop.set_input_files(wide)
    page.wait_for_function("document.querySelector('#problem-sample').innerText.includes('45 megapixels')")
    large = tmp_path / "large.png"
    large.write_bytes(bytes(26_000_000))
    drop.set_input_files(large)
    assert problem(page, "#drop") == "large.png: 26.0 MB is too large; at most 25 MB are taken"
    good = tmp_path / "good.jpg"
    Image.radial_gradient("L").convert("RGB").save(good)
    before = drawn(page)
    drop.set_input_files(good)
    page.wait_for_selector('#costs .cards:not([data-state*="image="])')
    assert page.locator(".problem:not([hidden])").count() == 0
    assert ImageChops.difference(before, drawn(page)).getbbox() is not None
    assert "What you upload stays in this page" in page.inner_text("#answers")
    assert "image=" not in page.url


def test_wrong_settings_are_said_beside_their_control_in_the_library_s_words(page: Any) -> None:
    page.goto(TINY)
    settled(page)
    page.get_by_text("Which tokens, and where").click()
    page.locator("#alpha input").fill("-3")
    page.locator("#alpha input").press("Enter")
    assert problem(page, "#problem-ranking") == "alpha=-3: must be a number ≥ 0"
    assert "Nothing was run" in page.inner_text("#costs")
    page.locator("#alpha input").fill("2")
    page.locator("#alpha input").press("Enter")
    settled(page, "alpha=2")
    page.get_by_label("r · tokens merged per block").check()
    settled(page, "amount=r")
    page.locator("#schedule input").click()
    page.get_by_role("option", name="a number for each block").click()
    assert "whole numbers, one for each block" in problem(page, "#problem-schedule")
    page.locator("#listed input, #listed textarea").first.fill("0, 9, 9")
    page.locator("#listed input, #listed textarea").first.press("Enter")
    page.wait_for_function("document.querySelector('#problem-amount').innerText.includes('4')")
    page.locator("#listed input, #listed textarea").first.fill("0, 9, 9, 0")
    page.locator("#listed input, #listed textarea").first.press("Enter")
    settled(page, "listed=0, 9, 9, 0")
    page.get_by_text("Reset to defaults").click()
    settled(page, "amount=flops&value=0.6")
    assert "alpha" not in page.url and "listed" not in page.url


def test_the_keyboard_alone(page: Any) -> None:
    page.goto(TINY)
    settled(page)
    reach(page, "#flops .range")
    for _ in range(5):  # Gradio may put the value back that a run began with, in the moment in which that run ends
        page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(1000)
        if page.locator("#flops .range").input_value() == "0.59":
            break
    settled(page, "value=0.59")
    reach(page, ".drawing")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert "row 3, column 2" in page.inner_text(".line")
    reach(page, "input.block")
    page.keyboard.press("ArrowLeft")
    assert "after block 3 of 4" in page.inner_text(".said")


def reach(page: Any, selector: str) -> None:
    """Press Tab until the element has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
    raise AssertionError(f"{selector} is not reached by Tab")


def test_another_model_brings_its_own_controls(page: Any) -> None:
    page.goto("/")
    settled(page, "model=clip")
    page.locator("#model input").click()
    page.get_by_role("option", name="tiny · your model").click()
    settled(page, "model=folder-tiny")
    assert not page.locator("#words").is_visible()
    assert page.locator(".cells rect").count() == 64
    assert sorted(page.locator(".labels .label b").all_inner_texts()) == ["flat", "round", "square"]
    page.get_by_text("In Python").click()
    assert "turbovlm.apply(model, flops=0.6)" in page.inner_text("#code")


def test_nothing_but_uploads_is_read(studio: Any) -> None:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    for path in ("/etc/hostname", str(studio.folder / "config.json")):
        with pytest.raises(HTTPError) as caught:
            urlopen(f"{studio.url}gradio_api/file={path}", timeout=20)
        assert caught.value.code in (403, 404)
