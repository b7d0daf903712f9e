"""Models of an image encoder beside a text encoder: the images' tokens are merged, the texts' stay as they are."""

from __future__ import annotations

import pytest
import torch

import turbovlm
from families import FAMILIES
from turbovlm.errors import UnsupportedModelError
from vlms import CLIP, seeded

transformers = pytest.importorskip("transformers")

WORDS = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SENTENCES = torch.tensor([[2, 5, 6, 7, 63, 0, 0, 0], [2, 8, 9, 10, 63, 0, 0, 0]])


def dual(vision, words="Bert"):
    tower, text = getattr(transformers, vision)(**CLIP), getattr(transformers, f"{words}Config")(**WORDS)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(tower, text, projection_dim=16)
    return transformers.VisionTextDualEncoderModel(config)


def contrastive(name, words):
    text = {**WORDS, "max_position_embeddings": 8, **words}
    return getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(vision_config=CLIP, text_config=text)
    )


DUAL = {
    "dual of CLIP": lambda: dual("CLIPVisionConfig"),
    "dual of ViT": lambda: dual("ViTConfig"),
    "dual of SigLIP": lambda: dual("SiglipVisionConfig"),
    "CLIP": lambda: contrastive("CLIP", {"bos_token_id": 2, "eos_token_id": 63, "pad_token_id": 0}),
    "SigLIP": lambda: contrastive("Siglip", {"bos_token_id": 2, "eos_token_id": 63, "pad_token_id": 0}),
    "open_clip": FAMILIES["open_clip"].make,
}


def embedded(model, pixels):
    """Images' and texts' embeddings of the whole forward, normed, and the images' alone."""
    if not hasattr(model, "get_image_features"):
        images, texts, _ = model(pixels, SENTENCES)
        return images, texts, model.encode_image(pixels)
    out = model(input_ids=SENTENCES, pixel_values=pixels)
    features = model.get_image_features(pixel_values=pixels)
    return out.image_embeds, out.text_embeds, features if isinstance(features, torch.Tensor) else features.pooler_output


@pytest.mark.parametrize("name", DUAL)
@torch.no_grad()
def test_dual_encoders(name):
    if name == "open_clip":
        pytest.importorskip("open_clip")
    model, pixels = seeded(DUAL[name]), FAMILIES["clip"].inputs(2)["pixel_values"]
    before = embedded(model, pixels)
    with turbovlm.apply(model, r=4) as handle:
        (schedule,) = handle.schedules
        images, texts, features = embedded(model, pixels)
    assert schedule.tower in ("vision_model", "visual") and schedule.tokens[-1] == schedule.tokens[0] - 16
    assert torch.equal(texts, before[1])
    for found, wanted in ((images, before[0]), (features, before[2])):
        assert not torch.equal(found, wanted)
        assert torch.cosine_similarity(found, wanted).min() > 0.9
    with turbovlm.apply(model, r=0):
        for found, wanted in zip(embedded(model, pixels), before):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert all(torch.equal(found, wanted) for found, wanted in zip(embedded(model, pixels), before))
    with pytest.raises(UnsupportedModelError, match="no language model that reads visual tokens"):
        turbovlm.apply(model, visual_keep=0.5)


@pytest.mark.parametrize(("name", "restore"), [("open_clip", None), ("open_clip_avg", "residual")])
def test_open_clip_gets_its_tokens_back_where_it_pools_them(name, restore):
    pytest.importorskip("open_clip")
    with turbovlm.apply(FAMILIES[name].make(), r=4) as handle:
        assert handle.features[0].restore == restore
