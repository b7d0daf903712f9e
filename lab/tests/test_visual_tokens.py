"""The small VLM and the study around it: questions are true, packing is exact, parts are joined as LLaVA's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

import turbovlm
from turbovlm.errors import ConfigError, TurboError
from vlms import CLIP, TEXT, noise

pytest.importorskip("transformers")
pytest.importorskip("PIL.Image")

from turbovlm_lab.zoo.low_rank import add_low_rank, low_rank_state, merge_low_rank
from turbovlm_lab.zoo.scenes import PLACES
from turbovlm_lab.zoo.small_vlm import SmallVlm, load_small_vlm, load_trained, packed, unpacked

STUDY = Path(__file__).parents[2] / "studies" / "visual_tokens"
FRONT = 37
TEXTS = [[([5, 6, 7], [8, 9, 1]), ([5, 10], [11, 1])], [([12, 13, 14, 15], [16, 1])]]
"""Of two images: questions and answers."""


@pytest.fixture
def study(monkeypatch):
    """Modules of the study, by name; others of that name, of other studies or packages, are put aside meanwhile."""
    monkeypatch.syspath_prepend(str(STUDY))
    names = [file.stem for file in STUDY.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.fixture(scope="module")
def vlm():
    """A tower, and a Gemma with windows in one layer of two, narrow and with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, Gemma3TextConfig, Gemma3TextModel

    from turbovlm_lab.zoo.small_vlm import join_parts

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    text = {**TEXT, "num_hidden_layers": 2, "layer_types": kinds, "head_dim": 8, "sliding_window": 64}
    tower = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    return join_parts(tower, Gemma3TextModel(Gemma3TextConfig(**text)), image_token=90)


@torch.no_grad()
def test_a_row_of_texts_costs_what_each_costs_alone(study, vlm):
    packing = study("packing")
    language, words, visual = vlm.model.language_model, vlm.lm_head.weight, noise(0, 2, FRONT - 1, 32)
    packed = packing.pack(TEXTS, FRONT)
    hidden = packing.hidden_of(language, visual, packed, bos=2)
    alone = []
    for image, texts in zip(visual, TEXTS):
        for question, answer in texts:
            ids = torch.tensor([[2, *[0] * (FRONT - 1), *question, *answer]])
            embeds = language.get_input_embeddings()(ids)
            embeds[0, 1:FRONT] = image
            logits = vlm.lm_head(language(inputs_embeds=embeds).last_hidden_state)[0, -len(answer) - 1 : -1]
            alone.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))
    expected = torch.stack(alone).mean()
    torch.testing.assert_close(packing.answers_loss(hidden, packed, words), expected, rtol=0, atol=1e-5)
    everyone = torch.arange(len(words))
    torch.testing.assert_close(packing.answers_loss(hidden, packed, words, everyone), expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"lacks \[11\]"):
        packing.answers_loss(hidden, packed, words, everyone[everyone != 11])


def test_a_low_rank_change_begins_at_nought_and_merges():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False), torch.nn.GELU(), torch.nn.Linear(8, 4))
    model = torch.nn.Sequential(*plain)
    x, own = noise(1, 3, 6), plain(noise(1, 3, 6))
    add_low_rank(model, 2)
    assert torch.equal(model(x), own)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (6 + 8 + 8 + 4)
    for name, value in low_rank_state(model).items():
        value.copy_(noise(len(name), *value.shape))
    changed, state = model(x), low_rank_state(model)
    assert not torch.allclose(changed, own)
    merge_low_rank(plain, state)
    torch.testing.assert_close(plain(x), changed)
    with pytest.raises(ConfigError, match=r"^5: Sequential has no such linear layer"):
        merge_low_rank(plain, {f"5.{name.rpartition('.')[2]}": value for name, value in state.items()})
    with pytest.raises(ConfigError, match="rank=0: must be at least 1"):
        add_low_rank(plain, 0)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_answers_behind_a_cache_are_those_that_are_generated(study, vlm, keep):
    """A text is right, read beside others behind the image's tokens, exactly where `generate` writes its answer."""
    packing = study("packing")
    pixels, front = noise(3, 2, 3, 48, 48), [2, *[90] * 36]
    with turbovlm.apply(vlm, visual_keep=keep, visual_select="uniform"):
        rows = []
        for image, texts in zip(pixels, TEXTS):
            said = []
            for question, _ in texts:
                ids = torch.tensor([[*front, *question]])
                out = vlm.generate(input_ids=ids, pixel_values=image[None], max_new_tokens=3, eos_token_id=None)
                said.append((question, out[0, ids.shape[1] :].tolist()))
            rows.append([*said, *((question, [answer[0] + 1, *answer[1:]]) for question, answer in said)])
        ids = torch.tensor([front, front])
        cache = vlm.model(input_ids=ids, pixel_values=pixels, use_cache=True).past_key_values
        packed = packing.pack(rows, FRONT)
        hidden = packing.hidden_behind(vlm.model.language_model, cache, packed)
        alone = []
        for image, texts in zip(pixels, rows):
            for question, answer in texts:
                prompt = [[*front, *question]]
                seen = vlm.get_image_features(image[None])
                alone += study("evaluate").right_behind(SmallVlm(vlm, None), prompt, seen, [answer])
    right = packing.right_texts(hidden, packed, vlm.lm_head.weight)
    assert right == [[True] * len(texts) + [False] * len(texts) for texts in TEXTS]
    assert alone == [each for row in right for each in row]


@torch.no_grad()
def test_parts_are_joined_as_llava_joins_them(vlm, tmp_path):
    """The head is the embeddings, patches of the last block but one are read, and turbovlm shortens what is read."""
    from safetensors.torch import save_file

    assert vlm.lm_head.weight is vlm.model.language_model.embed_tokens.weight
    ids, pixels = torch.tensor([[2, *[90] * 36, 5, 6]]), noise(0, 1, 3, 48, 48)
    seen = vlm.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    features = vlm.model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(torch.stack(features), vlm.model.multi_modal_projector(seen))
    own = vlm(input_ids=ids, pixel_values=pixels).logits
    with turbovlm.apply(vlm, visual_keep=0.25, visual_select="uniform") as handle:
        assert not torch.allclose(vlm(input_ids=ids, pixel_values=pixels).logits[:, -1], own[:, -1])
        assert len(handle.visual[0].kept[0]) == 9
    state = {f"projector.{name}": 2 * value for name, value in vlm.model.multi_modal_projector.state_dict().items()}
    layer = "language.layers.0.mlp.down_proj"
    state |= {f"{layer}.down": torch.zeros(1, 48), f"{layer}.up": torch.zeros(32, 1)}
    save_file(packed(state), tmp_path / "weights.safetensors")
    load_trained(vlm, tmp_path / "weights.safetensors")
    assert not torch.allclose(vlm(input_ids=ids, pixel_values=pixels).logits, own)


def test_weights_are_kept_in_bytes_with_a_scale_for_every_row():
    state = {"a.weight": noise(0, 5, 40) * torch.tensor([1e-4, 1, 30, 0, 2]).unsqueeze(1), "a.bias": noise(1, 5)}
    kept = packed(state)
    found, step = unpacked(kept), state["a.weight"].abs().amax(dim=1, keepdim=True) / 127
    assert kept["a.weight"].dtype == torch.int8 and found.keys() == state.keys()
    assert ((found["a.weight"] - state["a.weight"]).abs() <= 0.5001 * step).all()
    assert torch.equal(found["a.bias"], state["a.bias"].half().float())


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(TurboError, match=r"none\.safetensors: .*visual_tokens/train\.py makes them"):
        load_small_vlm(tmp_path / "none.safetensors")


def test_answers_about_crowds_are_true(study):
    crowds = study("crowds")
    sorts = set()
    for number in range(150):
        shown, chance = crowds.crowd("test", number)
        scene, signs = shown.scene, {sign.cell: sign.text for sign in shown.signs}
        taken = [cell for kind in scene.kinds for cell in kind.cells]
        assert 5 <= len(taken) <= 7 and len({*taken, *signs}) == len(taken) + len(signs)
        for question in crowds.asked(shown, chance):
            sorts.add(question.asks)
            place = question.text.removesuffix("?").partition(" at the ")[2]
            match question.asks:
                case "what":
                    assert scene.at(PLACES.index(place)).name == question.answer
                case "word" | "new word" | "digits":
                    assert question.answer in signs.values()
                    assert not place or signs[PLACES.index(place)] == question.answer
                    assert (question.asks == "digits") == question.answer.isdigit()
                    assert question.asks != "new word" or question.answer in crowds.NEW_WORDS
                case "list":
                    assert len(question.answer.split(", ")) == len(scene.kinds) + len(signs)
    assert sorts == {"what", "number", "color", "place", "presence", "word", "new word", "digits", "list"}
    assert not {*crowds.SEEN_WORDS} & {*crowds.NEW_WORDS} and len({*crowds.CONCEPTS}) == len(crowds.CONCEPTS)
    assert all(sign.text not in crowds.NEW_WORDS for n in range(100) for sign in crowds.crowd("train", n)[0].signs)


def test_patches_show_what_is_drawn_there(study):
    """Without its things a crowd is the photograph: what a patch is said to show differs from that."""
    crowds = study("crowds")
    style = crowds.style_of("test")
    for number in range(5):
        shown, _ = crowds.crowd("test", number)
        image, labels = crowds.draw(shown, style)
        again, _ = crowds.draw(shown, style)
        assert image.size == (224, 224) and image.tobytes() == again.tobytes()
        said = {crowds.CONCEPTS[concept] for concept in labels[:, 0] if concept >= 0} - {crowds.NOTHING}
        texts = [sign.text for sign in shown.signs]
        digits = {digit for text in texts if text.isdigit() for digit in text}
        words = {text for text in texts if text in crowds.SEEN_WORDS}
        assert said == {kind.name for kind in shown.scene.kinds} | digits | words
        assert 0.03 < (labels[:, 0] != crowds.CONCEPTS.index(crowds.NOTHING)).mean() < 0.4


@torch.no_grad()
def test_tokens_that_are_dropped_inside_count_from_their_layer_on(study, vlm):
    """None dropped is the model itself; all but what the question attends to are not seen by the layers that follow."""
    inside, packing = study("inside"), study("packing")
    language, visual = vlm.model.language_model, noise(5, 2, FRONT - 1, 32)
    texts = [(image, *text) for image, row in enumerate(TEXTS) for text in row]
    found = inside.staged(language, visual, texts, inside.Stages("all", ()))
    packed = packing.pack(TEXTS, FRONT)
    hidden = packing.hidden_of(language, visual, packed, bos=2)
    own = [hidden[image][packed.text_of[image] == n] for image, row in enumerate(TEXTS) for n in range(len(row))]
    for row, expected in zip(found, own):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-5)
    fewer = inside.staged(language, visual, texts, inside.Stages("fewer", ((1, 0.25),)))
    one = inside.Stages("one", ((0, 0.25),))
    assert not torch.allclose(fewer, found) and one.mean(2) == 0.25 and inside.Stages("", ((1, 0.5),)).mean(2) == 0.75
    x = torch.cat([language.get_input_embeddings()(torch.tensor([[2]])), visual[:1]], dim=1)
    rotary = language.rotary_emb(x, torch.arange(FRONT)[None], "full_attention")
    row = inside.attention_row(language.layers[0], x, rotary, torch.tensor([20]))
    assert row[0, 21:].max() == 0 and row.sum().item() == pytest.approx(1)


def test_every_selection_is_asked_for_once_and_reported_beside_random(study, tmp_path):
    evaluate, report = study("evaluate"), study("report")
    wanted = list(evaluate.settings(None, evaluate.KEEPS, ("merge", "prune"), 2))
    assert len({setting.key for setting in wanted}) == len(wanted)
    assert {setting.select for setting in wanted} == {*evaluate.SELECTIONS, report.WHOLE, report.CONTROL}
    assert {setting.seed for setting in wanted if setting.select not in evaluate.DRAWN} == {0}
    questions = [[image, sort] for image in range(4) for sort in report.SORTS]
    scores = {s.key: vars(s) | {"right": [float(s.select != "random")] * len(questions)} for s in wanted}
    found = {"images": 4, "weights": "0" * 64, "asked": questions, "scores": scores}
    report.write_report(found, tmp_path / "selections.json")
    table = (tmp_path / "selections.md").read_text()
    for select in evaluate.SELECTIONS:
        name = select if select == report.RANDOM else f"{select}, "
        assert f"\n| {name}" in table
    pairs = len(report.GREEDY) * len(report.ROUNDS)
    keeps, settings = len(evaluate.KEEPS), len(report.GREEDY) + 3  # merged above dropped; and with a question
    text = (len(report.GREEDY) + len(report.ROUNDS)) * keeps + 1  # one with averages of squares
    equal = (pairs + settings) * keeps + 3 * text
    assert table.count("+0.000 [+0.000, +0.000]") == equal, "all but random are equal"
    rows = table.count("\n| ") - (2 + len(report.GREEDY)) * keeps - text
    assert table.count("+1.000 [+1.000, +1.000]") == rows - 2 * keeps
    assert (tmp_path / "selections.png").stat().st_size > 10_000
    assert evaluate.f1("dog, two cats", "two cats, dog") == 1 and evaluate.f1("dog", "cat, dog") == pytest.approx(2 / 3)
