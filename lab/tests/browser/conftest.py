"""The studio as a person meets it: one server for all tests, and a browser that notes what goes wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START = """
import argparse
from turbovlm_lab.cli import studio
parser = argparse.ArgumentParser()
studio.register(parser.add_subparsers())
args = parser.parse_args()
args.run(args)
"""
"""The command alone, which also runs where the entry points of a checkout are not installed."""
SECONDS = 40
"""To wait for anything, on a machine that is busy."""


@dataclass(frozen=True)
class Served:
    """A studio that runs: its address, and the folders of a model and of images that it was given."""

    url: str
    folder: Path
    images: Path


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The studio with CLIP, a tiny classifier in a folder, and a folder of images of which one is none."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'turbovlm-lab[studio]'")
    folder = tiny_classifier(tmp_path_factory.mktemp("models") / "tiny")
    images = noise(tmp_path_factory.mktemp("images") / "holiday", 4)[0].parent
    (images / "broken.png").write_text("text with the name of an image")
    python = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", START]
    command = [*python, "studio", "--port", "0", "--threads", "1", "--model", str(folder), "--images", str(images)]
    temporary, log = tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("log") / "studio.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
    try:
        yield Served(_address(process, log), folder, images)
    finally:
        process.terminate()
        assert process.wait(SECONDS) == 0, log.read_text()
    assert [left.name for left in temporary.iterdir() if left.name.startswith("turbovlm")] == []


def tiny_classifier(folder: Path) -> Path:
    """A ViT of 4 blocks on images of 32 pixels, with random weights and three labels."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    labels = {0: "round", 1: "square", 2: "flat"}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=4, id2label=labels)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def noise(folder: Path, count: int) -> list[Path]:
    """Files of small images of noise, all different."""
    image = pytest.importorskip("PIL.Image")
    torch = pytest.importorskip("torch")
    folder.mkdir(exist_ok=True)
    generator, files = torch.Generator().manual_seed(0), []
    for place in range(count):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        files.append(folder / f"noise{place:02}.png")
        image.fromarray(pixels.numpy()).resize((48, 48)).save(files[-1])
    return files


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """What the command prints when it answers."""
    until = time.monotonic() + 3 * SECONDS
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"^turbovlm studio: (\S+)", log.read_text(), re.MULTILINE)
        if found:
            return found[1]
        time.sleep(0.2)
    raise AssertionError(f"the studio did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, studio: Served) -> Iterator[Any]:
    """A page of 1280 pixels; the test fails where the console has an error or a request leaves this machine."""
    yield from watched(browser, studio, 1280)


@pytest.fixture
def narrow_page(browser: Any, studio: Served) -> Iterator[Any]:
    """The same on a telephone's screen."""
    yield from watched(browser, studio, 390)


def watched(browser: Any, studio: Served, width: int) -> Iterator[Any]:
    """A page and, behind the test, what went wrong on it."""
    context = browser.new_context(viewport={"width": width, "height": 900}, base_url=studio.url)
    found = context.new_page()
    found.set_default_timeout(1000 * SECONDS)
    wrong: list[str] = []
    own = (studio.url, "data:", "blob:", "about:")
    found.on("console", lambda message: wrong.append(message.text) if is_wrong(message) else None)
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    yield found
    context.close()
    assert wrong == []


def is_wrong(message: Any) -> bool:
    """Whether something is wrong: not that Gradio has closed what told it of an upload's progress."""
    return message.type in ("error", "warning") and message.text != "Method not implemented."


@pytest.fixture
def images(tmp_path: Path) -> Callable[[int], list[Path]]:
    """So many files of images."""
    return lambda count: noise(tmp_path / f"noise-{count}", count)
