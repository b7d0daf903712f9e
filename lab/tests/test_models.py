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
    from turbovlm_lab.models import BlipForNLVR2

    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    vision = transformers.BlipVisionConfig(**size, image_size=48, patch_size=8, initializer_range=0.05)
    text = transformers.BertConfig(**size, vocab_size=60, max_position_embeddings=40)
    return BlipForNLVR2(vision, text, encode_token=59).eval()


@torch.no_grad()
def test_both_images_of_nlvr2_are_read_by_size():
    """Of images whose patches are all there twice, doubles merge and the scores stay."""
    model = nlvr2()
    places = model.vision_model.embeddings.position_embedding
    places[:, 2::2] = places[:, 1::2]
    for layer in model.layers:
        for each in (layer.crossattention.self0, layer.crossattention.self1):
            each.query.weight.mul_(20)
            each.value.weight.mul_(20)
    pixels = torch.randn(3, 2, 3, 6, 8, 3, 1, 8).expand(-1, -1, -1, -1, -1, -1, 2, -1).reshape(3, 2, 3, 48, 48)
    given = {"pixel_values": pixels, "input_ids": torch.randint(1, 50, (3, 7))}
    scores, doubles = model(**given), {"r": (13, 0, 0, 0), "degree": "redundancy", "partition": "alternate"}
    with turbovlm.apply(model, **doubles):
        torch.testing.assert_close(model(**given), scores, rtol=0, atol=1e-5)
    with turbovlm.apply(model, **doubles, proportional=False):
        assert (model(**given) - scores).abs().max() > 1e-4


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
    images = torch.randn(batch, 2, 3, 48, 48, generator=generator)
    return images, torch.randint(1, 50, (batch, 9), generator=generator)


@torch.no_grad()
def test_nlvr2_loads_its_authors_format(tmp_path):
    from turbovlm_lab.models import BlipForNLVR2

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
    model, (images, words) = nlvr2(), pairs()
    scores = model(images, words)
    assert scores.shape == (2, 2)
    torch.testing.assert_close(model(images.transpose(0, 1).flatten(0, 1), words), scores)
    assert (model(images.flip(1), words) - scores).abs().max() > 1e-4
    padded = torch.nn.functional.pad(words, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(words), (0, 3))
    torch.testing.assert_close(model(images, padded, mask), scores, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="two images per sentence"):
        model(images[0], words)


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


IMAGE = 100


def minigpt(pixels=48):
    from turbovlm_lab.models import MiniGPTv2

    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, vocab_size=IMAGE, pad_token_id=0))
    vision = transformers.Blip2VisionConfig(**size, image_size=pixels, patch_size=8, initializer_range=0.05)
    return MiniGPTv2(llama, vision).eval()


def conversation():
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 0, 5, IMAGE, 6, 7], [8, IMAGE, 9, IMAGE, 10, 11]])
    return images, ids, (ids != 0).long()


@torch.no_grad()
def test_minigpt_reads_a_quarter_of_its_patches():
    model = minigpt()
    images, ids, mask = conversation()
    assert model.visual_tokens(images).shape == (3, 9, WIDTH)
    inputs = model.prompt(images, ids, mask)
    assert inputs["inputs_embeds"].shape[1] == 4 + 2 * 9
    assert inputs["attention_mask"].sum(1).tolist() == [3 + 9, 4 + 18]
    alone = model(images[:1], ids[:1, 2:]).logits[0, -1]
    torch.testing.assert_close(model(images, ids, mask).logits[0, -1], alone, rtol=0, atol=1e-5)
    with turbovlm.apply(model, r=2):
        assert model.visual_tokens(images).shape == (3, 7, WIDTH)
    with turbovlm.apply(model, r=2, visual_keep=0.5):
        assert model.visual_tokens(images).shape == (3, 4, WIDTH)
    with pytest.raises(ConfigError, match="3 images expected"):
        model(images[:2], ids, mask)


@pytest.mark.parametrize(("r", "tokens"), [(0, 256), (12, 139), (16, 100)])
@torch.no_grad()
def test_minigpt_reads_as_many_tokens_as_published(r, tokens):
    from turbovlm_lab.models import MiniGPTv2

    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_hidden_layers=1, vocab_size=IMAGE))
    vision = transformers.Blip2VisionConfig(**size, num_hidden_layers=39, image_size=448, patch_size=14)
    model = MiniGPTv2(llama, vision).eval()
    with turbovlm.apply(model, r=r):
        assert model.visual_tokens(torch.randn(1, 3, 448, 448)).shape[1] == tokens


@torch.no_grad()
def test_joined_tokens_are_neighbours():
    model = minigpt()
    with turbovlm.apply(model, r=2) as handle:
        model.visual_tokens(conversation()[0])
        kept = torch.arange(37).expand(3, -1)
        for merge in handle.features[0].last.merges:
            kept = kept.gather(1, merge.kept)
    assert kept.diff(dim=1).gt(0).all()


@torch.no_grad()
def test_minigpt_generates_and_comes_back():
    model, inputs = minigpt(), conversation()
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    before = model.generate(*inputs, **settings)
    assert before.shape == (2, 4)
    with turbovlm.apply(model, r=2, visual_keep=0.5):
        model.generate(*inputs, **settings)
    assert torch.equal(model.generate(*inputs, **settings), before)


@torch.no_grad()
def test_minigpt_loads_its_authors_format(tmp_path):
    from turbovlm_lab.models import MiniGPTv2

    model, generator = minigpt(), torch.Generator().manual_seed(3)
    eva = {}
    for name, value in model.vision_model.state_dict().items():
        name = name.replace("embeddings.class_embedding", "cls_token").replace(
            "embeddings.position_embedding", "pos_embed"
        )
        name = name.replace("embeddings.patch_embedding", "patch_embed.proj").replace("encoder.layers.", "blocks.")
        name = name.replace("layer_norm", "norm").replace("self_attn.projection", "attn.proj")
        name = name.replace("self_attn.qkv", "attn.qkv")
        if name.endswith("attn.qkv.bias"):
            eva[name.replace("qkv.bias", "q_bias")], _, eva[name.replace("qkv.bias", "v_bias")] = value.chunk(3)
        elif not name.startswith("post_layernorm"):
            eva[name] = value
    eva |= {"blocks.4.norm1.weight": torch.zeros(WIDTH), "head.weight": torch.zeros(2, WIDTH)}
    torch.save(eva, tmp_path / "eva_vit_g.pth")
    stored = {f"llama_proj.{name}": value for name, value in model.projection.state_dict().items()}
    matrix = "llama_model.base_model.model.model.layers.1.self_attn.q_proj"
    stored[f"{matrix}.lora_A.weight"] = torch.randn(3, WIDTH, generator=generator)
    stored[f"{matrix}.lora_B.weight"] = torch.randn(WIDTH, 3, generator=generator)
    torch.save({"model": stored}, tmp_path / "minigptv2.pth")

    llama = minigpt().language_model
    bare = llama.model.layers[1].self_attn.q_proj.weight.clone()
    files = {"path": tmp_path / "minigptv2.pth", "eva": tmp_path / "eva_vit_g.pth"}
    loaded = MiniGPTv2.from_checkpoint(**files, language_model=llama, vision=model.vision_model.config)
    images = conversation()[0]
    torch.testing.assert_close(loaded.visual_tokens(images), model.visual_tokens(images), rtol=0, atol=1e-5)
    added = stored[f"{matrix}.lora_B.weight"] @ stored[f"{matrix}.lora_A.weight"] / 4
    torch.testing.assert_close(llama.model.layers[1].self_attn.q_proj.weight, bare + added)

    larger = copy.deepcopy(model.vision_model.config)
    larger.image_size = 64
    loaded = MiniGPTv2.from_checkpoint(**files, language_model=minigpt().language_model, vision=larger)
    assert loaded.vision_model.embeddings.position_embedding.shape == (1, 65, WIDTH)
    stored["llama_model.base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(3, WIDTH)
    torch.save(stored, tmp_path / "minigptv2.pth")
    with pytest.raises(TurboError, match="no LoRA matrix of this LlamaForCausalLM"):
        MiniGPTv2.from_checkpoint(**files, language_model=minigpt().language_model, vision=larger)
