"""The language model reads fewer visual tokens: exactly as if the others had been masked, in unchanged user code."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import turbovlm
from turbovlm import ReadConfig
from turbovlm.errors import ConfigError, StateError, UnsupportedModelError
from vlms import (
    NEW,
    SPECIAL,
    VLMS,
    dropped,
    full_positions,
    generated,
    masked_forward,
    masked_generate,
    seeded,
)

PROMPTS = {
    "one": [[5, 6, "image", 7, 8, 9]],
    "ragged": [[5, "image", 7], [5, 6, 10, 11, "image", 12, 13], ["image", 9]],
    "two images": [[5, "image", 7, 8, "image", 9]],
    "text only beside": [[5, 6, "image", 7, 8], [3, 4, 5, 6], [7, "image", 9, 10, "image", 11]],
}


@pytest.fixture(params=VLMS)
def family(request):
    return VLMS[request.param]


@pytest.fixture
def model(family):
    return seeded(family.make)


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_pruned_equals_masked(family, model, prompt):
    inputs = family.inputs(*PROMPTS[prompt])
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune") as handle:
        logits = model(**inputs, position_ids=full_positions(model, inputs, family)).logits
        gone = dropped(handle, inputs, family)
        tokens = generated(model, inputs)
        assert torch.equal(dropped(handle, inputs, family), gone)
    assert gone.any()
    seen = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(logits[seen], masked_forward(model, inputs, gone, family)[seen], rtol=0, atol=1e-4)
    assert torch.equal(tokens, masked_generate(model, inputs, gone, family))


@torch.no_grad()
def test_positions_are_those_of_the_full_prompt(family, model):
    inputs = family.inputs(*PROMPTS["one"])
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune"):
        implied = model(**inputs).logits
        given = model(**inputs, position_ids=full_positions(model, inputs, family)).logits
    torch.testing.assert_close(implied, given, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@torch.no_grad()
def test_generate_in_every_way(family, model, settings):
    inputs = family.inputs(*PROMPTS["text only beside"])
    before = generated(model, inputs, **settings)
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune") as handle:
        found = generated(model, inputs, **settings)
        gone = (
            dropped(handle, family.inputs(*PROMPTS["text only beside"]), family)
            if "num_beams" not in settings
            else None
        )
    if gone is not None:
        assert torch.equal(found, masked_generate(model, inputs, gone, family))
    assert torch.equal(generated(model, inputs, **settings), before)


@torch.no_grad()
def test_the_cache_is_as_much_shorter(family, model):
    inputs = family.inputs(*PROMPTS["one"])
    visual, columns = int((inputs["input_ids"] == family.token).sum()), inputs["input_ids"].shape[1]
    with turbovlm.apply(model, visual_keep=0.25):
        for out in (model(**inputs), model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)):
            assert out.past_key_values.get_seq_length() == columns - visual + (visual + 2) // 4
    with turbovlm.apply(model, visual_keep=3):
        assert model(**inputs).past_key_values.get_seq_length() == columns - visual + 3


@torch.no_grad()
def test_all_tokens_kept_is_the_model_itself(family, model):
    inputs = family.inputs(*PROMPTS["ragged"])
    before = model(**inputs, position_ids=full_positions(model, inputs, family)).logits
    tokens = generated(model, inputs)
    with turbovlm.apply(model, visual_keep=1.0):
        after = model(**inputs, position_ids=full_positions(model, inputs, family)).logits
        assert torch.equal(generated(model, inputs), tokens)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(after[seen], before[seen], rtol=0, atol=1e-5)


@torch.no_grad()
def test_copies_and_removal(family, model):
    inputs = family.inputs(*PROMPTS["one"])
    handle = turbovlm.apply(model, visual_keep=0.4)
    unpickled = pickle.loads(pickle.dumps(model))
    handle.remove()
    before = generated(model, inputs)
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    handle = turbovlm.apply(model, visual_keep=0.4)
    found = generated(model, inputs)
    for twin in (copy.deepcopy(model), unpickled):
        assert torch.equal(generated(twin, inputs), found)
        turbovlm.get_handle(twin).remove()
        assert torch.equal(generated(twin, inputs), before)
    handle.remove()
    handle.remove()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert torch.equal(generated(model, inputs), before)


@pytest.fixture
def llava():
    return seeded(VLMS["llava"].make)


LLAVA = VLMS["llava"]


@torch.no_grad()
def test_a_loop_of_ones_own(family, model):
    inputs = family.inputs(*PROMPTS["text only beside"])
    positions = full_positions(model, inputs, family)
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune") as handle:
        out = model(**inputs, position_ids=positions)
        gone = dropped(handle, inputs, family)
        mask, found = inputs["attention_mask"], []
        for _ in range(NEW):
            logits = out.logits[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
            found.append(logits.argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(found[-1])], dim=1)
            positions = positions[..., -1:] + 1
            cache = out.past_key_values
            step = {"input_ids": found[-1], "attention_mask": mask, "past_key_values": cache}
            out = model(**step, position_ids=positions)
    assert torch.equal(torch.cat(found, dim=1), masked_generate(model, inputs, gone, family))


@torch.no_grad()
def test_a_loop_that_leaves_mask_and_positions_to_the_model(llava):
    inputs = LLAVA.inputs(*PROMPTS["one"])
    with turbovlm.apply(llava, visual_keep=0.4, reduce="prune"):
        wanted = generated(llava, inputs)
        out, found = llava(**inputs), []
        for _ in range(NEW):
            logits = out.logits[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
            found.append(logits.argmax(-1, keepdim=True))
            out = llava(input_ids=found[-1], past_key_values=out.past_key_values)
    assert torch.equal(torch.cat(found, dim=1), wanted)


@torch.no_grad()
def test_a_second_turn_on_the_same_cache(llava):
    from transformers import DynamicCache

    def turn(cache, ids, new, pixels):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        settings = {"do_sample": False, "eos_token_id": None, "suppress_tokens": SPECIAL}
        return llava.generate(**inputs, past_key_values=cache, max_new_tokens=new, **settings)

    first, second = LLAVA.inputs([5, "image", 6, 7]), LLAVA.inputs([8, 9, "image", 10])
    images = LLAVA.inputs(["image", "image"])["pixel_values"]
    with turbovlm.apply(llava, visual_keep=0.4, reduce="prune"):
        cache = DynamicCache(config=llava.config.text_config)
        said = turn(cache, first["input_ids"], 3, images[:1])
        both = torch.cat([said, second["input_ids"]], dim=1)
        found = turn(cache, both, NEW, images[1:])
        wanted = turn(None, both, NEW, images)
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_assisted_decoding(llava):
    inputs = LLAVA.inputs([5, 6, 7, 8, 3, 4, "image", 5, 6])
    with turbovlm.apply(llava, visual_keep=0.5, reduce="prune"):
        wanted = generated(llava, inputs)
        assert torch.equal(generated(llava, inputs, prompt_lookup_num_tokens=2), wanted)


@pytest.mark.parametrize("select", ["redundancy", "attention", "random", "uniform", "pooling"])
@torch.no_grad()
def test_baselines(llava, select):
    inputs = LLAVA.inputs(*PROMPTS["two images"])
    with turbovlm.apply(llava, visual_keep=0.25, visual_select=select) as handle:
        generated(llava, inputs)
        kept = [selection.kept[0] for selection in handle.visual]
    assert all(len(k) == 9 and k.diff().gt(0).all() for k in kept)
    if select in ("random", "uniform", "pooling"):
        assert torch.equal(kept[0], kept[1])
    else:
        assert not torch.equal(kept[0], kept[1])


def test_tokens_are_averaged_by_size():
    from turbovlm.vlm.select import select

    features = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    semantic = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)).softmax(-1)
    found = select(features, semantic, 5, ReadConfig(5))
    merged = found.take(features)
    for image in range(2):
        for k in range(5):
            members = features[image, found.destination[image] == k]
            torch.testing.assert_close(merged[image, k], members.mean(0))
            assert found.destination[image, found.kept[image, k]] == k


@torch.no_grad()
def test_merged_inside_the_tower_as_well(llava):
    inputs = LLAVA.inputs(*PROMPTS["ragged"])
    with turbovlm.apply(llava, r=3, visual_keep=0.5) as handle:
        generated(llava, inputs, num_beams=2)
        assert handle.schedules[0].tokens == (37, 37, 33, 28)
        assert [len(selection.kept[0]) for selection in handle.visual] == [18] * 6
    with turbovlm.apply(llava, r=0, visual_keep=0.5):
        alone = llava(**inputs).logits
    with turbovlm.apply(llava, visual_keep=0.5):
        torch.testing.assert_close(llava(**inputs).logits, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_order_of_configs_is_no_matter(llava):
    inputs, encoder, read = LLAVA.inputs(*PROMPTS["one"]), turbovlm.TurboConfig(r=3), ReadConfig(0.5)
    found = []
    for configs in ((encoder, read), (read, encoder)):
        with turbovlm.apply(llava, *configs) as handle:
            found.append(llava(**inputs).logits)
            assert handle.configs == (encoder, read)
    assert torch.equal(*found)


@torch.no_grad()
def test_embeddings_instead_of_tokens(llava):
    inputs = LLAVA.inputs(*PROMPTS["ragged"])
    with turbovlm.apply(llava, visual_keep=0.4):
        wanted = llava(**inputs).logits
        embeds = llava.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(llava(**inputs, inputs_embeds=embeds).logits, wanted, rtol=0, atol=1e-5)


def test_backward(llava):
    inputs = LLAVA.inputs(*PROMPTS["ragged"])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == LLAVA.token, -100)
    with turbovlm.apply(llava, visual_keep=0.4):
        llava(**inputs, labels=labels).loss.backward()
    assert all(p.grad is not None for p in llava.model.multi_modal_projector.parameters())


@torch.no_grad()
def test_hidden_states_have_the_prompts_length(llava):
    inputs = LLAVA.inputs(*PROMPTS["ragged"])
    with turbovlm.apply(llava, visual_keep=0.4):
        out = llava(**inputs, output_hidden_states=True)
        last, *_ = llava.model(**inputs, return_dict=False)
    assert {hidden.shape[:2] for hidden in (*out.hidden_states, last)} == {inputs["input_ids"].shape}


@torch.no_grad()
def test_what_disagrees_keeps_the_librarys_error(llava):
    inputs = LLAVA.inputs(*PROMPTS["one"])
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 9, LLAVA.token)
    for call in (llava, lambda **kw: llava.generate(**kw, max_new_tokens=2)):
        with pytest.raises(Exception) as plain:
            call(**inputs)
        with turbovlm.apply(llava, visual_keep=0.4), pytest.raises(type(plain.value)) as found:
            call(**inputs)
        assert str(found.value) == str(plain.value)


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, True, "half"])
def test_impossible_shares(keep):
    with pytest.raises(ConfigError, match="visual_keep="):
        ReadConfig(keep)


@torch.no_grad()
def test_what_cannot_be_done_says_why(llava):
    inputs = LLAVA.inputs(*PROMPTS["one"])
    with turbovlm.apply(llava, visual_keep=0.001), pytest.raises(ConfigError, match="36 visual tokens would be left"):
        llava(**inputs)
    with turbovlm.apply(llava, visual_keep=0.5, visual_select="pooling"), pytest.raises(ConfigError, match="2×2"):
        llava(**inputs)
    with turbovlm.apply(llava, visual_keep=0.5), pytest.raises(StateError, match="behind its last image"):
        cache = llava(**inputs).past_key_values
        cache.crop(-5)
        llava(input_ids=torch.tensor([[7]]), past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match=r"language\.md lists what is supported"):
        turbovlm.apply(llava.model.vision_tower, visual_keep=0.5)
    with pytest.raises(ConfigError, match="no CLS token"):
        turbovlm.apply(seeded(VLMS["qwen3_vl"].make), visual_keep=0.5, guidance="cls")


@torch.no_grad()
def test_an_exception_leaves_nothing_behind(llava, monkeypatch):
    inputs = LLAVA.inputs(*PROMPTS["one"])
    with turbovlm.apply(llava, visual_keep=0.4):
        wanted = generated(llava, inputs)
        bad = {**inputs, "pixel_values": torch.zeros(1, 3, 40, 40)}
        with pytest.raises(ValueError):
            llava(**bad)
        assert torch.equal(generated(llava, inputs), wanted)
