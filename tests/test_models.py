"""The paper's models that `transformers` does not have."""

from __future__ import annotations

import copy

import pytest
import torch

import turbovlm
from turbovlm.errors import ConfigError, TurboError

transformers = pytest.importorskip("transformers")
WIDTH, DEPTH = 32, 4


def nlvr2():
    from turbovlm.models import BlipForNLVR2

    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    vision = transformers.BlipVisionConfig(**size, image_size=48, patch_size=8, initializer_range=0.05)
    text = transformers.BertConfig(**size, vocab_size=60, max_position_embeddings=40)
    return BlipForNLVR2(vision, text, encode_token=59).eval()


def authors_names(state):
    """The tensors as the authors' `model_base_nlvr.pth` names them."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("vision_model.embeddings.class_embedding", "visual_encoder.cls_token")
        name = name.replace("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed")
        name = name.replace("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj")
        name = name.replace("vision_model.post_layernorm", "visual_encoder.norm")
        if name.startswith("vision_model.encoder.layers."):
            name = name.replace("vision_model.encoder.layers.", "visual_encoder.blocks.")
            name = name.replace("layer_norm", "norm").replace("self_attn.qkv", "attn.qkv")
            name = name.replace("self_attn.projection", "attn.proj")
        elif name.startswith("layers."):
            name = "text_encoder.encoder.layer." + name.removeprefix("layers.")
        elif name.startswith("embeddings."):
            name = "text_encoder." + name
        renamed[name] = value
    return {**renamed, "text_encoder.embeddings.position_ids": torch.arange(40).unsqueeze(0)}


def pairs(batch=2):
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(batch, 2, 3, 48, 48, generator=generator)
    return pictures, torch.randint(1, 50, (batch, 9), generator=generator)


@torch.no_grad()
def test_nlvr2_loads_its_authors_format(tmp_path):
    from turbovlm.models import BlipForNLVR2

    model, other = nlvr2(), nlvr2()
    stored = authors_names(model.state_dict())
    assert {
        "visual_encoder.blocks.0.attn.qkv.weight",
        "text_encoder.encoder.layer.3.crossattention.self1.key.bias",
    } <= set(stored)
    assert "text_encoder.encoder.layer.3.crossattention.output.merge_layer.weight" in stored
    assert "text_encoder.encoder.layer.0.crossattention.output.merge_layer.weight" not in stored
    torch.save({"model": stored}, tmp_path / "nlvr.pth")
    settings = {"vision": model.vision_model.config, "text": other.layers[0].attention.self.config, "encode_token": 59}
    loaded = BlipForNLVR2.from_checkpoint(tmp_path / "nlvr.pth", **settings)
    assert torch.equal(loaded(*pairs()), model(*pairs()))
    del stored["cls_head.2.bias"]
    torch.save(stored, tmp_path / "broken.pth")
    with pytest.raises(TurboError, match=r"1 missing, such as cls_head\.2\.bias"):
        BlipForNLVR2.from_checkpoint(tmp_path / "broken.pth", **settings)
    with pytest.raises(TurboError, match="no such file"):
        BlipForNLVR2.from_checkpoint(tmp_path / "absent.pth", **settings)


@torch.no_grad()
def test_nlvr2_reads_pairs():
    model, (pictures, words) = nlvr2(), pairs()
    scores = model(pictures, words)
    assert scores.shape == (2, 2)
    torch.testing.assert_close(model(pictures.transpose(0, 1).flatten(0, 1), words), scores)
    assert (model(pictures.flip(1), words) - scores).abs().max() > 1e-4
    padded = torch.nn.functional.pad(words, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(words), (0, 3))
    torch.testing.assert_close(model(pictures, padded, mask), scores, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="two pictures per sentence"):
        model(pictures[0], words)


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 4, "visual_keep": 0.5}, {"visual_keep": 10}])
@torch.no_grad()
def test_nlvr2_accelerates_and_comes_back(settings):
    model, inputs = nlvr2(), pairs()
    before = model(*inputs)
    handle = turbovlm.apply(model, **settings)
    found = model(*inputs)
    assert torch.equal(copy.deepcopy(model)(*inputs), found)
    assert not torch.equal(found, before)
    handle.remove()
    assert torch.equal(model(*inputs), before)
