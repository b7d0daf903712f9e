"""Prompts that came without their images, models that encode images themselves, and what their readers get."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

import turbovlm
from turbovlm.errors import StateError, UnsupportedModelError
from vlms import IMAGE, TEXT, VIDEO, VLMS, dropped, full_positions, generated, made, noise, seeded

transformers = pytest.importorskip("transformers")
ROW = [5, 6, "image", 7, 8]


@pytest.fixture(autouse=True)
def no_warnings():
    """What is fine is silent."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*visual_keep")
        yield


def without_images(inputs):
    return {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}


def filled(model, inputs, family):
    """The prompt's embeddings with image features in place of placeholders, as serving code makes them."""
    names = [name for name in inputs if "pixel" in name or name.endswith(("_grid_thw", "image_sizes"))]
    features = model.get_image_features(**{name: inputs[name] for name in names}, return_dict=True).pooler_output
    features = torch.cat(list(features)).view(-1, 32)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    return embeds.masked_scatter((inputs["input_ids"] == family.token).unsqueeze(-1), features)


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_placeholders_without_their_images_are_refused(name):
    family, model = made(name)
    inputs = without_images(family.inputs(ROW))
    count = int((inputs["input_ids"] == family.token).sum())
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with turbovlm.apply(model, visual_keep=0.4):
        for prompt in (
            inputs,
            {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]},
            {**inputs, "past_key_values": cache},
        ):
            with pytest.raises(StateError, match=rf"a prompt has {count} placeholders of images \(image_token_id=90\)"):
                model(**prompt)
        with pytest.raises(StateError, match=f"{count} placeholders"):
            model.generate(**inputs, max_new_tokens=2)
    model(**inputs)


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_embeddings_that_are_filled_already_are_warned_of(name):
    family, model = made(name)
    inputs = family.inputs(ROW, [3, 4, "image", 9, 10, 11])
    mask = inputs["attention_mask"]
    wanted = model(inputs_embeds=filled(model, inputs, family), attention_mask=mask).logits
    with turbovlm.apply(model, visual_keep=0.4):
        embeds = filled(model, inputs, family)
        with pytest.warns(UserWarning, match=r"visual_keep=0\.4: inputs_embeds hold what is no token's embedding"):
            assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, wanted)
        if family.types != "token_type_ids":  # whose generate takes no embeddings
            warnings.filterwarnings("ignore", message=".*visual_keep")
            model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=2)
    model(inputs_embeds=embeds, attention_mask=mask)


@torch.no_grad()
def test_bare_features_are_refused():
    """Idefics 3 and SmolVLM take them without what else the tower gave."""
    family, model = made("idefics3")
    inputs = family.inputs(ROW)
    features = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True).pooler_output
    model(**inputs, mm_encoder_outputs=torch.cat(features))
    with turbovlm.apply(model, visual_keep=0.4), pytest.raises(StateError, match="mm_encoder_outputs: a Tensor found"):
        model(**inputs, mm_encoder_outputs=torch.cat(features))


@torch.no_grad()
def test_pixels_beside_what_is_encoded_keep_the_librarys_error():
    family, model = made("llava")
    inputs = family.inputs(ROW)
    with turbovlm.apply(model, visual_keep=0.4):
        encoded = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
            model(**inputs, mm_encoder_outputs={"image": encoded})


@torch.no_grad()
def test_embeddings_that_say_that_they_hold_images_are_refused():
    family, model = made("qwen2_vl")
    inputs = family.inputs(ROW)
    with turbovlm.apply(model, visual_keep=0.4):
        prompt = {"inputs_embeds": filled(model, inputs, family), "attention_mask": inputs["attention_mask"]}
        for name in ("image_grid_thw", "mm_token_type_ids"):
            with pytest.raises(StateError, match=f"inputs_embeds come with {name} and without images"):
                model(**prompt, **{name: inputs[name]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_text_alone_is_silent(name, dtype):
    family, model = made(name)
    model.to(dtype)
    inputs = family.inputs([3, 4, 5, 6, 7], [8, 9])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds = torch.where(inputs["attention_mask"].bool().unsqueeze(-1), embeds, torch.full_like(embeds, 7.0))
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    tokens, plain = generated(model, inputs), model(**given).logits  # Qwen's positions go by what was generated before
    with turbovlm.apply(model, visual_keep=0.4):
        torch.testing.assert_close(model(**given).logits, plain)
        assert torch.equal(generated(model, inputs), tokens)


@torch.no_grad()
def test_what_follows_a_cache_is_silent():
    family, model = made("llava")
    image, text = family.inputs(ROW), family.inputs([3, 4, 5])
    with turbovlm.apply(model, visual_keep=0.4):
        for first in (image, text):
            cache = model(**first).past_key_values
            model(input_ids=torch.tensor([[7, family.token, 9]]), past_key_values=cache)
            embeds = noise(0, 1, 2, 32)
            model(inputs_embeds=embeds, past_key_values=cache)
        for settings in ({"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
            generated(model, image, **settings)


@torch.no_grad()
def test_an_accelerated_assistant_is_told_that_it_sees_nothing():
    family, model = made("llava")
    helper = seeded(family.make)
    turbovlm.apply(helper, visual_keep=0.4)
    with turbovlm.apply(model, visual_keep=0.4):
        wanted = generated(model, family.inputs(ROW))
        with pytest.warns(UserWarning, match=r"visual_keep=0\.4 of an assistant has no effect"):
            assert torch.equal(generated(model, family.inputs(ROW), assistant_model=helper), wanted)
    with pytest.raises(StateError, match="36 placeholders"):
        helper(**without_images(family.inputs(ROW)))


def col_qwen2():
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 3, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 32}
    vlm = {"model_type": "qwen2_vl", "vision_config": vision, "text_config": text}
    vlm |= {"image_token_id": IMAGE, "video_token_id": VIDEO}
    return transformers.ColQwen2ForRetrieval(transformers.ColQwen2Config(vlm_config=vlm, embedding_dim=16))


def col_pali():
    text = {"model_type": "gemma", **TEXT, "head_dim": 8}
    vision = {"model_type": "siglip_vision_model", "image_size": 48, "patch_size": 8, "hidden_size": 32}
    vision |= {"intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 32}
    vlm = {"model_type": "paligemma", "vision_config": vision | {"vision_use_head": False}, "text_config": text}
    vlm |= {"image_token_id": IMAGE, "projection_dim": 32}
    return transformers.ColPaliForRetrieval(transformers.ColPaliConfig(vlm_config=vlm, embedding_dim=16))


def pages(name):
    """Two pages, padded on the left, and their placeholders' number."""
    family = VLMS["qwen2_vl" if name == "ColQwen2" else "paligemma"]
    inputs = family.inputs(["image", 7, 8], ["image", 9])
    if name == "ColQwen2":
        counts = inputs["image_grid_thw"].prod(1).tolist()
        split = inputs["pixel_values"].split(counts)
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(split, batch_first=True)
    return family, {k: v for k, v in inputs.items() if not k.endswith("token_type_ids")}


@pytest.mark.parametrize("name", ["ColQwen2", "ColPali"])
@torch.no_grad()
def test_embeddings_of_pages(name):
    """Those of what is left are the full prompt's with the others masked; the others are copies, new to no maximum."""
    model = seeded(col_qwen2 if name == "ColQwen2" else col_pali)
    family, inputs = pages(name)
    full = model(**inputs).embeddings
    mask = inputs["attention_mask"].bool()
    with turbovlm.apply(model, visual_keep=0.5, reduce="prune") as handle:
        found = model(**inputs).embeddings
        gone = dropped(handle, inputs, family)
        assert gone.sum() == 36 if name == "ColPali" else gone.sum() == 14
    positions = torch.arange(mask.shape[1]) + family.first  # neither tells its language model of padding
    positions = positions.expand(3, 2, -1) if name == "ColQwen2" else positions.expand(2, -1)
    masked = model(**{**inputs, "attention_mask": (mask & ~gone).long(), "position_ids": positions}).embeddings
    left = mask & ~gone
    torch.testing.assert_close(found[left], masked[left], rtol=0, atol=1e-4)
    assert found.isfinite().all() and not torch.equal(found, full)
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found[mask].norm(dim=-1), torch.ones(int(mask.sum())))
    query = torch.nn.functional.normalize(noise(0, 5, 16), dim=-1)
    for page, seen, own in zip(found, left, mask):
        torch.testing.assert_close((query @ page[seen].T).amax(-1), (query @ page[own].T).amax(-1))
    torch.testing.assert_close(model(**inputs).embeddings, full, equal_nan=True)


@torch.no_grad()
def test_queries_are_not_changed():
    model = seeded(col_qwen2)
    inputs = without_images(VLMS["qwen2_vl"].inputs([5, 6, 7], [8, 9]))
    plain = model(**inputs).embeddings
    with turbovlm.apply(model, visual_keep=0.5):
        torch.testing.assert_close(model(**inputs).embeddings, plain, equal_nan=True)


def test_pi0_is_refused():
    text = {"model_type": "gemma", **TEXT, "head_dim": 8}
    config = col_pali().config.vlm_config
    model = transformers.PI0ForConditionalGeneration(transformers.PI0Config(vlm_config=config, dit_config=text))
    with pytest.raises(
        UnsupportedModelError,
        match=r"visual_keep=0\.5: PI0Model: it puts visual tokens into its prompt itself.*; r, keep or flops merge in",
    ):
        turbovlm.apply(model, visual_keep=0.5)


def test_two_models_in_one_are_refused():
    both = torch.nn.ModuleDict({"draft": seeded(VLMS["llava"].make), "target": seeded(VLMS["llava"].make)})
    with pytest.raises(UnsupportedModelError, match=r"several .* \(draft\.model, target\.model\): apply"):
        turbovlm.apply(both, visual_keep=0.5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_every_column_has_a_hidden_state(name, padding):
    """A dropped column has that of the last one left before it, or of the first, so that the last is the prompt's."""
    family, model = made(name)
    inputs = family.inputs(["image", 7, 8], ["image", 9])
    if padding == "right":
        empty = int((inputs["attention_mask"][1] == 0).sum())
        for key in ("input_ids", "attention_mask", family.types):
            if key is not None:
                inputs[key][1] = inputs[key][1].roll(-empty)
    positions = full_positions(model, inputs, family)
    with turbovlm.apply(model, visual_keep=0.3, reduce="prune") as handle:
        out = model(**inputs, position_ids=positions, output_hidden_states=True)
        gone = dropped(handle, inputs, family)
    left = inputs["attention_mask"].bool() & ~gone
    masked = model(
        **{**inputs, "attention_mask": inputs["attention_mask"] * ~gone, "position_ids": positions},
        output_hidden_states=True,
    )
    for state, wanted in zip(out.hidden_states, masked.hidden_states, strict=True):
        assert (state.norm(dim=-1) > 0).all()
        torch.testing.assert_close(state[left], wanted[left], rtol=0, atol=1e-4)
        for row, seen in zip(state, left):
            places = seen.nonzero().flatten()
            for column in range(len(seen)):
                before = places[places <= column]
                source = before.max() if len(before) else places.min()
                assert torch.equal(row[column], row[source])
    last = inputs["attention_mask"].sum(1) - 1 if padding == "right" else torch.tensor([-1, -1])
    pooled = out.hidden_states[-1][torch.arange(2), last]
    torch.testing.assert_close(pooled, masked.hidden_states[-1][torch.arange(2), last], rtol=0, atol=1e-4)


@torch.no_grad()
def test_an_image_that_ends_a_prompt_is_pooled_where_it_is_read_last():
    family, model = made("qwen2_vl")
    inputs = family.inputs([5, 6, "image"])
    positions = full_positions(model, inputs, family)
    with turbovlm.apply(model, visual_keep=0.3, reduce="prune") as handle:
        pooled = model.model(**inputs, position_ids=positions).last_hidden_state[:, -1]
        gone = dropped(handle, inputs, family)
    mask = inputs["attention_mask"] * ~gone
    masked = model.model(**{**inputs, "attention_mask": mask, "position_ids": positions}).last_hidden_state
    torch.testing.assert_close(pooled, masked[:, mask[0].nonzero().max()], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["visual_keep", "cross_keep"])
def test_a_count_of_one_is_warned_of(name):
    from vlms import blip

    make = VLMS["llava"].make if name == "visual_keep" else lambda: blip("ImageTextRetrieval")
    model = seeded(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for amount in (1.0, 2, 0.5):
            turbovlm.apply(model, **{name: amount}).remove()
    with pytest.warns(UserWarning, match=rf"{name}=1 is a count: ONE token of each image .* {name}=1\.0 is the share"):
        turbovlm.apply(model, **{name: 1}).remove()


@torch.no_grad()
def test_each_thread_sees_what_it_has_chosen():
    """One that has run nothing sees the last of any."""
    from vlms import blip

    family, reader = made("llava")
    prompts = [family.inputs([5, "image", 7]), family.inputs([5, "image", "image", 7])]
    crosser = seeded(lambda: blip("ImageTextRetrieval"))
    reading, crossing = turbovlm.apply(reader, visual_keep=0.4), turbovlm.apply(crosser, cross_keep=0.5)
    barrier, found = threading.Barrier(2), {}

    def work(index):
        with torch.no_grad():
            ids = torch.tensor([[2, 5, 6, 7]] * (index + 1))
            reader(**prompts[index])
            crosser(pixel_values=noise(index, index + 1, 3, 48, 48), input_ids=ids)
            barrier.wait()
            found[index] = len(reading.visual), len(crossing.cross[0].kept)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: (1, 1), 1: (2, 2)}
    assert len(reading.visual) in (1, 2) and len(crossing.cross[0].kept) in (1, 2)


@torch.no_grad()
def test_a_forward_that_fails_leaves_the_last_record():
    family, model = made("llava")
    with turbovlm.apply(model, visual_keep=0.4) as handle:
        model(**family.inputs([5, "image", 7]))
        before = handle.visual
        hook = model.get_decoder().register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**family.inputs([5, "image", "image", 7]))
        hook.remove()
        assert handle.visual is before


def test_the_command_warns_of_a_count_of_one(tmp_path, capsys):
    from turbovlm.cli import main

    model = seeded(VLMS["llava"].make)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="visual_keep=1 is a count"):
        assert main(["inspect", str(tmp_path), "--visual-keep", "1"]) == 0
    assert "1 of the 36 visual tokens" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--visual-keep", "1.0"]) == 0
