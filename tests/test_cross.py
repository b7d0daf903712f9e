"""Image tokens reduced between cross-attention layers, as the words' attention says."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch

import turbovlm
from turbovlm.errors import ConfigError, StateError, UnsupportedModelError
from vlms import blip, llava, noise, seeded

transformers = pytest.importorskip("transformers")
IMAGES = noise(0, 2, 3, 48, 48)
IDS = torch.tensor([[2, 5, 6, 7], [2, 8, 9, 10]])
TASKS = ("ConditionalGeneration", "QuestionAnswering", "ImageTextRetrieval")


@pytest.fixture(params=TASKS)
def model(request):
    return seeded(lambda: blip(request.param))


def text_layers(model):
    return model.text_encoder.encoder.layer if hasattr(model, "text_encoder") else model.text_decoder.bert.encoder.layer


def words(model):
    """The last hidden states of the words that read the image, `[2, words, 32]`."""
    found = []
    hook = text_layers(model)[-1].register_forward_hook(lambda module, inputs, output: found.append(output))
    answer = (
        {"decoder_input_ids": IDS} if hasattr(model, "answer_start_id") or "Question" in type(model).__name__ else {}
    )
    try:
        with torch.no_grad():
            model(pixel_values=IMAGES, input_ids=IDS, **answer)
    finally:
        hook.remove()
    return found[0]


def seeing(cross, kept, hidden, *args, **kwargs):
    """A layer's own cross-attention, to which only the image tokens `kept` are visible."""
    mask = torch.full((2, 1, 1, 37), torch.finfo(torch.float32).min)
    mask[:, :, :, 0] = 0
    mask.scatter_(3, kept[:, None, None] + 1, 0)
    return type(cross).forward(cross, hidden, *args, **{**kwargs, "encoder_attention_mask": mask})


def test_pruned_equals_masked_layer_by_layer(model):
    plain = words(model)
    with turbovlm.apply(model, cross_keep=0.3, reduce="prune") as handle:
        pruned = words(model)
        left = handle.cross
    assert [selection.kept.shape[1] for selection in left] == [24, 11]
    place = torch.arange(36).expand(2, -1)
    for layer, selection in zip(text_layers(model)[1:], left):
        place = place.gather(1, selection.kept)
        cross = layer.crossattention.self
        cross.forward = functools.partial(seeing, cross, place)
    masked = words(model)
    for layer in text_layers(model)[1:]:
        del layer.crossattention.self.forward
    torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)
    assert (pruned - plain).abs().max() > 1e-3
    assert torch.equal(words(model), plain)


def test_all_tokens_kept_changes_nothing(model):
    plain = words(model)
    with turbovlm.apply(model, cross_keep=1.0):
        torch.testing.assert_close(words(model), plain, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("proportional", (True, False))
def test_alike_tokens_count_by_number(proportional):
    """An image of two kinds of tokens: merged, they get the attention that they got one by one."""
    model = seeded(lambda: blip("ImageTextRetrieval"))
    kinds = torch.cat([noise(1, 1, 1, 32).expand(-1, 26, -1), noise(2, 1, 1, 32).expand(-1, 11, -1)], dim=1)
    image = torch.cat(
        [kinds[:, :1], kinds[:, torch.randperm(37, generator=torch.Generator().manual_seed(0))][:, 1:]], 1
    )

    def read():
        return model.text_encoder(input_ids=IDS[:1], encoder_hidden_states=image).last_hidden_state

    plain = read()
    with turbovlm.apply(model, cross_keep=0.4, visual_select="redundancy", proportional=proportional):
        gap = (read() - plain).abs().max()
    assert gap < 1e-5 if proportional else gap > 1e-4


@torch.no_grad()
def test_padding_has_no_say():
    model = seeded(lambda: blip("ImageTextRetrieval"))
    padded = torch.cat([IDS, torch.tensor([[0, 0], [0, 0]])], dim=1)
    mask = (padded != 0).long()
    with turbovlm.apply(model, cross_keep=0.3):
        alone = model(pixel_values=IMAGES, input_ids=IDS).itm_score
        beside = model(pixel_values=IMAGES, input_ids=padded, attention_mask=mask).itm_score
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-6)


@torch.no_grad()
def test_similarity_mode_reads_no_image():
    model = seeded(lambda: blip("ImageTextRetrieval"))
    plain = model(pixel_values=IMAGES, input_ids=IDS, use_itm_head=False).itm_score
    with turbovlm.apply(model, cross_keep=0.3):
        assert torch.equal(model(pixel_values=IMAGES, input_ids=IDS, use_itm_head=False).itm_score, plain)


@torch.no_grad()
@pytest.mark.parametrize("settings", ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}))
def test_generates_from_a_shorter_cache(settings):
    model = seeded(lambda: blip("ConditionalGeneration"))
    lengths = []

    def generate():
        torch.manual_seed(0)
        out = model.text_decoder.generate(
            input_ids=IDS,
            encoder_hidden_states=model.vision_model(IMAGES).last_hidden_state,
            max_new_tokens=5,
            return_dict_in_generate=True,
            **settings,
        )
        lengths.append([layer.keys.shape[2] for layer in out.past_key_values.cross_attention_cache.layers])
        return out.sequences

    plain = generate()
    with turbovlm.apply(model, cross_keep=0.3):
        generate()
    assert torch.equal(generate(), plain)
    assert lengths == [[37] * 3, [37, 25, 12], [37] * 3]


@torch.no_grad()
def test_cached_steps_read_what_the_prompt_chose():
    """A step behind the cache gives what the same words give at once with that choice."""
    model = seeded(lambda: blip("ConditionalGeneration"))
    image = model.vision_model(IMAGES).last_hidden_state
    with turbovlm.apply(model, cross_keep=0.3, reduce="prune") as handle:
        first = model.text_decoder(input_ids=IDS[:, :3], encoder_hidden_states=image, use_cache=True)
        left = handle.cross
        second = model.text_decoder(
            input_ids=IDS[:, 3:],
            attention_mask=torch.ones_like(IDS),
            encoder_hidden_states=image,
            past_key_values=first.past_key_values,
            use_cache=True,
        ).logits
    place = torch.arange(36).expand(2, -1)
    for layer, selection in zip(text_layers(model)[1:], left):
        place = place.gather(1, selection.kept)
        layer.crossattention.self.forward = functools.partial(seeing, layer.crossattention.self, place)
    masked = model.text_decoder(input_ids=IDS, encoder_hidden_states=image).logits[:, -1:]
    torch.testing.assert_close(second, masked, rtol=0, atol=1e-5)


def test_works_beside_the_others(model):
    plain = words(model)
    with turbovlm.apply(model, r=2, visual_keep=0.5, cross_keep=0.5, visual_select="attention") as handle:
        assert words(model).shape == plain.shape
        assert [s.kept.shape[1] for s in handle.cross] == [10, 7] and len(handle.visual) == 1
        assert "the last third of which cross-attends to 50% of the image tokens" in repr(handle)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert all(torch.equal(words(twin), words(model)) for twin in twins)
    assert torch.equal(words(model), plain)
    for twin in twins:
        turbovlm.get_handle(twin).remove()
        assert torch.equal(words(twin), plain)
        assert all("forward" not in module.__dict__ for module in twin.modules())


@pytest.mark.parametrize("select", ("random", "uniform", "redundancy", "attention"))
def test_controls(select):
    model = seeded(lambda: blip("ImageTextRetrieval"))
    with turbovlm.apply(model, cross_keep=12, visual_select=select) as handle:
        assert words(model).isfinite().all()
        assert [selection.kept.shape[1] for selection in handle.cross] == [24, 12]


@torch.no_grad()
@pytest.mark.parametrize(("depth", "read"), [(2, [36, 9]), (4, [36, 36, 22, 9]), (6, [36, 36, 22, 22, 9, 9])])
def test_reads_in_three_stages(depth, read):
    def make():
        config = blip("ImageTextRetrieval").config
        config.text_config.num_hidden_layers = depth
        return transformers.BlipForImageTextRetrieval(config)

    model, found = seeded(make), []
    for layer in text_layers(model):
        layer.crossattention.self.key.register_forward_hook(lambda module, inputs, out: found.append(out.shape[1] - 1))
    with turbovlm.apply(model, cross_keep=0.25):
        words(model)
    assert found == read


def test_backward():
    model = seeded(lambda: blip("ImageTextRetrieval"))
    with turbovlm.apply(model, cross_keep=0.3):
        model(pixel_values=IMAGES, input_ids=IDS).itm_score.sum().backward()
    assert model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_what_cannot_be_done_says_why():
    with pytest.raises(UnsupportedModelError, match=r"cross_keep=0.5: LlavaFor.*supported: BLIP"):
        turbovlm.apply(seeded(llava), cross_keep=0.5)
    shallow = blip("ImageTextRetrieval").config
    shallow.text_config.num_hidden_layers = 1
    with pytest.raises(UnsupportedModelError, match=r"encoder\.layer has one layer"):
        turbovlm.apply(transformers.BlipForImageTextRetrieval(shallow), cross_keep=0.5)
    with pytest.raises(ConfigError, match="cross_keep=0: it must be an integer"):
        turbovlm.ReadConfig(cross_keep=0)
    with pytest.raises(ConfigError, match=r"cross_keep=1\.5: must be a share"):
        turbovlm.ReadConfig(cross_keep=1.5)
    with pytest.raises(ConfigError, match="pooling"):
        turbovlm.ReadConfig(cross_keep=0.5, visual_select="pooling")
    model = seeded(lambda: blip("ImageTextRetrieval"))
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[0, 5] = 0
    image = noise(0, 2, 37, 32)
    with turbovlm.apply(model, cross_keep=0.5) as handle:
        with pytest.raises(StateError, match="encoder_attention_mask"):
            model.text_encoder(input_ids=IDS, encoder_hidden_states=image, encoder_attention_mask=mask)
        with pytest.raises(StateError, match="no visual tokens"):
            handle.visual  # noqa: B018
    with turbovlm.apply(model, cross_keep=0.01), pytest.raises(ConfigError, match=r"cross_keep=0\.01: not one"):
        words(model)
