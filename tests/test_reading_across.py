"""Fewer visual tokens for readers that attend to them across: exactly as if the others had been masked."""

from __future__ import annotations

import copy

import pytest
import torch

import turbovlm
from vlms import blip, blip2, noise, seeded, vision_encoder_decoder

IMAGES = noise(0, 2, 3, 48, 48)
IDS = torch.tensor([[2, 5, 6, 7], [2, 8, 9, 10]])


def decoder_of(model):
    return model.decoder if hasattr(model, "decoder") else model.text_decoder


@pytest.fixture(params=["vision_encoder_decoder", "blip"])
def captioner(request):
    if request.param == "blip":
        return seeded(lambda: blip("ConditionalGeneration"))
    return seeded(vision_encoder_decoder)


def logits_of(model):
    if hasattr(model, "text_decoder"):
        return model(pixel_values=IMAGES, input_ids=IDS).logits
    return model(pixel_values=IMAGES, decoder_input_ids=IDS).logits


@torch.no_grad()
def test_pruned_equals_masked(captioner):
    tower = captioner.encoder if hasattr(captioner, "encoder") else captioner.vision_model
    full = tower(pixel_values=IMAGES).last_hidden_state
    with turbovlm.apply(captioner, visual_keep=0.4, reduce="prune") as handle:
        assert tower(pixel_values=IMAGES).last_hidden_state.shape[1] == 1 + 14
        logits = logits_of(captioner)
        (selection,) = handle.visual
    mask = torch.zeros(2, 37, dtype=torch.long)
    mask[:, 0] = 1
    mask.scatter_(1, selection.kept + 1, 1)
    if hasattr(captioner, "text_decoder"):  # transformers 5.23 does not apply this mask in BLIP's decoder
        full, mask = full[mask.bool()].view(2, 15, -1), None
    masked = decoder_of(captioner)(input_ids=IDS, encoder_hidden_states=full, encoder_attention_mask=mask).logits
    torch.testing.assert_close(logits, masked, rtol=0, atol=1e-4)
    assert (logits - logits_of(captioner)).abs().max() > 1e-6


def generations(model):
    if hasattr(model, "language_model"):
        return model.generate(pixel_values=IMAGES, input_ids=torch.tensor([[90] * 4 + [2, 5]] * 2), max_new_tokens=4)
    if hasattr(model, "text_decoder"):
        return model.generate(pixel_values=IMAGES, input_ids=IDS, max_new_tokens=4)
    return model.generate(pixel_values=IMAGES, max_new_tokens=4, num_beams=2)


@pytest.mark.parametrize("settings", [{"visual_keep": 0.5}, {"r": 4, "visual_keep": 0.5}, {"r": 4}])
@pytest.mark.parametrize("make", [vision_encoder_decoder, lambda: blip("ConditionalGeneration"), blip2])
@torch.no_grad()
def test_generates_and_comes_back(make, settings):
    model = seeded(make)
    before = generations(model)
    handle = turbovlm.apply(model, **settings)
    found = generations(model)
    twin = copy.deepcopy(model)
    assert torch.equal(generations(twin), found)
    if "visual_keep" in settings:
        patches = 36 - 4 * settings.get("r", 0)
        assert handle.visual[0].kept.shape == (2, patches // 2)
    handle.remove()
    assert torch.equal(generations(model), before)


@torch.no_grad()
def test_merged_tokens_count_by_size():
    """Everything averaged into one token is the average of all patches, however it was merged before."""
    model = seeded(vision_encoder_decoder)
    tower = model.encoder
    with turbovlm.apply(tower, r=[0, 0, 0, 10], proportional=False):
        merged = tower(pixel_values=IMAGES).last_hidden_state
        assert merged.shape[1] == 27
    with turbovlm.apply(model, r=[0, 0, 0, 10], visual_keep=1, proportional=False) as handle:
        one = tower(pixel_values=IMAGES).last_hidden_state
        weights = handle.visual[0].weights
    assert one.shape[1] == 2
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert weights.max() > 1.5 * weights.min()
    torch.testing.assert_close(one[:, 1], (merged[:, 1:] * weights.unsqueeze(-1)).sum(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ["QuestionAnswering", "ImageTextRetrieval"])
@torch.no_grad()
def test_blips_other_tasks(task):
    model = seeded(lambda: blip(task))
    inputs = {"pixel_values": IMAGES, "input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if task == "QuestionAnswering":
        inputs["labels"] = IDS
    first = next(iter(model(**inputs).values()))
    with turbovlm.apply(model, visual_keep=0.5, reduce="prune"):  # merged, random weights tell them apart too little
        assert not torch.equal(next(iter(model(**inputs).values())), first)
    assert torch.equal(next(iter(model(**inputs).values())), first)
