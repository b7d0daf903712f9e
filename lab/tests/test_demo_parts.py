"""The demo's images, its regions and its chart."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from PIL import Image

from turbovlm.errors import TurboError
from turbovlm_lab.demo.chart import Curve, line_chart
from turbovlm_lab.demo.photos import load_files, load_photos
from turbovlm_lab.demo.saliency import overlap, salient_region


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


def test_overlap() -> None:
    a, b = torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4, dtype=torch.bool)
    a[0, :2], b[0, 1:3] = True, True
    a[1], b[1] = True, True
    torch.testing.assert_close(overlap(a, b), torch.tensor([1 / 3, 1.0, 1.0]))


def test_salient_region_is_relative_to_each_maximum() -> None:
    heat = torch.tensor([[0.2, 0.1, 0.09, 0.0], [0.8, 0.1, 0.4, 0.39]]).view(2, 1, 2, 2)
    expected = torch.tensor([[True, True, False, False], [True, False, True, False]]).view(2, 2, 2)
    assert torch.equal(salient_region(heat), expected)


def test_chart_of_one_point_and_escaping() -> None:
    curve = Curve("a<b", "#000", "s", "-", ((1.0, 1.0, "r=0"),))
    chart = line_chart([curve], "x & y", "y", 'say "so"')
    root = ElementTree.fromstring(chart)
    assert root.get("aria-label") == 'say "so"'
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a<b", "x & y", "r=0"} <= texts
    assert line_chart([curve], "x & y", "y", 'say "so"') == chart
