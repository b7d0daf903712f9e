"""BLIP's NLVR2 model from its authors' file, as `turbovlm evaluate nlvr2` asks it."""

from __future__ import annotations

import pytest
import torch

from folders import tokenizer
from test_evaluate_predictors import asked, loaded, samples
from test_models import authors_names, nlvr2
from turbovlm.errors import TurboError
from turbovlm.evaluate.run import Setting
from turbovlm.evaluate.settings import encoder_macs, methods

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A small model in the published file's layout, a tokenizer beside it."""
    from turbovlm.models import BlipForNLVR2

    model = nlvr2()
    torch.save({"model": authors_names(model.state_dict())}, tmp_path / "model_base_nlvr.pth")
    tokenizer().save_pretrained(tmp_path)
    text = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=60,
        max_position_embeddings=40,
    )  # fmt: skip
    load = BlipForNLVR2.from_checkpoint
    small = {"vision": model.vision_model.config, "text": text, "encode_token": 59}
    monkeypatch.setattr(BlipForNLVR2, "from_checkpoint", lambda path: load(path, **small))
    return f"blip-nlvr2:{tmp_path / 'model_base_nlvr.pth'}"


def test_statements_are_judged(spec):
    predictor = loaded("nlvr2", spec)
    some = samples(3, "what is a dog", ("True",), pictures=2)
    found = asked(predictor, some)
    pixels = torch.stack([predictor.prepare(sample, None)[0] for sample in some])
    assert pixels.shape == (3, 2, 3, 48, 48)
    words = tokenizer()(["what is a dog"] * 3, return_tensors="pt")
    with torch.no_grad():
        scores = predictor.model(pixels, words["input_ids"])
    assert found == [("False", "True")[best] for best in scores.argmax(dim=1).tolist()]


def test_merging_makes_it_cheaper(spec):
    from turbovlm import TurboConfig

    predictor = loaded("nlvr2", spec)
    sample = samples(1, "what is a dog", ("True",), pictures=2)[0]
    own, *merged = (encoder_macs(predictor, sample, s) for s in [Setting("own"), *methods(TurboConfig(r=5))])
    assert max(merged) < 0.9 * own


def test_what_is_wrong(spec):
    with pytest.raises(TurboError, match=r"'blip-nlvr2' has no model for vqa, which takes BLIP-VQA"):
        loaded("vqa", spec)
    with pytest.raises(TurboError, match=r"none\.pth: there is no such file"):
        loaded("nlvr2", "blip-nlvr2:none.pth")
