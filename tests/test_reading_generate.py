"""Fewer visual tokens in the ways of `generate`, in later turns, and in prompts prefilled in parts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import turbovlm
from turbovlm.errors import StateError
from turbovlm.vlm.marks import CACHED_PROMPTS
from vlms import SPECIAL, VLMS, dropped, full_positions, generated, made, noise, seeded, visual_of

transformers = pytest.importorskip("transformers")

ROWS = [[5, 6, "image", 7, 8], [3, 4, 5, 6], [7, "image", 9, 10, "image", 11]]
REPEATING = [[5, 6, 5, 6, 3, "image", 5, 6, 5]]
"""A prompt that prompt lookup finds candidates in."""
QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
OTHERS = [name for name in VLMS if name != "paligemma"]
"""PaliGemma reads what follows its first prompt, and an assistant's candidates, otherwise than as one prompt."""


def answers(model, inputs, **settings):
    settings = {"do_sample": False, "eos_token_id": None, "suppress_tokens": SPECIAL, "max_new_tokens": 5, **settings}
    torch.manual_seed(3)
    return model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)


def assert_same(found, wanted):
    assert torch.equal(found.sequences, wanted.sequences)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    if wanted.hidden_states is not None:  # those of the prompt itself are fewer
        for one, other in zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True):
            torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=0, atol=1e-4)


MODES = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5},
    "beams in a static cache": {"num_beams": 2, "cache_implementation": "static"},
    "hidden states": {"output_hidden_states": True, "output_scores": True},
}


def masked(model, inputs, family):
    """The full prompt with the positions masked that the accelerated model drops, as `generate` takes it."""
    positions = full_positions(model, inputs, family)
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune") as handle:
        model(**inputs)
        gone = dropped(handle, inputs, family)
    return {**inputs, "attention_mask": inputs["attention_mask"] * ~gone, "position_ids": positions - family.first}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_generates_what_the_masked_prompt_does(name, mode):
    family, model = made(name)
    inputs = family.inputs(*ROWS)
    wanted = answers(model, masked(model, inputs, family), **MODES[mode])
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune"):
        assert_same(answers(model, inputs, **MODES[mode]), wanted)


@pytest.mark.parametrize("name", [name for name in VLMS if VLMS[name].types != "token_type_ids"])
@torch.no_grad()
def test_generates_from_embeddings(name):
    family, model = made(name)
    inputs = family.inputs(*ROWS)
    reference = masked(model, inputs, family)
    if name in QWENS:  # whose positions come from tokens; of embeddings alone, they are those of text
        text = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        reference["position_ids"] = text.expand(3, -1, -1)
    for given in (reference, inputs):
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
    wanted = answers(model, reference)
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune"):
        assert_same(answers(model, inputs), wanted)


@pytest.mark.parametrize("assistant", ["prompt lookup", "accelerated", "plain"])
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_assisted_decoding(name, assistant):
    family, model = made(name)
    inputs = family.inputs(*REPEATING)
    helper = seeded(family.make)
    for parameter in helper.parameters():  # of another opinion now and then
        parameter.add_(0.02 * noise(1, *parameter.shape))
    settings = {"prompt_lookup_num_tokens": 2} if assistant == "prompt lookup" else {"assistant_model": helper}
    if assistant == "accelerated":
        turbovlm.apply(helper, visual_keep=0.4, reduce="prune")
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune"):
        assert_same(answers(model, inputs, **settings), answers(model, inputs))


def in_turns(model, family, second):
    """What a second turn on the first one's cache answers, and the same as one prompt."""
    first, images = family.inputs([5, 6, "image", 7]), family.inputs(["image", "image"])
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    said = answers(model, first, past_key_values=cache, max_new_tokens=3).sequences
    tokens = int((images["input_ids"] == family.token).sum() - (first["input_ids"] == family.token).sum())
    new = [8, 9, *([family.token] * tokens if second == "image" else []), 10]
    ids = torch.cat([said, torch.tensor([new])], dim=1)
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.types is not None:
        both[family.types] = (ids == family.token).int()
    visual = visual_of(images if second == "image" else first, family)
    turn = dict(both)
    if second == "image":  # encoded alone, beside the sizes of all, as positions need
        alone = {k: v[len(first[k]) :] for k, v in visual.items()}
        turn |= {k: v for k, v in visual.items() if k != "pixel_values"}
        turn["mm_encoder_outputs"] = {"image": model.model.get_image_features(**alone, return_dict=True)}
    found = answers(model, turn, past_key_values=copy.deepcopy(cache))
    return found, answers(model, both | visual)


@pytest.mark.parametrize("second", ["text", "image"])
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_a_second_turn_on_a_copy_of_the_cache(name, second):
    family, model = made(name)
    assert_same(*in_turns(model, family, second))
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune"):
        assert_same(*in_turns(model, family, second))


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
@torch.no_grad()
def test_a_cache_that_is_reset(kind):
    family, model = made("llava")
    settings = {"max_cache_len": 128} if kind == "StaticCache" else {}
    cache = getattr(transformers, kind)(config=model.config.get_text_config(), **settings)
    with turbovlm.apply(model, visual_keep=0.4):
        generated(model, family.inputs([5, 6, "image", 7]), past_key_values=cache)
        for row in ([5, "image", 9], [5, 6, 7]):
            cache.reset()
            inputs = family.inputs(row)
            assert torch.equal(generated(model, inputs, past_key_values=cache), generated(model, inputs))


@torch.no_grad()
def test_a_cache_stays_one_of_its_class():
    family, model = made("llava")
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    inputs, step = family.inputs([5, 6, "image", 7, 8]), {"input_ids": torch.tensor([[9]])}
    generated(model, inputs, past_key_values=cache)
    cache.reset()
    own = set(vars(cache))
    with turbovlm.apply(model, visual_keep=0.4):
        wanted = generated(model, inputs)
        assert torch.equal(generated(model, inputs, past_key_values=cache), wanted)
        assert isinstance(cache, transformers.DynamicCache) and type(cache).__name__ == "DynamicCache"
        assert set(vars(cache)) == own | {CACHED_PROMPTS}
        copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        logits = [model(**step, past_key_values=each).logits for each in (*copies, cache)]
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[2])
    for each in (*copies, cache):
        each.reset()
        assert type(each) is transformers.DynamicCache and set(vars(each)) == own


@torch.no_grad()
def test_a_cache_cut_into_its_image_is_refused_and_as_it_was():
    family, model = made("llava")
    step = {"input_ids": torch.tensor([[9]])}
    with turbovlm.apply(model, visual_keep=0.4):
        cache = model(**family.inputs([5, "image", 7, 8])).past_key_values
        held = cache.get_seq_length()
        wanted = model(**step, past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(StateError, match="3 columns were to be taken out of a cache that has 2 behind its last"):
            cache.crop(-3)
        assert cache.get_seq_length() == held
        assert torch.equal(model(**step, past_key_values=cache).logits, wanted)
        cache.crop(-1)
        assert torch.equal(model(**step, past_key_values=cache).logits, wanted)


@pytest.mark.parametrize(
    ("change", "argument", "rows"),
    [
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
    ],
)
@torch.no_grad()
def test_a_cache_whose_rows_change(change, argument, rows):
    family, model = made("llava")
    inputs = family.inputs([5, 6, 7, 8, 9, "image", 7, 3], [5, "image", 12])
    positions = full_positions(model, inputs, family)

    def continued(given):
        cache = model(**given, position_ids=positions).past_key_values
        getattr(cache, change)(argument)
        mask = torch.cat([given["attention_mask"][rows], torch.ones(len(rows), 1, dtype=torch.long)], dim=1)
        step = {"input_ids": torch.tensor(rows).unsqueeze(1) + 20, "attention_mask": mask, "past_key_values": cache}
        return model(**step, position_ids=positions[rows, -1:] + 1).logits

    wanted = continued({**inputs, "attention_mask": masked(model, inputs, family)["attention_mask"]})
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune"):
        torch.testing.assert_close(continued(inputs), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_what_follows_an_image_at_the_end(name):
    """`forward` says of the next token what `generate` goes by."""
    family, model = made(name)
    for seed in range(3):
        inputs = family.inputs([5, 6 + seed, "image"])
        with turbovlm.apply(model, visual_keep=0.3, reduce="prune"):
            wanted = answers(model, inputs, max_new_tokens=1).logits[0]
            torch.testing.assert_close(model(**inputs).logits[:, -1], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("select", ["information", "coverage", "uniform"])
@pytest.mark.parametrize("chunk", [10, 100])
@torch.no_grad()
def test_chunked_prefill_of_images_is_refused(select, chunk):
    family, model = made("llava")
    inputs = family.inputs([5, "image", 7, 8, "image", 9])
    with turbovlm.apply(model, visual_keep=0.4, visual_select=select):
        wanted = answers(model, inputs)
        with pytest.raises(StateError, match="prefill_chunk_size"):
            answers(model, inputs, prefill_chunk_size=chunk)
        assert_same(answers(model, inputs), wanted)


@torch.no_grad()
def test_chunked_prefill_of_text():
    family, model = made("llava")
    inputs = family.inputs([5, 6, 7, 8, 9, 10, 11])
    wanted = answers(model, inputs)
    with turbovlm.apply(model, visual_keep=0.4):
        assert_same(answers(model, inputs, prefill_chunk_size=3), wanted)


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_prefill_in_two_parts(name):
    family, model = made(name)
    first, whole = family.inputs([5, "image", 7, 8]), family.inputs([5, "image", 7, 8, "image", 9, 4])
    positions, cut = full_positions(model, whole, family), first["input_ids"].shape[1]
    rest = {k: v[len(first[k]) :] for k, v in visual_of(whole, family).items()}
    rest |= {"input_ids": whole["input_ids"][:, cut:], "attention_mask": whole["attention_mask"]}
    if family.types is not None:
        rest[family.types] = whole[family.types]
    for settings in (None, {"visual_keep": 0.4}):
        handle = None if settings is None else turbovlm.apply(model, **settings)
        wanted = model(**whole, position_ids=positions).logits[:, -1]
        cache = model(**first, position_ids=positions[..., :cut]).past_key_values
        found = model(**rest, position_ids=positions[..., cut:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    handle.remove()


@pytest.mark.parametrize("name", QWENS)
@torch.no_grad()
def test_an_image_behind_a_cache_needs_positions(name):
    """The library fails on it, too: it cannot tell where the image stands."""
    family, model = made(name)
    first, whole = family.inputs([5, "image", 7]), family.inputs([5, "image", 7, "image", 9])
    cut = first["input_ids"].shape[1]
    rest = {k: v[len(first[k]) :] for k, v in visual_of(whole, family).items()}
    rest |= {"input_ids": whole["input_ids"][:, cut:], "attention_mask": whole["attention_mask"]}
    rest[family.types] = whole[family.types][:, cut:]
    with turbovlm.apply(model, visual_keep=0.4):
        cache = model(**first).past_key_values
        with pytest.raises(StateError, match="position_ids"):
            model(**rest, past_key_values=cache)
