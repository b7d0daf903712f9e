"""Windows in one call: the outputs are the library's, in fewer calls, and nothing stays behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import turbovlm
from turbovlm import TurboError, UnsupportedModelError
from turbovlm.ops.segments import segments_from, segments_of
from vlms import VLMS, noise, seeded

pytest.importorskip("transformers")
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
GRIDS = {
    "one": [[1, 8, 8]],
    "ragged edges": [[1, 10, 14]],
    "several images": [[1, 8, 8], [1, 4, 12], [1, 8, 8], [1, 2, 2]],
    "video and image": [[3, 6, 10], [1, 6, 10]],
}


def glm4v():
    from transformers import Glm4vConfig, Glm4vModel

    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 160000}
    return Glm4vModel(Glm4vConfig(vision_config=vision | {"image_size": 56}, text_config=text))


MAKE = {name: VLMS[name].make for name in FAMILIES} | {"glm4v": glm4v}


def tower_of(name, attention="sdpa"):
    model = seeded(MAKE[name])
    tower = model.visual if hasattr(model, "visual") else model.model.visual
    tower.set_attn_implementation(attention)
    return tower


def encode(tower, grid):
    grid = torch.tensor(grid)
    weight = tower.patch_embed.proj.weight
    pixels = noise(0, int(grid.prod(1).sum()), weight[0].numel()).to(weight.dtype)
    return tower(pixels, grid_thw=grid).pooler_output


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_the_numbers_are_the_librarys(name, attention):
    tower = tower_of(name, attention)
    grids = [grid for grid in GRIDS if name != "glm4v" or "video" not in grid]  # it takes frames as images
    before = {grid: encode(tower, GRIDS[grid]) for grid in grids}
    attributes = {path: set(module.__dict__) for path, module in tower.named_modules()}
    handle = turbovlm.batch_windows(tower)
    for grid, wanted in before.items():
        torch.testing.assert_close(encode(tower, GRIDS[grid]), wanted, rtol=0, atol=1e-6)
    handle.remove()
    assert {path: set(module.__dict__) for path, module in tower.named_modules()} == attributes
    for grid, wanted in before.items():
        assert torch.equal(encode(tower, GRIDS[grid]), wanted)


def calls(tower, grid, monkeypatch):
    """How often attention is called in one forward of a tower."""
    found = []
    attend = F.scaled_dot_product_attention
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", lambda *a, **k: found.append(1) or attend(*a, **k))
        encode(tower, grid)
    return len(found)


@torch.no_grad()
def test_one_call_for_each_length(monkeypatch):
    tower = tower_of("qwen2_5_vl")  # 4 blocks, of which 2 attend within windows of 4×4 patches
    assert calls(tower, GRIDS["ragged edges"], monkeypatch) == 2 * 12 + 2
    with turbovlm.batch_windows(tower) as handle:
        assert calls(tower, GRIDS["ragged edges"], monkeypatch) == 2 * 3 + 2  # whole ones, edges, corner
        assert calls(tower, GRIDS["one"], monkeypatch) == 2 + 2
        assert calls(tower, GRIDS["video and image"], monkeypatch) == 2 * 3 + 2
    assert "blocks.0.attn" in str(handle) and "4 attentions" in str(handle)


@pytest.mark.parametrize("first", ["windows", "apply"])
@torch.no_grad()
def test_beside_what_apply_does(first):
    family = VLMS["qwen2_5_vl"]
    model = seeded(family.make)
    inputs = family.inputs([5, "image", 6, "video", 7], ["image", 8])
    plain = model(**inputs).logits
    with turbovlm.apply(model, visual_keep=0.5):
        wanted = model(**inputs).logits
    ways = {"windows": lambda: turbovlm.batch_windows(model), "apply": lambda: turbovlm.apply(model, visual_keep=0.5)}
    handles = {name: ways[name]() for name in sorted(ways, key=lambda name: name != first)}
    torch.testing.assert_close(model(**inputs).logits, wanted, rtol=0, atol=1e-5)
    with pytest.raises(TurboError, match="accelerated already"):
        turbovlm.apply(model, visual_keep=0.5)
    handles[first].remove()
    assert not handles[first].active
    other = next(name for name in ways if name != first)
    torch.testing.assert_close(model(**inputs).logits, wanted if first == "windows" else plain, rtol=0, atol=1e-5)
    handles[other].remove()
    assert torch.equal(model(**inputs).logits, plain)


def test_copies_and_gradients():
    tower = tower_of("qwen2_5_vl")
    encode(tower, GRIDS["several images"]).sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}
    turbovlm.batch_windows(tower)
    for twin in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        twin.zero_grad()
        encode(twin, GRIDS["several images"]).sum().backward()
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)
        turbovlm.get_handle(twin).remove()
        assert not any("forward" in module.__dict__ for module in twin.modules())


def test_what_cannot_be_batched():
    with pytest.raises(UnsupportedModelError, match=r"attends segment by segment.*qwen2_5_vl"):
        turbovlm.batch_windows(torch.nn.Linear(2, 2))
    tower = tower_of("qwen2_5_vl")
    with turbovlm.batch_windows(tower), pytest.raises(TurboError, match="batched already"):
        turbovlm.batch_windows(tower)
    tower.blocks[1].attn.forward = lambda hidden, **kwargs: hidden
    with pytest.raises(TurboError, match=r"blocks\.1\.attn has a forward of its own"):
        turbovlm.batch_windows(tower)


def test_an_attention_that_computes_something_else_is_refused(monkeypatch):
    tower = tower_of("qwen3_vl")
    attention = type(tower.blocks[0].attn)
    own = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **kwargs: 2 * own(self, *args, **kwargs))
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        turbovlm.batch_windows(tower)


def test_segments():
    bounds = torch.tensor([0, 2, 5, 5, 7])
    found = segments_of(bounds)
    assert found is segments_of(bounds) and found.lengths == (2, 3, 2) and found.groups == ((2, 2), (1, 3))
    x = torch.randn(1, 4, 7, 3)
    parts = found.split(x)
    assert torch.equal(parts[0][1], x[0, :, 5:]) and torch.equal(parts[1][0], x[0, :, 2:5])
    assert torch.equal(found.join([part.transpose(1, 2) for part in parts]), x.transpose(1, 2))
    assert segments_from([3, 3], torch.device("cpu")).order is None


def test_bounds_that_change_in_place_are_read_again():
    """As in static buffers, which one graph reads for all images."""
    from turbovlm.ops.segments import segments_of, shortened

    bounds, kept = torch.tensor([0, 4, 8]), torch.tensor([[0, 1, 5]])
    assert segments_of(bounds).lengths == (4, 4) and shortened(bounds, kept).lengths == (2, 1)
    assert segments_of(bounds) is segments_of(bounds)
    bounds.copy_(torch.tensor([0, 1, 8]))
    assert segments_of(bounds).lengths == (1, 7) and shortened(bounds, kept).lengths == (1, 2)
