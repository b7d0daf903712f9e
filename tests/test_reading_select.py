"""Visual tokens chosen over all pairs, by the prompt's text, by an image's content, or by a function of the user's."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F

import turbovlm
from more_vlms import MORE
from turbovlm import ReadConfig
from turbovlm.config import READINGS
from turbovlm.errors import ConfigError, StateError
from turbovlm.vlm.question import ImageText
from turbovlm.vlm.select import select, select_within
from vlms import (
    VLMS,
    blip,
    dropped,
    full_positions,
    generated,
    made,
    masked_forward,
    masked_generate,
    seeded,
    vision_encoder_decoder,
)

ROWS = [[5, "image", 7, 8], [3, 4, 5, 6], [7, "image", 9, 10, "image", 11]]
ALL_PAIRS = ("coverage", "diversity", "mmr", "dpp")


@pytest.fixture
def llava():
    return seeded(VLMS["llava"].make)


LLAVA = VLMS["llava"]


def kept(handle):
    return [selection.kept[0].tolist() for selection in handle.visual]


def chosen(model, inputs, **settings):
    with torch.no_grad(), turbovlm.apply(model, **{"visual_keep": 0.4, **settings}) as handle:
        model(**inputs)
        return kept(handle)


@pytest.mark.parametrize("name", VLMS)
@pytest.mark.parametrize(
    "settings", [{"visual_keep": 0.4, "visual_select": "coverage", "question": 1}, {"visual_tolerance": 0.7}]
)
@torch.no_grad()
def test_pruned_equals_masked(name, settings):
    family, model = made(name)
    inputs = family.inputs(*ROWS)
    settings = {"visual_keep": 0.9, "visual_select": "diversity", "reduce": "prune", **settings}
    with turbovlm.apply(model, **settings) as handle:
        logits = model(**inputs, position_ids=full_positions(model, inputs, family)).logits
        gone = dropped(handle, inputs, family)
        tokens = generated(model, inputs)
        assert torch.equal(dropped(handle, inputs, family), gone)
    assert gone.any()
    seen = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(logits[seen], masked_forward(model, inputs, gone, family)[seen], rtol=0, atol=1e-4)
    assert torch.equal(tokens, masked_generate(model, inputs, gone, family))


@pytest.mark.parametrize("how", ALL_PAIRS)
@pytest.mark.parametrize("reduce", ["merge", "prune"])
def test_the_rest_goes_to_the_most_similar_by_size(how, reduce):
    generator = torch.Generator().manual_seed(0)
    features, semantic = torch.randn(2, 30, 8, generator=generator), torch.rand(2, 30, generator=generator)
    sizes = torch.randint(1, 4, (2, 30), generator=generator).float()
    found = select(features, semantic, 6, ReadConfig(6, visual_select=how, reduce=reduce), sizes)
    assert (found.kept.diff(dim=1) > 0).all() and found.kept.shape == (2, 6)
    x = F.normalize(features, dim=-1)
    for image in range(2):
        cosines = x[image] @ x[image, found.kept[image]].T
        wanted = cosines.argmax(1)
        wanted[found.kept[image]] = torch.arange(6)
        for slot in range(6):
            members = wanted == slot
            if reduce == "prune":
                members = torch.zeros(30, dtype=torch.bool).index_fill(0, found.kept[image, slot], True)
            weights = sizes[image, members] / sizes[image, members].sum() if reduce == "merge" else torch.ones(1)
            average = (features[image, members] * weights.unsqueeze(1)).sum(0)
            torch.testing.assert_close(found.take(features)[image, slot], average)


@pytest.mark.parametrize("how", ALL_PAIRS)
def test_one_token_and_all_of_them(how):
    features, semantic = torch.randn(2, 9, 4), torch.rand(2, 9)
    one = select(features, semantic, 1, ReadConfig(1, visual_select=how))
    torch.testing.assert_close(one.take(features), features.mean(1, keepdim=True))
    every = select(features, semantic, 9, ReadConfig(1.0, visual_select=how))
    assert torch.equal(every.take(features), features)


@pytest.mark.parametrize("how", ALL_PAIRS)
@pytest.mark.parametrize("k", [1, 2, 3, 7, 11, 29])
def test_large_images_are_chosen_from_in_parts(how, k, monkeypatch):
    """Each part gives its share and is chosen from by itself; fewer parts where there are too few tokens to give."""
    monkeypatch.setattr("turbovlm.vlm.select.TOGETHER", 8)
    generator = torch.Generator().manual_seed(k)
    features, semantic = torch.randn(2, 30, 8, generator=generator), torch.rand(2, 30, generator=generator)
    found = select(features, semantic, k, ReadConfig(k, visual_select=how))
    assert found.kept.shape == (2, k) and (found.kept.diff(dim=1) > 0).all()
    torch.testing.assert_close(torch.zeros(2, k).scatter_add(1, found.destination, found.weights), torch.ones(2, k))
    ends = {1: [30], 2: [30], 3: [30], 7: [10, 20, 30]}.get(k, [7, 15, 22, 30])
    before = 0
    for start, end in zip([0, *ends], ends):
        own = (found.kept[0] >= start) & (found.kept[0] < end)
        count = int(own.sum())
        assert abs(count - k * (end - start) / 30) < 1 and count > 0
        alone = select(features[:, start:end], semantic[:, start:end], count, ReadConfig(count, visual_select=how))
        assert torch.equal(found.kept[:, before : before + count] - start, alone.kept)
        assert torch.equal(found.destination[:, start:end] - before, alone.destination)
        before += count


def test_attention_weighs_by_alpha():
    features, semantic = torch.randn(1, 20, 6, generator=torch.Generator().manual_seed(0)), torch.full((1, 20), 0.01)
    semantic[0, 13] = 1
    for how in ("coverage", "mmr", "dpp"):
        assert 13 in select(features, semantic, 1, ReadConfig(1, visual_select=how, alpha=30)).kept
    plain = select(features, None, 5, ReadConfig(5, visual_select="coverage", alpha=0)).kept
    even = select(features, torch.ones(1, 20), 5, ReadConfig(5, visual_select="coverage")).kept
    assert torch.equal(plain, even)
    dark = select(features, torch.zeros(1, 20), 5, ReadConfig(5, visual_select="coverage")).kept
    assert torch.equal(dark, even)


def test_relevance_is_the_nearest_words_and_of_no_scale():
    generator = torch.Generator().manual_seed(0)
    features, words = torch.randn(2, 12, 8, generator=generator), torch.randn(3, 8, generator=generator)
    other = torch.randn(5, 8, generator=generator)
    found = ImageText([words, other]).relevance(features)
    for image, said in enumerate((words, other)):
        cosines = torch.stack(
            [torch.stack([F.cosine_similarity(x, w, dim=0) for w in said.double()]) for x in features[image].double()]
        )
        wanted = (cosines - cosines.mean(0)).amax(1)
        wanted = (wanted - wanted.mean()) / wanted.std(unbiased=False)
        torch.testing.assert_close(found[image], wanted.float())
    torch.testing.assert_close(ImageText([words * 7, other]).relevance(features * 3), found)
    assert torch.equal(ImageText([words]).relevance(torch.ones(1, 4, 8)), torch.zeros(1, 4))


def test_each_image_goes_by_its_own_prompts_text(llava):
    settings = {"visual_select": "coverage", "question": 3}
    together = chosen(llava, LLAVA.inputs([5, "image", 7], [20, 21, 22, "image", 23, "image"]), **settings)
    images = LLAVA.inputs(["image"] * 3)["pixel_values"]
    one = LLAVA.inputs([5, "image", 7])
    two = {**LLAVA.inputs([20, 21, 22, "image", 23, "image"]), "pixel_values": images[1:]}
    assert chosen(llava, one, **settings) + chosen(llava, two, **settings) == together
    asked_otherwise = chosen(llava, LLAVA.inputs([6, "image", 8], [20, 21, 22, "image", 23, "image"]), **settings)
    assert asked_otherwise[0] != together[0] and asked_otherwise[1:] == together[1:]
    alone = [{**LLAVA.inputs([20, 21, 22, "image", 23]), "pixel_values": image.unsqueeze(0)} for image in images[1:]]
    assert [chosen(llava, each, **settings)[0] for each in alone] == together[1:]  # the other image says nothing


def test_padding_says_nothing(llava):
    inputs = LLAVA.inputs([5, "image", 7])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padded = {
        **inputs,
        "input_ids": torch.cat([torch.full((1, 4), 33), ids], dim=1),
        "attention_mask": torch.cat([torch.zeros(1, 4, dtype=torch.long), mask], dim=1),
    }
    settings = {"visual_select": "dpp", "question": 3}
    assert chosen(llava, padded, **settings) == chosen(llava, inputs, **settings)
    every = {**padded, "attention_mask": torch.ones_like(padded["attention_mask"])}
    assert chosen(llava, every, **settings) != chosen(llava, inputs, **settings)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_embeddings_and_beams_choose_the_same(name):
    family, model = made(name)
    inputs = family.inputs(*ROWS)
    settings = {"visual_select": "mmr", "question": 1}
    wanted = chosen(model, inputs, **settings)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {**inputs, "inputs_embeds": embeds, "input_ids": None}
    assert chosen(model, given, **settings) == wanted
    with turbovlm.apply(model, visual_keep=0.4, **settings) as handle:
        generated(model, inputs, num_beams=2)
        assert kept(handle) == [wanted[0]] * 2 + wanted[1:] * 2


@torch.no_grad()
def test_each_turn_asks_for_itself(llava):
    first, images = LLAVA.inputs([5, "image", 6, 7]), LLAVA.inputs(["image", "image"])["pixel_values"]
    settings = {"visual_select": "coverage", "question": 3}
    second = {**LLAVA.inputs([8, 9, "image", 10]), "pixel_values": images[1:]}
    alone = chosen(llava, second, **settings)
    with turbovlm.apply(llava, visual_keep=0.4, **settings) as handle:
        cache = llava(**first).past_key_values
        llava(input_ids=second["input_ids"], pixel_values=images[1:], past_key_values=cache)
        assert kept(handle) == alone


@torch.no_grad()
def test_a_prompt_without_text_cannot_ask(llava, monkeypatch):
    inputs = LLAVA.inputs(["image"], [5, "image", 7])
    monkeypatch.setattr(llava.model.language_model, "forward", lambda **inputs: pytest.fail("it has run"))
    with turbovlm.apply(llava, visual_keep=0.4, visual_select="coverage", question=1):
        with pytest.raises(StateError, match=r"question=1: prompt 0 of the batch has no text"):
            llava(**inputs)
        with pytest.raises(StateError, match="has no text"):
            llava.generate(**inputs, max_new_tokens=2)
    monkeypatch.undo()
    assert chosen(llava, inputs, visual_select="coverage")


@pytest.mark.parametrize("how", ALL_PAIRS)
def test_no_more_than_the_tolerance_needs(llava, how):
    inputs = LLAVA.inputs(["image", 5, "image"])
    inputs["pixel_values"][0] = 0
    inputs["pixel_values"][0, 0, :24] = 1
    with torch.no_grad():
        llava.model.vision_tower.embeddings.position_embedding.weight.zero_()  # so that its patches are of two kinds
        features = llava.model.get_image_features(inputs["pixel_values"]).pooler_output
    x = F.normalize(torch.stack([*features]), dim=-1)
    whole = chosen(llava, inputs, visual_keep=1.0, visual_select=how, visual_tolerance=0.5)
    assert len(whole[0]) <= 2 < len(whole[1]) < 36
    for image, tokens in enumerate(whole):
        assert (x[image] @ x[image, tokens].T).amax(1).min() >= 0.5 - 1e-4
    limits = {"visual_select": how, "visual_tolerance": 0.5}
    assert [len(tokens) for tokens in chosen(llava, inputs, visual_keep=8, **limits)] == [min(8, len(whole[0])), 8]
    fewest = len(whole[0]) + 2
    floor = chosen(llava, inputs, visual_keep=1.0, min_visual_tokens=fewest, **limits)
    assert len(floor[0]) == fewest and floor[1] == whole[1]
    assert [len(t) for t in chosen(llava, inputs, visual_keep=0.9, min_visual_tokens=40, **limits)] == [36, 36]


def test_equal_tokens_are_spared_without_loss():
    features = torch.randn(5, 700, generator=torch.Generator().manual_seed(0)).repeat(6, 1).unsqueeze(0).bfloat16()
    config = ReadConfig(1.0, visual_select="diversity", visual_tolerance=0)
    (found,) = select_within(features, None, 1, 30, config)
    assert sorted(place % 5 for place in found.kept[0].tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(found.take(features)[0, found.destination[0]], features[0])


def test_small_images_stay_whole(llava):
    family, model = made("qwen2_5_vl")
    inputs = family.inputs(["image", 5], ["image", 6], ["image", 7])
    assert [len(tokens) for tokens in chosen(model, inputs, visual_keep=0.25)] == [4, 3, 2]
    assert [len(tokens) for tokens in chosen(model, inputs, visual_keep=0.25, min_visual_tokens=8)] == [8, 8, 8]
    assert [len(tokens) for tokens in chosen(model, inputs, visual_keep=0.8, min_visual_tokens=10)] == [13, 10, 8]
    assert len(chosen(llava, LLAVA.inputs(["image", 5]), visual_keep=0.001, min_visual_tokens=3)[0]) == 3


def brightest(features, attention, text, grid, *, k):
    """The tokens of the largest features."""
    return features.norm(dim=-1).topk(k).indices


@pytest.mark.parametrize("mask", [False, True])
@torch.no_grad()
def test_a_selector_of_ones_own(llava, mask):
    calls = []

    def select_brightest(features, attention, text, grid, *, k):
        calls.append((features.shape, attention.sum(dim=1), [len(words) for words in text], grid, k))
        found = brightest(features, attention, text, grid, k=k)
        return torch.zeros(features.shape[:2], dtype=torch.bool).scatter(1, found, True) if mask else found

    inputs = LLAVA.inputs(*ROWS)
    features = torch.stack([*llava.model.get_image_features(inputs["pixel_values"]).pooler_output])
    with turbovlm.apply(llava, visual_keep=10, visual_select=select_brightest, reduce="prune") as handle:
        logits = llava(**inputs, position_ids=full_positions(llava, inputs, LLAVA)).logits
        wanted = features.norm(dim=-1).topk(10).indices.sort(dim=1).values
        assert kept(handle) == wanted.tolist()
        gone = dropped(handle, inputs, LLAVA)
        assert "visual_select=select_brightest, prune" in str(handle)
    assert [call[0] for call in calls] == [(3, 36, 32)] and calls[0][2:] == ([3, 4, 4], (1, 6, 6), 10)
    seen = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(logits[seen], masked_forward(llava, inputs, gone, LLAVA)[seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3n", "fuyu", "hunyuan_vl", "idefics2", "mistral3"])
@torch.no_grad()
def test_towers_of_all_kinds(name):
    """Those without a row of attention for each token, without a grid, with images of any size."""
    family = MORE[name]
    model, inputs = seeded(family.make), family.inputs([5, "image", 7], [8, "image", 9, "image", 10])
    attention = []

    def pick(features, row, text, grid, *, k):
        attention.append(row is not None)
        return brightest(features, row, text, grid, k=k)

    ways = [{"visual_select": "coverage", "alpha": 0, "question": 1}, {"visual_select": pick}]
    ways.append({"visual_select": "diversity", "visual_tolerance": 0.5, "visual_keep": 0.9})
    for settings in ways:
        with turbovlm.apply(model, **{"visual_keep": 0.4, **settings}) as handle:
            assert model(**inputs).logits.isfinite().all()
            assert all(len(tokens) < each.destination.shape[1] for tokens, each in zip(kept(handle), handle.visual))
            generated(model, inputs)
    assert {*attention} == {family.attention}


@torch.no_grad()
def test_a_selector_knows_the_grids_of_images_and_videos():
    family, model = made("qwen2_5_vl")
    grids = []

    def select_first(features, attention, text, grid, *, k):
        grids.append((grid, len(features)))
        return torch.arange(k).expand(len(features), -1)

    inputs = family.inputs(["image", 5, "image"], ["image", 6, "video"])
    with turbovlm.apply(model, visual_keep=2, visual_select=select_first):
        model(**inputs)
        assert grids == [((1, 4, 4), 1), ((1, 2, 6), 1), ((1, 4, 2), 1), ((3, 2, 4), 1)]
        grids.clear()
        generated(model, family.inputs(["image", 5, "image"]), num_beams=3)
        assert grids == [((1, 4, 4), 3), ((1, 2, 6), 3)]
        grids.clear()
        generated(model, inputs, num_beams=2)
        assert grids == [((1, 4, 4), 2), ((1, 2, 6), 2), ((1, 4, 2), 2), ((3, 2, 4), 2)]


def test_a_selector_goes_where_the_model_goes(llava):
    inputs = LLAVA.inputs(*ROWS)
    with turbovlm.apply(llava, visual_keep=5, visual_select=brightest) as handle, torch.no_grad():
        twin = pickle.loads(pickle.dumps(llava))
        assert torch.equal(twin(**inputs).logits, llava(**inputs).logits)
        with pytest.raises(ConfigError, match=r"visual_select=.*a function cannot be saved"):
            handle.configs[0].save("nowhere.json")


WRONG = [
    (lambda f, k: None, "returned a NoneType, None"),
    (lambda f, k: list(range(k)), "returned a list"),
    (lambda f, k: torch.zeros(len(f), k), r"returned torch\.float32"),
    (lambda f, k: torch.arange(k), r"returned torch\.int64 of shape \(5,\)"),
    (lambda f, k: torch.arange(k - 1).expand(len(f), -1), r"returned torch\.int64 of shape \(2, 4\)"),
    (lambda f, k: torch.zeros(len(f), k, dtype=torch.int64), "returned a position twice"),
    (lambda f, k: torch.arange(32, 32 + k).expand(len(f), -1), "returned positions from 32 to 36"),
    (lambda f, k: torch.arange(-1, k - 1).expand(len(f), -1), "returned positions from -1 to 3"),
    (lambda f, k: torch.ones(len(f), 36, dtype=torch.bool), r"returned a mask of \[36, 36\] tokens"),
    (lambda f, k: torch.ones(36, dtype=torch.bool), r"returned a mask of shape \(36,\)"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
@torch.no_grad()
def test_what_a_selector_returns_is_checked_before_the_model_runs(llava, monkeypatch, wrong, message):
    inputs = LLAVA.inputs(["image", 5, "image"])

    def pick(features, attention, text, grid, *, k):
        return wrong(features, k)

    monkeypatch.setattr(llava.model.language_model, "forward", lambda **inputs: pytest.fail("it has run"))
    with turbovlm.apply(llava, visual_keep=5, visual_select=pick) as handle:
        with pytest.raises(ConfigError, match=f"visual_select=pick {message}.*must return the 5 visual tokens"):
            llava(**inputs)
        with pytest.raises(StateError, match="have been chosen yet"):
            _ = handle.visual


@pytest.mark.parametrize("how", [*ALL_PAIRS, brightest])
@pytest.mark.parametrize("amount", READINGS)
@torch.no_grad()
def test_readers_by_cross_attention(how, amount):
    model = seeded(lambda: blip("ConditionalGeneration"))
    pixels, ids = torch.randn(2, 3, 48, 48), torch.tensor([[2, 5, 6, 7], [2, 8, 9, 10]])
    before = model(pixel_values=pixels, input_ids=ids).logits
    with turbovlm.apply(model, **{amount: 9}, visual_select=how) as handle:
        after = model(pixel_values=pixels, input_ids=ids).logits
        selection = (handle.visual if amount == "visual_keep" else handle.cross)[-1]
    assert selection.kept.shape == (2, 9) and after.isfinite().all()
    assert not torch.equal(before, after)
    assert torch.equal(model(pixel_values=pixels, input_ids=ids).logits, before)


def test_what_a_reader_by_cross_attention_cannot():
    model = seeded(vision_encoder_decoder)
    with pytest.raises(ConfigError, match=r"question=1: .*runs without a prompt"):
        turbovlm.apply(model, visual_keep=0.5, visual_select="dpp", question=1)
    with pytest.raises(ConfigError, match=r"visual_tolerance=0\.1: .*as many tokens"):
        turbovlm.apply(model, visual_keep=0.5, visual_select="dpp", visual_tolerance=0.1)


def test_the_handle_says_how_tokens_are_chosen(llava):
    settings = {"visual_select": "coverage", "question": 0.5, "visual_tolerance": 0.5, "min_visual_tokens": 4}
    with turbovlm.apply(llava, visual_keep=0.75, **settings) as handle, torch.no_grad():
        said = str(handle)
        assert "at most 75% of the visual tokens of each image, as few as leave none farther than 0.5" in said
        assert "at least 4 (visual_select=coverage, alpha=1, question=0.5, merge), guided by cls in" in said
        assert "by the prompt's text" in said and "in the last prompt" not in said
        llava(**LLAVA.inputs(["image", 5, "image"]))
        counts = [len(tokens) for tokens in kept(handle)]
        assert f"in the last prompt: {counts[0]} of 36, {counts[1]} of 36 tokens" in str(handle)
    with turbovlm.apply(llava, visual_keep=0.5, visual_select="diversity") as handle:
        assert "guided by" not in str(handle) and "alpha" not in str(handle)


def test_backward_through_what_is_chosen(llava):
    inputs = LLAVA.inputs(*ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == LLAVA.token, -100)
    with turbovlm.apply(llava, visual_keep=0.4, visual_select="coverage", question=1):
        llava(**inputs, labels=labels).loss.backward()
    assert all(p.grad is not None for p in llava.model.multi_modal_projector.parameters())


@pytest.mark.parametrize("how", ["coverage", "dpp"])
@torch.no_grad()
def test_counted_without_values(how):
    from turbovlm.profile import macs

    model = seeded(lambda: blip("ConditionalGeneration"))
    inputs = {"pixel_values": torch.randn(1, 3, 48, 48), "input_ids": torch.tensor([[2, 5, 6, 7]])}
    with turbovlm.apply(model, visual_keep=9, visual_select=how):
        counted = macs(model, **inputs)
        model.to("meta")
        assert macs(model, **{name: value.to("meta") for name, value in inputs.items()}) == counted
