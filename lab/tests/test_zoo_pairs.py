"""The small dual encoder and the classifier, with the weights that ship, on drawings they were not trained on."""

from __future__ import annotations

import pytest
import torch

import turbovlm
from turbovlm.errors import TurboError
from turbovlm_lab.evaluate.builtin_data import classification_data, retrieval_data
from turbovlm_lab.evaluate.builtin_models import zoo_predictor
from turbovlm_lab.evaluate.scoring import scores
from turbovlm_lab.zoo.dual_encoder import load_dual_encoder, load_emoji_classifier, unseen
from turbovlm_lab.zoo.sprites import load_sprites

pytest.importorskip("transformers")


def score(task, predictor, data):
    prepared = [predictor.prepare(sample, None) for sample in data.samples]
    return scores(task, data, predictor.predict(prepared))[0].value


def test_images_find_their_names():
    data, predictor = retrieval_data(24), zoo_predictor("retrieval", "pairs")
    own = score("retrieval", predictor, data)
    with turbovlm.apply(predictor.model, flops=0.8):
        merged = score("retrieval", predictor, data)
    assert own > 0.5 and merged > 0.4, "chance is 1 in 24"


def test_classes_are_told_apart():
    data, predictor = classification_data(24), zoo_predictor("classification", "classifier")
    assert len(data.classes) == 8
    assert score("classification", predictor, data) > 0.4, "chance is 1 in 8"


def test_vectors_are_of_length_1():
    model = load_dual_encoder()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [model.encode_image(pixels), model.encode_text(["a dog", "a hot dog"])]
    for vectors in found:
        assert vectors.shape == (2, 256)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_merged_tokens_are_restored_for_the_mean():
    """What is read is CLS and the mean of all positions, not of the tokens left."""
    model = load_emoji_classifier()
    with turbovlm.apply(model, r=8) as handle:
        model(pixel_values=torch.randn(1, 3, 224, 224))
    assert "restored to 1370 tokens (residual)" in str(handle)


def test_a_fifth_of_the_emoji_is_unseen():
    codes = [sprite.code for sprite in load_sprites()]
    assert 0.17 < sum(map(unseen, codes)) / len(codes) < 0.23


def test_weights_that_are_not_there(tmp_path):
    for load in (load_dual_encoder, load_emoji_classifier):
        with pytest.raises(TurboError, match=r"none\.safetensors: there are no such weights"):
            load(tmp_path / "none.safetensors")
