"""Tokens of videos chosen frame by frame (`change`): as plain loops choose them, in every family with videos."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import turbovlm
from more_vlms import MORE
from test_greedy import plain as choose_plainly
from turbovlm import ReadConfig
from turbovlm.errors import ConfigError, StateError
from turbovlm.vlm.frames import LEAST_CHANGE, budgets, change, select_frames
from turbovlm.vlm.question import NO_TEXT, ImageText
from turbovlm.vlm.select import select
from vlms import (
    IMAGE,
    SPECIAL,
    VLMS,
    Vlm,
    dropped,
    full_positions,
    generated,
    internvl,
    masked_forward,
    masked_generate,
    noise,
    seeded,
)

WAYS = ("coverage", "mmr", "dpp")
SHARED = {"visual_select": "coverage", "change": 1}


def intern_frame(index: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """A frame of a video behind its number, as InternVL's processor writes it."""
    return [20 + index, *[IMAGE] * 16], {"pixel_values": noise(index, 1, 3, 48, 48)}


FILMS: dict[str, tuple[Vlm, list[list[Any]]]] = {
    name: (family, [[5, "video", 6, "image", 7], [3, 4], [8, "video", 9, "video", 4]])
    for name, family in {**VLMS, **MORE}.items()
    if family.video is not None and name != "video_llava"  # whose frames are not known
}
FILMS["internvl"] = Vlm(internvl, intern_frame), [[5, "image", "image", "image", 7], [3, 4], [8, "image", "image", 9]]
RECURRENT = ("qwen3_5", "qwen3_5_moe")
"""Families whose masked tokens go into the state of recurrent layers: `test_reading_families` reads them alone."""


def prompts(name):
    """A family, and prompts for it; without images beside videos where these have their placeholder."""
    family, rows = FILMS[name]
    if family.one_placeholder:
        rows = [[item for item in row if item != "image"] for row in rows]
    return family, rows


def settings_for(family, **others):
    return {"visual_keep": 0.4, **SHARED, **({} if family.attention else {"alpha": 0}), **others}


@pytest.mark.parametrize("name", FILMS)
@torch.no_grad()
def test_pruned_equals_masked(name):
    """And positions, of time too, are those of the full prompt."""
    family, rows = prompts(name)
    model = seeded(family.make)
    inputs = family.inputs(*rows)
    positions = full_positions(model, inputs, family)
    before = model(**inputs, position_ids=positions).logits
    with turbovlm.apply(model, **settings_for(family, reduce="prune")) as handle:
        logits = model(**inputs, position_ids=positions).logits
        gone = dropped(handle, inputs, family)
        found = generated(model, inputs)
        lengths = [selection.destination.shape[1] for selection in handle.visual]
        assert [selection.kept.shape[1] for selection in handle.visual] == [math.floor(0.4 * n + 0.5) for n in lengths]
        assert "change=1" in str(handle) and "frame by frame in videos" in str(handle)
    assert torch.equal(gone.any(dim=1), torch.isin(inputs["input_ids"], torch.tensor(SPECIAL)).any(dim=1))
    assert torch.equal(model(**inputs, position_ids=positions).logits, before)
    if name in RECURRENT:
        return
    seen = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(logits[seen], masked_forward(model, inputs, gone, family)[seen], rtol=0, atol=1e-4)
    assert torch.equal(found, masked_generate(model, inputs, gone, family))


def plain_change(x):
    """D of every token of a video, `[frames, tokens, width]`."""
    x = F.normalize(x.double(), dim=-1)
    every = x.flatten(0, 1)
    apart = torch.stack([1 - one @ other for one in every for other in every]).mean()
    found = torch.ones(x.shape[:2], dtype=torch.float64)
    for frame in range(1, len(x)):
        for token in range(x.shape[1]):
            moved = (1 - x[frame, token] @ x[frame - 1, token]) / apart
            found[frame, token] = min(max(float(moved), LEAST_CHANGE), 1)
    return found


def plain_budgets(shares, tokens, k):
    """One token after another to the frame that is owed most, each its first before any has its second."""
    counts = [0] * len(shares)
    for _ in range(k):
        owed = [
            (count == 0, share / (count + 0.5)) if count < tokens else (False, -1.0)
            for share, count in zip(shares, counts)
        ]
        counts[owed.index(max(owed))] += 1
    return counts


def video(frames=4, tokens=9, width=12, seed=0, behind=0):
    """A video whose frames are each like the one before, but for some tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(tokens, width, generator=generator) + 0.3]
    for _ in range(frames - 1):
        new = torch.rand(tokens, 1, generator=generator).pow(3)
        found.append(found[-1] * (1 - new) + torch.randn(tokens, width, generator=generator) * new)
    found.append(torch.randn(behind, width, generator=generator))
    return torch.cat(found).unsqueeze(0), torch.rand(1, frames * tokens + behind, generator=generator)


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("k", [2, 7, 20, 33])
@pytest.mark.parametrize("how", WAYS)
def test_as_plain_loops_choose(how, k, behind):
    features, semantic = video(behind=behind)
    text = ImageText([noise(3, 5, 12)])
    config = ReadConfig(k, visual_select=how, question=0.5, change=0.8)
    found = select_frames(features, semantic, k, 4, config, text)
    by_frame = features[0, :36].view(4, 9, 12)
    share = semantic[0].double() / semantic[0].double().mean()
    weights = share.clamp(min=1e-4).pow(config.saliency) * text.relevance(features)[0].double().mul(0.5).exp()
    weights = weights[:36].view(4, 9) * plain_change(by_frame).pow(0.8)
    counts = plain_budgets(weights.sum(1).tolist(), 9, k - behind)
    wanted = [
        frame * 9 + place
        for frame, count in enumerate(counts)
        for place in sorted(choose_plainly(by_frame[frame], count, how, weights[frame].log(), torch.ones(9)))
    ]
    wanted += [36] * behind
    assert found.kept[0].tolist() == wanted and len(wanted) == k
    x = F.normalize(features[0].double(), dim=-1)
    nearest = (x @ x[wanted].T).argmax(1)
    nearest[wanted] = torch.arange(k)
    assert torch.equal(found.destination[0], nearest)
    averages = torch.stack([features[0, nearest == slot].mean(0) for slot in range(k)])
    torch.testing.assert_close(found.take(features)[0], averages)


def test_budgets():
    assert budgets(torch.tensor([1.0, 0.25, 0.25]), 9, 12).tolist() == [8, 2, 2]
    assert budgets(torch.tensor([1.0, 0.001, 0.001]), 9, 12).tolist() == [9, 2, 1]  # full, and the first of equal ones
    assert budgets(torch.tensor([0.2, 1.0, 0.5]), 9, 2).tolist() == [0, 1, 1]  # not enough for all
    assert budgets(torch.tensor([0.2, 1.0, 0.5]), 9, 3).tolist() == [1, 1, 1]
    assert budgets(torch.zeros(2).fill_(1e-30), 4, 8).tolist() == [4, 4]


@pytest.mark.parametrize("how", WAYS)
def test_a_static_video_keeps_its_first_frame_first(how):
    frame = noise(0, 16, 24)
    features = frame.repeat(5, 1).unsqueeze(0)
    config = ReadConfig(0.5, visual_select=how, alpha=0, change=1)
    for k in (8, 15, 20):
        kept = select_frames(features, None, k, 5, config, NO_TEXT).kept[0]
        assert (kept // 16).bincount(minlength=5).tolist() == [k - 4, 1, 1, 1, 1]
    more = select_frames(features, None, 40, 5, config, NO_TEXT).kept[0]
    assert more[:16].tolist() == list(range(16))
    merged = select_frames(features, None, 20, 5, config, NO_TEXT)
    torch.testing.assert_close(merged.take(features)[0, :16], frame)  # the rest goes to what is like it


@pytest.mark.parametrize("how", WAYS)
def test_a_change_in_a_corner_is_read(how):
    features = noise(0, 16, 24).repeat(5, 1, 1)
    corner = torch.tensor([0, 1, 4, 5])
    features[3, corner] = noise(1, 4, 24)
    config = ReadConfig(0.5, visual_select=how, alpha=0, change=1)
    kept = select_frames(features.view(1, 80, 24), None, 28, 5, config, NO_TEXT).kept[0].tolist()
    assert {48 + int(place) for place in corner} <= set(kept)
    assert {64 + int(place) for place in corner} <= set(kept)  # what was there before has come back
    assert len([token for token in kept if token >= 48]) < 12


def test_change_has_no_scale():
    features, _ = video()
    frames = features.view(4, 9, 12)
    torch.testing.assert_close(change(frames), plain_change(frames).float())
    torch.testing.assert_close(change(frames * 50), change(frames))
    narrow = F.normalize(frames, dim=-1) + torch.cat([torch.zeros(11), torch.full((1,), 30.0)])
    assert F.cosine_similarity(narrow[1:], narrow[:-1], dim=-1).min() > 0.99
    torch.testing.assert_close(change(narrow), change(frames), rtol=0.5, atol=0.02)
    assert change(torch.ones(3, 4, 5))[1:].max() < 0.05
    assert torch.equal(change(frames[:1].repeat(3, 1, 1))[1:], torch.full((2, 9), LEAST_CHANGE))
    assert torch.equal(change(torch.zeros(3, 4, 5))[0], torch.ones(4))


def test_one_frame_is_chosen_from_as_an_image():
    features, semantic = video(frames=1, tokens=30)
    for how in WAYS:
        plain = ReadConfig(8, visual_select=how)
        found = select_frames(features, semantic, 8, 1, plain.changed(change=1), NO_TEXT)
        assert torch.equal(found.kept, select(features, semantic, 8, plain).kept)


def chosen(model, inputs, **settings):
    with torch.no_grad(), turbovlm.apply(model, **{"visual_keep": 0.4, **SHARED, **settings}) as handle:
        model(**inputs)
        return [selection.kept[0].tolist() for selection in handle.visual]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
@torch.no_grad()
def test_batches_beams_and_images_beside(name):
    family, rows = FILMS[name]
    model = seeded(family.make)
    inputs = family.inputs(*rows)
    image, *videos = chosen(model, inputs)
    assert [image] == chosen(model, family.inputs([7, "image", 8]), change=0)
    assert videos != chosen(model, inputs, change=0)[1:]
    pixels, sizes = inputs["pixel_values_videos"], inputs.get("video_grid_thw")
    ends = [0, *range(1, 4)] if sizes is None else [0, *sizes.prod(1).cumsum(0).tolist()]
    for i, wanted in enumerate(videos):
        one = replace(family, video=lambda _, i=i: family.video(i)).inputs([5, "video"])
        assert torch.equal(one["pixel_values_videos"], pixels[ends[i] : ends[i + 1]])
        assert chosen(model, one) == [wanted]
    with turbovlm.apply(model, visual_keep=0.4, **SHARED) as handle:
        generated(model, inputs, num_beams=2)
        assert [each.kept[0].tolist() for each in handle.visual] == [image] * 2 + [videos[0]] * 2 + videos[1:] * 2


INTERN, INTERN_ROWS = FILMS["internvl"]


@torch.no_grad()
def test_images_that_are_frames():
    """InternVL's videos are images of the prompt: those that stand alone, one after another, each as large."""
    model = seeded(internvl)
    inputs = INTERN.inputs(*INTERN_ROWS)
    three, two = chosen(model, inputs)
    joined = torch.stack([*model.model.get_image_features(inputs["pixel_values"]).pooler_output])
    with torch.no_grad(), turbovlm.apply(model, visual_keep=0.4, **SHARED, alpha=0, reduce="prune") as handle:
        model(**inputs)
        for selection, frames in zip(handle.visual, (joined[:3], joined[3:]), strict=True):
            features = frames.flatten(0, 1).unsqueeze(0)
            k = selection.kept.shape[1]
            wanted = select_frames(features, None, k, len(frames), handle.configs[0], NO_TEXT)
            assert torch.equal(wanted.kept, selection.kept)
    first = INTERN.inputs(INTERN_ROWS[0])
    assert chosen(model, first) == [three]
    tiles, plain = Vlm(internvl, VLMS["internvl"].image), {"change": 0}
    for row in (
        [5, "image", "image", 6, "image", 7],
        [5, "image", 6],
        [5, 6, "image", "image"],
    ):  # tiles, and one image
        inputs = tiles.inputs(row)
        assert chosen(model, inputs) == chosen(model, inputs, **plain)
    apart = tiles.inputs([5, "image", 6, "image", 7, "image", "image"], ["image", 4])  # two frames, two tiles, an image
    assert [len(tokens) for tokens in chosen(model, apart)] == [13, 6, 6, 6]
    with turbovlm.apply(model, visual_keep=0.4, **SHARED) as handle:
        generated(model, INTERN.inputs(*INTERN_ROWS), num_beams=2)
        assert [each.kept[0].tolist() for each in handle.visual] == [three] * 2 + [two] * 2


@torch.no_grad()
def test_every_frame_is_read_where_there_are_enough_tokens():
    family, _ = FILMS["llava_next_video"]
    family = replace(family, video=lambda index: pooled(5))
    model = seeded(family.make)
    inputs = family.inputs([5, "video", 7])
    for keep, frames in ((5, 5), (9, 5), (3, 3)):
        (kept,) = chosen(model, inputs, visual_keep=keep)
        assert len(kept) == keep and len({token // 9 for token in kept}) == frames
    assert chosen(model, inputs, visual_keep=1.0) == [list(range(45))]
    assert len(chosen(model, inputs, visual_keep=0.1, min_visual_tokens=12)[0]) == 12


def pooled(frames):
    return [91] * (9 * frames), {"pixel_values_videos": noise(50, 1, frames, 3, 48, 48)}


@torch.no_grad()
def test_deepstack_and_time_follow_the_frames():
    """A frame's placeholders stand behind its time in the prompt: columns are dropped where the choice says so."""
    family, _ = FILMS["qwen3_vl"]
    model = seeded(family.make)
    inputs = family.inputs([5, "video", 7])
    still = inputs["pixel_values_videos"][:32]
    inputs["pixel_values_videos"] = torch.cat([still, still, still])
    model.model.visual.pos_embed.weight.zero_()
    with turbovlm.apply(model, visual_keep=10, **SHARED) as handle:
        model(**inputs)
        gone = dropped(handle, inputs, family)[0]
    ids = inputs["input_ids"][0]
    frame = (torch.isin(ids, torch.tensor([20, 21, 22]))).cumsum(0)
    stays = (ids == 91) & ~gone
    assert frame[stays].bincount(minlength=4).tolist() == [0, 8, 1, 1]


@torch.no_grad()
def test_frames_that_are_not_known_are_an_error(monkeypatch):
    family, rows = FILMS["qwen2_5_vl"]
    model = seeded(family.make)
    inputs = family.inputs(*rows)
    pixels = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    encoded = model.model.get_video_features(**pixels)
    given = {name: value for name, value in inputs.items() if name not in ("pixel_values", *list(pixels)[:1])}
    given["mm_encoder_outputs"] = {"video": encoded}
    monkeypatch.setattr(model.model.language_model, "forward", lambda **inputs: pytest.fail("it has run"))
    with turbovlm.apply(model, visual_keep=0.4, **SHARED, alpha=0):
        images = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        given["mm_encoder_outputs"] = {"image": images, "video": encoded}
        with pytest.raises(StateError, match=r"change=1: encoded videos come without .*get_video_features"):
            model(**given)
        known = model.model.get_video_features(**pixels)
        known._turbovlm_grids = [grid * 7 for grid in known._turbovlm_grids]
        with pytest.raises(StateError, match=r"change=1: 24 visual tokens are not those of 21 frames"):
            model(**{**given, "mm_encoder_outputs": {"image": images, "video": known}})
    monkeypatch.undo()
    with turbovlm.apply(model, visual_keep=0.4, **SHARED, alpha=0) as handle:
        wanted = model(**inputs).logits
        told = copy.copy(given) | {
            "mm_encoder_outputs": {"image": images, "video": model.model.get_video_features(**pixels)}
        }
        torch.testing.assert_close(model(**told).logits, wanted)
        assert len(handle.visual) == 4


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_families_without_frames_say_so(name):
    with pytest.raises(ConfigError, match=r"change=1: which visual tokens are of which frame is not known of"):
        turbovlm.apply(seeded(VLMS[name].make), visual_keep=0.5, **SHARED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visual_select": "information"}, "visual_select='information' knows no frames; coverage, mmr and dpp can"),
        ({"visual_select": "uniform"}, "visual_select='uniform' knows no frames"),
        ({"visual_select": "diversity"}, "visual_select='diversity' weighs all tokens alike"),
        ({"visual_select": len}, "a callable decides itself"),
        ({"visual_select": "dpp", "visual_tolerance": 0.1}, "visual_tolerance=0.1: .* change says how many"),
        ({"visual_select": "dpp", "visual_keep": None, "cross_keep": 0.5}, "it belongs to visual_keep"),
    ],
)
def test_change_without_effect_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReadConfig(**{"visual_keep": 0.5, "change": 1, **settings})
    with pytest.raises(ConfigError, match=r"change=-1: must be a number ≥ 0"):
        ReadConfig(0.5, visual_select="dpp", change=-1)
