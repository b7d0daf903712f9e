"""Towers whose reader joins squares of patches: packed sequences, with windows and rotary positions, and others."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

import reference
import turbovlm
from turbovlm import ConfigError, StateError, TurboConfig, UnsupportedModelError
from turbovlm.vlm.tower import packed_row
from vlms import VLMS, noise, seeded

pytest.importorskip("transformers")
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SQUARE = ("internvl", "idefics3", "smolvlm", "gemma3")
GRID = [[1, 8, 8], [1, 4, 12], [2, 4, 8], [1, 8, 8]]
"""Two images of one size, a wide one, and a video of two frames."""


def tower_of(name, dtype=torch.float32):
    return seeded(VLMS[name].make).model.visual.to(dtype)


def pixels_of(tower, grid, seed=0):
    weight = tower.patch_embed.proj.weight
    count = sum(frames * rows * columns for frames, rows, columns in grid)
    return noise(seed, count, weight[0].numel()).to(weight.dtype)


def encoded(tower, pixels, grid, **known):
    """All that a packed tower gives: visual tokens, and those of other blocks."""
    out = tower(pixels, grid_thw=torch.tensor(grid), **known)
    return [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]


def equal(found, wanted, **tolerance):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **({"rtol": 0, "atol": 0} | tolerance))


@pytest.mark.parametrize("name", PACKED + SQUARE)
@torch.no_grad()
def test_nothing_merged_and_nothing_left_behind(name):
    family = VLMS[name]
    model = seeded(family.make)
    inputs = family.inputs([5, "image", 6, "image"], ["image", 8])
    plain = model(**inputs).logits
    attributes = {path: set(module.__dict__) for path, module in model.named_modules()}
    for settings in ({"r": 0}, {"keep": 1.0}):
        with turbovlm.apply(model, **settings):
            assert torch.equal(model(**inputs).logits, plain)
    with turbovlm.apply(model, keep=0.5, partition="cells") as handle:
        merged = model(**inputs).logits
        left = handle.features[0].last.lengths
        assert left[-1] < left[0] and handle.features[0].shape.unit == 4
        assert all((a - b) % 4 == 0 for a, b in itertools.pairwise(left))
    with turbovlm.apply(model, keep=0.5) as handle:
        found = model(**inputs).logits
        assert not torch.equal(found, plain) and not torch.equal(found, merged)
        assert handle.features[0].last.lengths[-1] < handle.features[0].last.lengths[0]
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, found)
        if name in PACKED:  # hooks that transformers leaves in some others do not pickle
            assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, found)
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == attributes
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    "settings", [{"keep": 0.5}, {"keep": 0.5, "partition": "cells"}, {"r": 4, "partition": "random"}], ids=str
)
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_images_stay_apart(name, settings):
    """In one sequence each image comes to what it comes to alone, and a video's frame to what a frame does."""
    tower = tower_of(name)
    pixels = pixels_of(tower, GRID)
    with turbovlm.apply(tower, **settings) as handle:
        together = encoded(tower, pixels, GRID)
        assert handle.features[0].last.lengths[-1] < len(pixels)
        start, alone = 0, []
        for frames, rows, columns in GRID:
            for _ in range(frames):
                alone.append(encoded(tower, pixels[start : start + rows * columns], [[1, rows, columns]]))
                start += rows * columns
    equal(together, [torch.cat(parts) for parts in zip(*alone)], atol=1e-6)


def doubled(tower, grid):
    """Pixels with every cell of the images twice, at the place where it is, and what the tower would work out of it."""
    from transformers import vision_utils as utils

    def twice(x):
        return x.view(-1, 4, *x.shape[1:]).repeat_interleave(2, dim=0).flatten(0, 1)

    sizes = torch.tensor(grid)
    known = {"position_ids": twice(utils.get_vision_position_ids(sizes, 2))}
    known["cu_seqlens"] = 2 * utils.get_vision_cu_seqlens(sizes)
    if hasattr(tower, "window_size"):
        window = {"window_size": tower.window_size, "patch_size": tower.patch_size}
        index, bounds = utils.get_vision_window_index(sizes, spatial_merge_size=2, **window)
        known |= {"window_index": (2 * index.unsqueeze(1) + torch.arange(2)).flatten(), "cu_window_seqlens": 2 * bounds}
    if hasattr(tower, "num_grid_per_side"):
        found = utils.get_vision_interpolation_indices_and_weights(
            sizes, tower.num_grid_per_side, align_corners=True, spatial_merge_size=2
        )
        known |= dict(zip(("interp_indices", "interp_weights"), map(twice, found)))
    return twice(pixels_of(tower, grid)), known


@pytest.mark.parametrize("partition", ["all", "cells"])
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_doubled_tokens_count_twice(name, partition):
    """Every cell stands twice at one place; its two tokens merge, and nothing changes."""
    tower, grid = tower_of(name), GRID[:2]
    wanted = encoded(tower, pixels_of(tower, grid), grid)
    pixels, known = doubled(tower, grid)
    depth, first = len(tower.blocks), 1 if name == "qwen2_5_vl" else 0
    settings = {"partition": partition, "reduce": "merge", "restore": "copy"}
    with turbovlm.apply(tower, keep=0.5, blocks=(first,), **settings) as handle:
        found = encoded(tower, pixels, grid, **known)
        assert handle.features[0].last.lengths == (len(pixels),) * (first + 1) + (len(pixels) // 2,) * (depth - first)
    equal([each[::2] for each in found], wanted, atol=1e-5)
    equal([each[1::2] for each in found], wanted, atol=1e-5)


@pytest.mark.parametrize("name", SQUARE)
@torch.no_grad()
def test_equal_cells_merge_without_a_change(name):
    """Cells of one image that are equal, pair by pair, before a block."""
    family = VLMS[name]
    model = seeded(family.make)
    inputs = family.inputs(["image", 6, "image"])
    tower = model.model.vision_model if hasattr(model.model, "vision_model") else model.model.vision_tower
    blocks = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    prefix = int(name == "internvl")

    def make_equal(block, args):
        hidden = args[0].clone()
        side = int((hidden.shape[1] - prefix) ** 0.5) // 2
        image = hidden[:, prefix:].view(len(hidden), side, 2, side, 2, -1)
        image[:, :, :, 1::2] = image[:, :, :, : side - side % 2 : 2]
        return (hidden, *args[1:])

    hook = blocks[0].register_forward_pre_hook(make_equal)
    wanted = model(**inputs).logits
    settings = {"partition": "cells", "reduce": "merge", "restore": "copy"}
    with turbovlm.apply(model, r=[12] + [0] * (len(blocks) - 1), **settings) as handle:
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=0, atol=1e-5)
        assert handle.features[0].last.lengths[-1] == handle.features[0].last.lengths[0] - 12
    hook.remove()


def by_hand(tower, pixels, grid, r, unit):
    """A packed tower in plain lines: one image after the other, no code of the library; `r` cells go in some blocks.

    Cells of four merge any into any other, of one even into odd; by size, and every position gets its token back.
    """
    calls = []
    hooks = [b.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True) for b in tower.blocks]
    encoded(tower, pixels, grid)
    for hook in hooks:
        hook.remove()
    all_tokens, angles = calls[0][0][0], calls[0][1]["position_embeddings"]
    rotate = __import__(type(tower).__module__, fromlist=["x"]).apply_rotary_pos_emb_vision
    bounds = torch.tensor([rows * columns for frames, rows, columns in grid for _ in range(frames)]).cumsum(0).tolist()
    found = []
    for begin, end in zip([0, *bounds], bounds):
        x, place = all_tokens[begin:end], torch.arange(begin, end)
        s, source = torch.ones(len(x)).double(), torch.arange(len(x))
        for index, block in enumerate(tower.blocks):
            h, attention = block.norm1(x), block.attn
            q, key, v = attention.qkv(h).view(len(x), 3, attention.num_heads, -1).unbind(1)
            content = key.flatten(1)
            q, key = rotate(q, key, angles[0][place], angles[1][place])
            q, key, v = (each.transpose(0, 1) for each in (q, key, v))
            window = (place.unsqueeze(1) >= calls[index][1]["cu_seqlens"]).sum(1)
            mixed = torch.empty_like(q)
            for each in window.unique():
                at = window == each
                mixed[:, at] = reference.attention(q[:, at], key[:, at], v[:, at], s[at], attention.scaling)
            x = x + attention.proj(mixed.transpose(0, 1).flatten(1))
            if index in r:
                cells = len(x) // unit
                guide = reference.guide_of(q, s, 0, "mean")
                A = reference.semantic_value(guide, key, s, attention.scaling).view(cells, unit).sum(1)
                every, step = list(range(cells)), 2 if unit == 1 else 1
                halves = [(every[::step], every[step - 1 :: step])]
                R, partner = reference.mutual_redundancy(content.reshape(cells, -1), halves)
                E = reference.DEGREES["weighted_distance"](torch.stack(list(R.values())), A[list(R)], 1.0)
                into = {list(R)[i]: partner[list(R)[i]] for i in E.argsort(descending=True)[: r[index]].tolist()}
                if unit > 1:
                    into = reference.paired(dict(zip(R, E)), partner, r[index])
                tokens = {unit * i + at: unit * j + at for i, j in into.items() for at in range(unit)}
                _, x, s, merged = reference.merge(x, s, tokens, halves, "spatial", "merge")
                place, source = place[[i for i in range(len(place)) if i not in tokens]], merged[source]
            x = x + block.mlp(block.norm2(x))
        found.append(x[source])
    return torch.cat(found)


@pytest.mark.parametrize("partition", ["alternate", "cells"])
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_against_plain_lines(name, partition):
    tower = tower_of(name, torch.float64)
    pixels, depth = pixels_of(tower, GRID), len(tower.blocks)
    r = {1: 3, 3: 1} if name == "qwen2_5_vl" else {0: 2, depth - 2: 1}
    unit = 4 if partition == "cells" else 1
    amounts = [unit * r.get(block, 0) for block in range(depth)]
    wanted = by_hand(tower, pixels, GRID, r, unit)
    with turbovlm.apply(tower, r=amounts, partition=partition, reduce="merge", restore="copy"):
        found = tower(pixels, grid_thw=torch.tensor(GRID)).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_what_the_guide_has_seen(name):
    """A of merged patches: that of each image sums to 1, and those of one token share alike."""
    model = seeded(VLMS[name].make)
    inputs = VLMS[name].inputs([5, "image", 6, "video", 7], ["image", 8])
    with turbovlm.apply(model, keep=0.5, visual_keep=0.5, guidance="mean") as handle:
        seen = []
        guide = model.model.visual.blocks[-1]
        spelled = handle.features[1].family.packed
        hook = guide.register_forward_pre_hook(
            lambda m, a, k: seen.append(packed_row(m, spelled, a[0], k)), with_kwargs=True
        )
        out = model(**inputs).logits
        hook.remove()
        assert torch.isfinite(out).all() and len(handle.visual) == 3
    for row in seen:  # images, and the frames of the video
        assert row.sum().item() == pytest.approx(round(row.sum().item()), abs=1e-4) and row.min() > 0
        assert len(row.unique()) < len(row)
    with turbovlm.apply(model, visual_keep=0.5):
        wanted = model(**inputs).logits
    with turbovlm.apply(model, r=0, visual_keep=0.5):
        assert torch.equal(model(**inputs).logits, wanted)


@torch.no_grad()
def test_beside_batched_windows():
    tower = tower_of("qwen2_5_vl")
    pixels = pixels_of(tower, GRID)
    with turbovlm.apply(tower, keep=0.5):
        wanted = encoded(tower, pixels, GRID)
        with turbovlm.batch_windows(tower):
            equal(encoded(tower, pixels, GRID), wanted, atol=1e-6)
        equal(encoded(tower, pixels, GRID), wanted)


def test_gradients_and_hooks():
    tower = tower_of("qwen3_vl")
    shapes = []
    tower.blocks[1].attn.register_forward_hook(
        lambda module, args, output: shapes.append((args[0].shape, output.shape))
    )
    with turbovlm.apply(tower, keep=0.5):
        encoded(tower, pixels_of(tower, GRID), GRID)[0].sum().backward()
    assert len(shapes) == 1 and shapes[0][0] == shapes[0][1] and len(shapes[0][0]) == 2
    assert all(parameter.grad is not None for block in tower.blocks for parameter in block.parameters())


@torch.no_grad()
def test_what_is_not_possible():
    tower = tower_of("qwen2_5_vl")
    for settings, message in (
        ({"r": [0, 6, 0, 0], "partition": "cells"}, "give multiples of 4"),
        ({"keep": 0.5, "blocks": (0, 1)}, r"block 0 of .* attends within windows; tokens merge in \[1, 3\]"),
        ({"r": [4, 0, 0, 0]}, "block 0 of"),
        ({"keep": 0.5, "partition": "grid"}, "partition='grid': merges of"),
        ({"keep": 0.5, "partition": "random", "order": "partition"}, "order='partition': merges of"),
        ({"r": 4, "trace": True}, "trace: it is not kept"),
        ({"r": [0, 4, 0, 0], "thresholds": [0.0] * 4}, "thresholds: it is not kept"),
        ({"r": 4, "guidance": "cls"}, "no CLS token"),
    ):
        with pytest.raises(ConfigError, match=message):
            turbovlm.apply(tower, TurboConfig(**settings))
    tower.fullatt_block_indexes = []
    with pytest.raises(UnsupportedModelError, match="all of its blocks attend within windows"):
        turbovlm.apply(tower, r=4)
    model = seeded(VLMS["idefics3"].make)
    inputs = VLMS["idefics3"].inputs(["image", 6])
    inputs["pixel_attention_mask"] = torch.ones(1, 1, 48, 48, dtype=torch.bool)
    inputs["pixel_attention_mask"][..., 40:] = False
    with turbovlm.apply(model, r=4, partition="cells"), pytest.raises(StateError, match="padding inside"):
        model(**inputs)
    with turbovlm.apply(model, r=4):
        model(**inputs)
    with pytest.raises(ConfigError, match=r"nothing that reads .* is known to join squares"):
        turbovlm.apply(model.model.vision_model, r=4, partition="cells")
