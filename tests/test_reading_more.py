"""Fewer visual tokens: videos, threads, compilers, copies, training, and what `apply` refuses."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import turbovlm
from turbovlm import ReadConfig
from turbovlm.cli import main
from turbovlm.errors import TurboError, UnsupportedModelError
from turbovlm.vlm.install import find_reading
from turbovlm.vlm.marks import ATTENTION
from vlms import (
    PAD,
    SPECIAL,
    VIDEO,
    VLMS,
    blip,
    dropped,
    full_positions,
    generated,
    made,
    masked_forward,
    masked_generate,
    noise,
    seeded,
    visual_of,
)

transformers = pytest.importorskip("transformers")

VIDEOS = [name for name, family in VLMS.items() if family.video is not None]
FILMS = {
    "a video": [[5, 6, "video", 7]],
    "beside an image": [[5, "image", 6, "video", 7]],
    "ragged": [[5, "video", 6, "image", 7], [3, 4], [8, "video", 9, "video", 4], [3, "image", 4]],
}
ROWS = [[5, 6, "image", 7, 8], [3, 4, 5, 6], [7, "image", 9, 10, "image", 11]]


@pytest.mark.parametrize("prompt", FILMS)
@pytest.mark.parametrize("name", VIDEOS)
@torch.no_grad()
def test_videos_pruned_equal_masked(name, prompt):
    family, model = made(name)
    inputs = family.inputs(*FILMS[prompt])
    positions = full_positions(model, inputs, family)
    before = model(**inputs, position_ids=positions).logits, generated(model, inputs)
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune") as handle:
        logits = model(**inputs, position_ids=positions).logits
        gone = dropped(handle, inputs, family)
        found = generated(model, inputs)
    assert torch.equal(gone.any(dim=1), torch.isin(inputs["input_ids"], torch.tensor(SPECIAL)).any(dim=1))
    seen = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(logits[seen], masked_forward(model, inputs, gone, family)[seen], rtol=0, atol=1e-4)
    assert torch.equal(found, masked_generate(model, inputs, gone, family))
    assert torch.equal(model(**inputs, position_ids=positions).logits, before[0])
    assert torch.equal(generated(model, inputs), before[1])


@pytest.mark.parametrize("name", VIDEOS)
@torch.no_grad()
def test_a_share_or_count_is_of_a_whole_video(name):
    family, model = made(name)
    inputs = family.inputs([5, "video", 6, "video", 7])
    for keep in (5, 0.25):
        with turbovlm.apply(model, visual_keep=keep) as handle:
            generated(model, inputs)
        tokens = [selection.destination.shape[1] for selection in handle.visual]
        assert len(tokens) == 2 and sum(tokens) == (inputs["input_ids"] == VIDEO).sum()
        assert [selection.kept.shape[1] for selection in handle.visual] == [5 if keep == 5 else n // 4 for n in tokens]


@pytest.mark.parametrize("name", VIDEOS)
@torch.no_grad()
def test_a_videos_attention_is_that_of_its_frames(name):
    family, model = made(name)
    _, whole = family.video(0)
    if name.startswith("qwen"):
        grid = whole["video_grid_thw"].clone()
        frames = whole["pixel_values_videos"].chunk(int(grid[0, 0]))
        grid[:, 0] = 1
        alone = [{"pixel_values_videos": frame, "video_grid_thw": grid} for frame in frames]
    else:
        alone = [{"pixel_values_videos": frame} for frame in whole["pixel_values_videos"].split(1, dim=1)]
    with turbovlm.apply(model, visual_keep=0.5):
        (found,) = getattr(model.get_video_features(**whole, return_dict=True), ATTENTION)
        each = [getattr(model.get_video_features(**frame, return_dict=True), ATTENTION)[0] for frame in alone]
    wanted = torch.cat(each if name.startswith("qwen") else [frame[:-1] for frame in each])
    torch.testing.assert_close(found[: len(wanted)], wanted, rtol=0, atol=1e-6)
    assert not any(torch.equal(each[0], other) for other in each[1:])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_two_threads(name):
    family, model = made(name)
    prompts = [
        family.inputs([5, 6, "image", 7, 8, 9]),
        family.inputs([5, "image", 7, 8, "image", 9, 3], [4, "image", 9, 9]),
    ]
    prompts[1]["pixel_values"] = prompts[1]["pixel_values"].roll(3, -1)

    def work(inputs):
        with torch.no_grad():
            return generated(model, inputs)

    with turbovlm.apply(model, visual_keep=0.4), ThreadPoolExecutor(2) as pool:
        alone = [work(inputs) for inputs in prompts]
        for _ in range(4):
            for found, wanted in zip(pool.map(work, prompts), alone):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("what", ["tower", "language model", pytest.param("all", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled(what):
    family, model = made("llava")
    inputs = [family.inputs([5, 6, "image", 7]), family.inputs([5, "image", 7], [4, 9, "image", 9])]
    inputs = inputs[:1] if what == "all" else inputs
    torch._dynamo.reset()
    with turbovlm.apply(model, visual_keep=0.4):
        wanted = [model(**one).logits for one in inputs]
        if what == "tower":
            encode = torch.compile(model.model.get_image_features, backend="eager")
            encoded = [encode(one.pop("pixel_values"), return_dict=True) for one in inputs]
            found = [model(**one, mm_encoder_outputs={"image": image}).logits for one, image in zip(inputs, encoded)]
        else:
            part = model if what == "all" else model.model.language_model
            part.forward = torch.compile(part.forward, backend="eager")
            found = [model(**one).logits for one in inputs]
    torch._dynamo.reset()
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_encoding_is_one_graph():
    family, model = made("llava")
    pixels = family.inputs([5, "image", 7])["pixel_values"]
    torch._dynamo.reset()
    with turbovlm.apply(model, visual_keep=0.4):
        own = model.model.get_image_features(pixels, return_dict=True)
        encode = torch.compile(
            lambda x: model.model.get_image_features(x, return_dict=True), backend="eager", fullgraph=True
        )
        found = encode(pixels)
    torch._dynamo.reset()
    for one, other in zip(getattr(found, ATTENTION), getattr(own, ATTENTION), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert getattr(own, ATTENTION)[0].sum() <= 1


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    family, model = made(name)
    inputs = family.inputs(*ROWS)
    names, before = list(model.state_dict()), generated(model, inputs)
    with turbovlm.apply(model, visual_keep=0.4):
        assert list(model.state_dict()) == names
        found = generated(model, inputs)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(generated(loaded, inputs), before)
    with turbovlm.apply(loaded, visual_keep=0.4):
        assert torch.equal(generated(loaded, inputs), found)


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_another_dtype_afterwards(name):
    family, model = made(name)
    inputs = family.inputs(*ROWS)
    positions = full_positions(model, inputs, family)
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune") as handle:
        model.to(torch.bfloat16)
        logits = model(**inputs, position_ids=positions).logits
        gone = dropped(handle, inputs, family)
    assert logits.dtype == torch.bfloat16
    seen = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(logits[seen], masked_forward(model, inputs, gone, family)[seen], rtol=0, atol=2e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", VLMS)
def test_training(name, checkpointing):
    family, model = made(name)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = family.inputs(*ROWS)
    positions = full_positions(model, inputs, family)

    def gradients(labels, mask):
        model.zero_grad(set_to_none=True)
        out = model(**{**inputs, "attention_mask": mask}, position_ids=positions, labels=labels)
        out.loss.backward()
        return out.loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with turbovlm.apply(model, visual_keep=0.4, reduce="prune") as handle, torch.no_grad():
        model(**inputs)
        gone = dropped(handle, inputs, family)
    mask = inputs["attention_mask"] * ~gone
    unsaid = (inputs["input_ids"] == PAD) | (inputs["input_ids"] == family.token)
    unsaid[:, 1:] |= mask[:, :-1] == 0  # said by a column that is not there
    labels = inputs["input_ids"].masked_fill(unsaid, -100)
    with turbovlm.apply(model, visual_keep=0.4, reduce="prune"):
        loss, found = gradients(labels, inputs["attention_mask"])
    masked_loss, wanted = gradients(labels, mask)
    torch.testing.assert_close(loss, masked_loss, rtol=0, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_an_exception_half_way(name):
    family, model = made(name)
    inputs = family.inputs(*ROWS)
    fewer, more = inputs["input_ids"].clone(), inputs["input_ids"].clone()
    fewer[tuple((fewer == family.token).nonzero()[0])] = 7
    more[0, -1] = family.token
    with turbovlm.apply(model, visual_keep=0.4):
        wanted = generated(model, inputs)
        for wrong in (fewer, more):
            with pytest.raises((ValueError, RuntimeError)):
                generated(model, {**inputs, "input_ids": wrong})
            assert torch.equal(generated(model, inputs), wanted)
        hook = model.get_decoder().register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generated(model, inputs)
        hook.remove()
        assert torch.equal(generated(model, inputs), wanted)


@torch.no_grad()
def test_encoded_while_accelerated_and_read_afterwards():
    family, model = made("qwen3_vl")
    inputs = family.inputs([5, "image", 7])
    wanted = model(**inputs).logits
    with turbovlm.apply(model, visual_keep=0.4):
        encoded = model.model.get_image_features(**visual_of(inputs, family), return_dict=True)
    del inputs["pixel_values"]
    found = model(**inputs, mm_encoder_outputs={"image": encoded}).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_an_older_library(monkeypatch):
    _, model = made("llava")
    part = type(model.model)

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None):
        raise AssertionError("not run")

    monkeypatch.setattr(part, "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"LLaVA of transformers [\d.]+ .* transformers ≥ 5.18 does"):
        turbovlm.apply(model, visual_keep=0.5)
    monkeypatch.undo()
    turbovlm.apply(model, visual_keep=0.5).remove()


@pytest.mark.parametrize("which", ["part", "guide", "tower"])
def test_a_forward_that_another_library_has_set(which):
    model = seeded(lambda: blip("ConditionalGeneration")) if which == "tower" else made("llava")[1]
    guide = find_reading(model, ReadConfig(0.5)).guide
    module = model.get_submodule({"tower": "vision_model", "part": "model", "guide": f"model.{guide}"}[which])
    module.forward = functools.partial(type(module).forward, module)
    with pytest.raises(TurboError, match="a forward of its own"):
        turbovlm.apply(model, visual_keep=0.5)


def test_inspect_counts_what_the_tower_leaves(tmp_path, capsys):
    model = seeded(lambda: blip("ConditionalGeneration"))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    out = tmp_path / "plan.json"
    assert main(["inspect", str(tmp_path), "--r", "2", "--visual-keep", "0.5", "--json", str(out)]) == 0
    capsys.readouterr()
    with turbovlm.apply(model, r=2, visual_keep=0.5) as handle, torch.no_grad():
        model.vision_model(noise(0, 1, 3, 48, 48))
        selection = handle.visual[0]
    assert json.loads(out.read_text())["reading"]["tokens"] == [selection.destination.shape[1], selection.kept.shape[1]]
