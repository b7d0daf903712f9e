"""Every family beside those of the other tests reads exactly what they do: as if the dropped tokens were not there."""

from __future__ import annotations

import importlib

import pytest
import torch

import turbovlm
from more_vlms import MORE
from turbovlm.cli import main
from turbovlm.errors import ConfigError, StateError, UnsupportedModelError
from turbovlm.vlm.families.refused import REFUSED
from vlms import NEW, PAD, SPECIAL, dropped, full_positions, generated, masked_forward, masked_generate, noise, seeded

transformers = pytest.importorskip("transformers")

ROWS = [[5, 6, "image", 7, 8], [3, 4, 5, 6], [7, "image", 9, 10, "image", 11]]
FILMS = [[5, "video", 6, "image", 7], [3, 4], [8, "video", 9, "video", 4]]
RECURRENT = ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "minicpmv4_6")
"""Families with layers that read a prompt as a sequence: a masked token goes into their state all the same."""


def cases():
    for name, family in MORE.items():
        yield pytest.param(name, ROWS, id=name)
        if family.video is not None:
            rows = [[item for item in row if item != "image"] for row in FILMS] if family.one_placeholder else FILMS
            yield pytest.param(name, rows, id=f"{name}-video")


def read_alone(model, inputs, gone, positions):
    """The logits of each row's prompt without the dropped columns and padding, read by itself, in its columns."""
    embedded = []
    part = model.model.language_model

    def keep(module, args, kwargs):
        embedded.append(kwargs["inputs_embeds"])

    hook = part.register_forward_pre_hook(keep, with_kwargs=True)
    full = model(**inputs, position_ids=positions).logits
    hook.remove()
    seen = inputs["attention_mask"].bool() & ~gone
    for row, columns in enumerate(seen):
        alone = {
            "inputs_embeds": embedded[0][row : row + 1, columns],
            "position_ids": positions[..., row : row + 1, columns],
        }
        full[row, columns] = model.lm_head(part(**alone).last_hidden_state)[0]
    return full


def generate_alone(model, inputs, gone, positions, types):
    """Greedy decoding of each row's prompt without the dropped columns, read as a whole for every token."""
    inputs, found = dict(inputs), []
    for _ in range(NEW):
        logits = read_alone(model, inputs, gone, positions)[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
        found.append(logits.argmax(-1, keepdim=True))
        one = torch.ones_like(found[-1])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], found[-1]], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], one], dim=1)
        if types is not None:
            inputs[types] = torch.cat([inputs[types], 0 * one.int()], dim=1)
        gone = torch.cat([gone, one == 0], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("name", "rows"), cases())
@torch.no_grad()
def test_pruned_equals_masked(name, rows):
    family = MORE[name]
    model = seeded(family.make)
    inputs = family.inputs(*rows)
    positions = full_positions(model, inputs, family)
    seen = inputs["attention_mask"].bool()
    before = model(**inputs, position_ids=positions).logits
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    settings = {} if family.attention else {"alpha": 0}
    with turbovlm.apply(model, visual_keep=1.0, **settings):
        whole = model(**inputs, position_ids=positions).logits
    torch.testing.assert_close(whole[seen], before[seen], rtol=0, atol=1e-5)
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune", **settings) as handle:
        logits = model(**inputs, position_ids=positions).logits
        gone = dropped(handle, inputs, family)
        found = generated(model, inputs)
        if family.types is not None:  # which are given anew with every token
            assert torch.equal(generated(model, inputs, use_cache=False), found)
        if family.beams and not (family.one_placeholder and rows is not ROWS):  # of which the library finds no videos
            beams = generated(model, inputs, num_beams=2)
            assert beams.shape == found.shape
    assert torch.equal(model(**inputs, position_ids=positions).logits, before)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert torch.equal(gone.any(dim=1), torch.isin(inputs["input_ids"], torch.tensor(SPECIAL)).any(dim=1))
    if name in RECURRENT:
        wanted = read_alone(model, inputs, gone, positions)
        said = generate_alone(model, inputs, gone, positions, family.types)
    else:
        wanted, said = masked_forward(model, inputs, gone, family), masked_generate(model, inputs, gone, family)
    torch.testing.assert_close(logits[seen & ~gone], wanted[seen & ~gone], rtol=0, atol=1e-4)
    assert torch.equal(found, said)


def turns(family, *rows):
    """Prompts with an image, the same with a second one behind it, and the columns that the first have."""
    first, whole = family.inputs(*rows), family.inputs(*[[*row, "image", 9, 4] for row in rows])
    return first, whole, first["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl", "gemma4_both_ways", "mistral3", "llama4"])
@torch.no_grad()
def test_an_image_behind_a_cache(name):
    family = MORE[name]
    model = seeded(family.make)
    first, whole, cut = turns(family, [5, "image", 7, 8])
    positions = full_positions(model, whole, family)
    rest = {k: v[1:] for k, v in whole.items() if k not in ("input_ids", "attention_mask", family.types)}
    rest |= {"input_ids": whole["input_ids"][:, cut:], "attention_mask": whole["attention_mask"]}
    if family.types is not None:
        rest[family.types] = whole[family.types]
    if name == "qwen3_5":
        rest["pixel_values"] = whole["pixel_values"][len(first["pixel_values"]) :]
    with turbovlm.apply(model, visual_keep=0.4):
        wanted = model(**whole, position_ids=positions).logits[:, -1]
        cache = model(**first, position_ids=positions[..., :cut]).past_key_values
        found = model(**rest, position_ids=positions[..., cut:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_ragged_images_behind_a_cache_of_recurrent_layers_are_refused():
    family = MORE["lfm2_vl"]
    model = seeded(family.make)
    first, whole = family.inputs([5, 6], [7, 8]), family.inputs([5, "image"], [7, 8, 9, 10, 11, "image"])
    rest = {k: v[:, 2:] if k == "input_ids" else v for k, v in whole.items()}
    with turbovlm.apply(model, visual_keep=0.4):
        cache = model(**first).past_key_values
        with pytest.raises(StateError, match=r"recurrent layers of this model .* one by one"):
            model(**rest, past_key_values=cache)


@pytest.mark.parametrize("name", [name for name, family in MORE.items() if not family.attention])
def test_a_tower_without_a_row_for_each_token_says_so(name):
    model = seeded(MORE[name].make)
    with pytest.raises(ConfigError, match=r"visual_select='coverage': it goes by attention, and .* alpha=0 with"):
        turbovlm.apply(model, visual_keep=0.5)


@torch.no_grad()
def test_features_that_a_model_leaves_out_itself_are_refused():
    """VideoLLaMA 3 leaves out patches of videos by a mask, before it looks for as many placeholders."""
    family = MORE["video_llama_3"]
    model = seeded(family.make)
    inputs = family.inputs([5, "video", 6])
    mask = torch.ones(24, dtype=torch.bool)
    mask[3] = False
    fewer = torch.ones(1, 26, dtype=torch.bool)
    fewer[0, 4] = False
    inputs |= {name: inputs[name][fewer].unsqueeze(0) for name in ("input_ids", "attention_mask")}
    model(**inputs, video_compression_mask=mask)
    with turbovlm.apply(model, visual_keep=0.5), pytest.raises(StateError, match="video_compression_mask"):
        model(**inputs, video_compression_mask=mask)


@torch.no_grad()
def test_a_part_with_a_head_of_its_own():
    """Llama 4's logits, and the loss of them, are of the full prompt's columns, as many as are asked for."""
    family = MORE["llama4"]
    model = seeded(family.make)
    inputs = family.inputs(*ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == family.token, -100)
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune") as handle:
        outputs = model(**inputs, labels=labels)
        gone = dropped(handle, inputs, family)
        assert outputs.logits.shape[:2] == inputs["input_ids"].shape
        for keep in (1, 3, torch.tensor([0, 4])):
            found = model(**inputs, logits_to_keep=keep).logits
            wanted = outputs.logits[:, -keep:] if isinstance(keep, int) else outputs.logits[:, keep]
            torch.testing.assert_close(found, wanted)
    masked = masked_forward(model, inputs, gone, family)
    said = (inputs["attention_mask"].bool() & ~gone)[:, :-1] & (labels[:, 1:] != -100)
    unsaid = labels.clone()
    unsaid[:, 1:][~said] = -100
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune"):
        loss = model(**inputs, labels=unsaid).loss
    wanted = torch.nn.functional.cross_entropy(masked[:, :-1][said], labels[:, 1:][said])
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_refused_by_name(path):
    """By the class alone: such a model is not built, and a name that its library no longer has would go unseen."""
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    model = torch.nn.Sequential()
    torch.nn.Module.__init__(model)
    model.append(cls.__new__(cls))
    torch.nn.Module.__init__(model[0])
    with pytest.raises(UnsupportedModelError, match=rf"visual_keep=0\.5: {name}: "):
        turbovlm.apply(model, visual_keep=0.5)


@pytest.mark.parametrize("name", ["deepseek_vl", "janus"])
@torch.no_grad()
def test_merged_inside_the_tower_as_well(name):
    family = MORE[name]
    model = seeded(family.make)
    inputs = family.inputs(*ROWS)
    with turbovlm.apply(model, visual_keep=0.5):
        alone = model(**inputs).logits
    with turbovlm.apply(model, r=0, visual_keep=0.5):
        torch.testing.assert_close(model(**inputs).logits, alone, rtol=0, atol=1e-5)
    with turbovlm.apply(model, r=3, visual_keep=0.5) as handle:
        assert not torch.equal(model(**inputs).logits, alone)
        assert handle.schedules[0].tokens == (36, 30, 30, 24, 24)
        assert [len(selection.kept[0]) for selection in handle.visual] == [18] * 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("idefics2", "Idefics2: 4 of 8 visual tokens would be read, chosen without attention"),
        ("fast_vlm", "FastVLM: fewer of an image's visual tokens would be read, chosen without attention"),
        ("gemma4", "Gemma 4: 392 of the 784 visual tokens would be read"),
        ("mistral3", "Mistral 3: 5 of the 9 visual tokens would be read"),
    ],
)
def test_inspect_says_what_would_be_read(name, words, tmp_path, capsys):
    model = seeded(MORE[name].make)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--visual-keep", "0.5"]) == 0
    assert words in " ".join(capsys.readouterr().out.split())


def test_a_model_built_without_a_tower_says_so():
    config = MORE["gemma4"].make().config
    config.vision_config = None
    model = transformers.Gemma4ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match=r"this Gemma4Model reads no images: its vision_tower is None"):
        turbovlm.apply(model, visual_keep=0.5)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
@torch.no_grad()
def test_inputs_of_every_layer_beside_embeddings(name):
    family = MORE[name]
    model = seeded(family.make)
    inputs = family.inputs(*ROWS)
    ids = inputs["input_ids"]
    known = ids if name == "gemma3n" else ids.masked_fill(ids == family.token, PAD)
    settings = {} if family.attention else {"alpha": 0}
    beside = {"per_layer_inputs": model.model.language_model.get_per_layer_inputs(known)}
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune", **settings) as handle:
        wanted = model(**inputs).logits
        seen = inputs["attention_mask"].bool() & ~dropped(handle, inputs, family)
        del inputs["input_ids"]
        found = model(**inputs, inputs_embeds=model.get_input_embeddings()(ids), **beside).logits
    torch.testing.assert_close(found[seen], wanted[seen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
@torch.no_grad()
def test_sound_beside_images_counts_for_positions(name):
    family = MORE[name]
    model = seeded(family.make)
    sound = {"input_features": noise(9, 1, 8, 100), "feature_attention_mask": torch.ones(1, 100, dtype=torch.long)}
    heard = model.model.get_audio_features(**sound, return_dict=True).last_hidden_state
    inputs = family.inputs([5, 93, *[92] * len(heard), 94, 6, "image", 7, 8]) | sound
    own = model(**inputs).logits
    with turbovlm.apply(model, visual_keep=1.0):
        torch.testing.assert_close(model(**inputs).logits, own, rtol=0, atol=1e-5)
    lengths = sound["feature_attention_mask"].sum(dim=1)
    names = ("input_ids", "image_grid_thw", "attention_mask")
    positions = model.model.get_rope_index(**{n: inputs[n] for n in names}, audio_seqlens=lengths)[0]
    with turbovlm.apply(model, visual_keep=0.4):
        implied = model(**inputs).logits
        given = model(**inputs, position_ids=positions).logits
    torch.testing.assert_close(implied, given, rtol=0, atol=1e-5)
    assert not torch.equal(implied, own)
