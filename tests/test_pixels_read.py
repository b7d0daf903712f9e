"""Cells of equal pixels, left out before the towers of Qwen's models and not read by their language models."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import reference
import turbovlm
from turbovlm import ConfigError, ReadConfig, StateError, UnsupportedModelError
from turbovlm.encoder import entrance
from turbovlm.ops.pixels import predicted_in_sequence
from vlms import PAD, VLMS, dropped, full_positions, generated, made, masked_forward, masked_generate, noise, seeded

pytest.importorskip("transformers")
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ROWS = [[5, 6, "image", 7, "video", 8], [3, 4, 5, 6], [7, "image", 9, 10, "image", 11]]
"""Ragged, with images of three sizes and a video, beside a prompt of text."""
PIXELS = ("pixel_values", "pixel_values_videos")


def drawn(inputs, family, kinds=3):
    """The same inputs with images of a few kinds of cells; the second image is white, the third stays a photo."""
    found = dict(inputs)
    for seed, name in enumerate(name for name in PIXELS if name in inputs):
        cells = inputs[name].reshape(-1, 4 * inputs[name].shape[1])
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(kinds, (len(cells),), generator=generator)
        page = cells[:kinds][which]
        if name == "pixel_values" and len(inputs["image_grid_thw"]) == 3:
            counts = (inputs["image_grid_thw"].prod(1) // 4).tolist()
            first, second, _ = page.split(counts)
            page = torch.cat([first, second[:1].expand_as(second), cells[-counts[2] :]])
        found[name] = page.reshape_as(inputs[name])
    return found


def encoded_apart(model, inputs):
    """The inputs with images as this model encodes them, `pixel_values` taken out."""
    call = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
    found = {k: v for k, v in inputs.items() if k not in PIXELS}
    found["mm_encoder_outputs"] = {
        modality: getattr(model.model, f"get_{modality}_features")(*(inputs[name] for name in names), return_dict=True)
        for modality, names in call.items()
        if names[0] in inputs
    }
    return found


SETTINGS = {
    "alone": {},
    "half of them": {"visual_keep": 0.5, "reduce": "prune"},
    "merged on": {"r": 4},
    "both": {"keep": 0.7, "visual_keep": 0.5, "reduce": "prune", "visual_select": "coverage"},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_left_out_equals_masked(name, settings):
    family, model = made(name)
    inputs = drawn(family.inputs(*ROWS), family)
    positions = full_positions(model, inputs, family)
    with turbovlm.apply(model, pixel_tolerance=0, **SETTINGS[settings]) as handle:
        logits = model(**inputs, position_ids=positions).logits
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=1e-5)
        gone = dropped(handle, inputs, family)
        beams = generated(model, inputs, num_beams=2)
        tokens = generated(model, inputs)
        apart = encoded_apart(model, inputs)
        torch.testing.assert_close(model(**apart, position_ids=positions).logits, logits, rtol=0, atol=1e-5)
        again = encoded_apart(model, inputs)  # which beams repeat in place
        assert torch.equal(generated(model, again, num_beams=2), beams)
    assert gone[0].any() and not gone[1].any() and gone[2].any()
    seen = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(logits[seen], masked_forward(model, apart, gone, family)[seen], rtol=0, atol=1e-4)
    assert torch.equal(tokens, masked_generate(model, apart, gone, family))


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_which_are_read(name):
    """Those that stand for others; of these, as many as `visual_keep` says of all; and others count into theirs."""
    family, model = made(name)
    inputs = drawn(family.inputs(*ROWS), family)
    grids = torch.cat([inputs["image_grid_thw"], inputs["video_grid_thw"]]) // torch.tensor([1, 2, 2])
    cells = torch.cat([inputs[name].reshape(-1, 4 * inputs[name].shape[1]) for name in PIXELS])
    within = 2 if name == "qwen2_5_vl" else 0
    standing = predicted_in_sequence(cells, grids, 0, within)
    counts = grids.prod(1).tolist()
    with turbovlm.apply(model, pixel_tolerance=0) as handle:
        model(**inputs)
        first = 0
        for selection, image in zip(handle.visual, standing.split(counts), strict=True):
            assert torch.equal(selection.kept[0], (image - first).unique())
            assert torch.equal(selection.kept[0][selection.destination[0]], image - first)
            assert selection.weights.sum() == selection.kept.shape[1]
            first += len(image)
        left = [selection.kept.shape[1] for selection in handle.visual]
        assert left[1] == len(standing.split(counts)[1].unique()) and left[2] == counts[2]
        assert f"last forward: {4 * counts[-1]} → {4 * left[-1]} patches" in str(handle)
        assert f"{left[0]} of {counts[0]}, {left[1]} of {counts[1]}" in str(handle)
    for keep in (0.25, 0.5, 3, 1.0):
        with turbovlm.apply(model, pixel_tolerance=0, visual_keep=keep) as handle:
            model(**inputs)
            wanted = [keep if type(keep) is int else int(keep * n + 0.5) for n in counts]
            assert [each.kept.shape[1] for each in handle.visual] == list(map(min, wanted, left))


def by_hand(tower, pixels, grid, within):
    """A packed tower in plain lines on the patches that are left."""
    calls = []
    hooks = [b.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True) for b in tower.blocks]
    tower(pixels, grid_thw=grid)
    for hook in hooks:
        hook.remove()
    cells = predicted_in_sequence(pixels.reshape(len(pixels) // 4, -1), grid // torch.tensor([1, 2, 2]), 0, within)
    order = torch.arange(len(cells))
    if within:
        from transformers.vision_utils import get_vision_window_index

        order = get_vision_window_index(grid, 2, tower.window_size, tower.patch_size)[0]
    place = {int(cell): i for i, cell in enumerate(order)}
    source = torch.tensor([4 * place[int(cells[cell])] + k for cell in order for k in range(4)])
    kept = source.unique()
    sizes = torch.ones(len(kept)).double()
    x, angles = calls[0][0][0][kept], calls[0][1]["position_embeddings"]
    rotate = __import__(type(tower).__module__, fromlist=["x"]).apply_rotary_pos_emb_vision
    for block, (_, known) in zip(tower.blocks, calls):
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(x)).view(len(x), 3, attention.num_heads, -1).unbind(1)
        q, k = rotate(q, k, angles[0][kept], angles[1][kept])
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        segment, mixed = (kept.unsqueeze(1) >= known["cu_seqlens"]).sum(1), torch.empty_like(q)
        for each in segment.unique():
            at = segment == each
            mixed[:, at] = reference.attention(q[:, at], k[:, at], v[:, at], sizes[at], attention.scaling)
        x = x + attention.proj(mixed.transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
    return x[torch.searchsorted(kept, source)]


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_the_tower_against_plain_lines(name):
    family, model = made(name)
    tower = model.model.visual.double()
    inputs = drawn(family.inputs(*ROWS), family)
    pixels, grid = inputs["pixel_values"].double(), inputs["image_grid_thw"]
    wanted = by_hand(tower, pixels, grid, 2 if name == "qwen2_5_vl" else 0)
    with turbovlm.apply(model, pixel_tolerance=0) as handle:
        found = model.model.get_image_features(pixels, grid, return_dict=True)
        lengths = handle.features[0].last.lengths
    torch.testing.assert_close(found.last_hidden_state, wanted, rtol=0, atol=1e-9)
    assert lengths[0] == len(pixels) and {*lengths[1:]} == {lengths[1]} and lengths[1] < lengths[0]


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_without_equal_cells_the_model_is_itself(name):
    family, model = made(name)
    inputs = family.inputs(*ROWS)
    attributes = {path: set(module.__dict__) for path, module in model.named_modules()}
    before, tokens = model(**inputs).logits, generated(model, inputs)
    page = drawn(inputs, family)
    plain = model(**page).logits
    handle = turbovlm.apply(model, pixel_tolerance=0)
    assert torch.equal(model(**inputs).logits, before) and torch.equal(generated(model, inputs), tokens)
    found = model(**page).logits
    assert not torch.equal(found, plain)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**page).logits, found)
        assert turbovlm.get_handle(twin).config == ReadConfig(pixel_tolerance=0)
    handle.remove()
    assert torch.equal(model(**page).logits, plain)
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == attributes


@torch.no_grad()
def test_pixels_that_change_in_place():
    family, model = made("qwen3_vl")
    inputs = family.inputs([5, "image", 6])
    page = drawn(inputs, family, kinds=1)
    with turbovlm.apply(model, pixel_tolerance=0) as handle:
        for pixels, left in ((page, 1), (inputs, 16), (page, 1)):
            wanted = model(**pixels).logits
            buffer = inputs["pixel_values"].clone() if left == 1 else buffer  # noqa: F821
            buffer.copy_(pixels["pixel_values"])
            assert torch.equal(model(**{**inputs, "pixel_values": buffer}).logits, wanted)
            assert handle.visual[0].kept.shape[1] == left


@torch.no_grad()
def test_a_tolerance_is_of_what_the_model_gets():
    family, model = made("qwen3_vl")
    inputs = family.inputs([5, "image", 6])
    steps = torch.arange(16).repeat_interleave(4).unsqueeze(1) / 8  # a ramp, row after row of four cells
    inputs["pixel_values"] = steps.expand_as(inputs["pixel_values"]).contiguous()
    for tolerance, left in ((0, 16), (0.125, 8), (0.25, 8), (0.5, 4), (2, 1)):
        with turbovlm.apply(model, pixel_tolerance=tolerance) as handle:
            model(**inputs)
            assert handle.visual[0].kept.shape[1] == left


@pytest.mark.parametrize(("settings", "less"), [({"keep": 0.5}, 0.5), ({"keep": 0.75}, 0.75), ({"r": [4, 0, 4]}, None)])
@torch.no_grad()
def test_shares_are_of_what_is_left(settings, less):
    family, model = made("qwen2_vl")
    inputs = drawn(family.inputs([5, "image", 6]), family, kinds=5)
    with turbovlm.apply(model, pixel_tolerance=0, **settings) as handle:
        model(**inputs)
        left = 4 * handle.visual[0].kept.shape[1]
        assert left < len(inputs["pixel_values"])
        wanted = left - 8 if less is None else less * left
        assert abs(handle.features[0].last.lengths[-1] - wanted) <= 2


@torch.no_grad()
def test_selections_choose_among_those_left():
    family, model = made("qwen3_vl")
    inputs = drawn(family.inputs(*ROWS), family)
    with turbovlm.apply(model, pixel_tolerance=0) as handle:
        model(**inputs)
        left = [each.kept[0].tolist() for each in handle.visual]
    asked = []

    def first(features, attention, text, grid, *, k):
        asked.append((features.shape[1], attention.shape[1], grid))
        return torch.arange(k).expand(len(features), -1)

    for settings in (
        {"visual_select": first},
        {"visual_select": "uniform"},
        {"visual_select": "random"},
        {"visual_select": "diversity", "visual_tolerance": 0.1},
        {"visual_select": "dpp", "question": 1},
        {"visual_select": "coverage", "change": 1},
        {"min_visual_tokens": 100},
    ):
        with turbovlm.apply(model, pixel_tolerance=0, visual_keep=0.3, **settings) as handle:
            model(**inputs)
            for selection, those in zip(handle.visual, left, strict=True):
                assert {*selection.kept[0].tolist()} <= {*those}
                weights = torch.zeros(selection.kept.shape[1]).scatter_add(
                    0, selection.destination[0], selection.weights[0].float()
                )
                torch.testing.assert_close(weights, torch.ones_like(weights))
            if "min_visual_tokens" in settings:
                assert [each.kept.shape[1] for each in handle.visual] == list(map(len, left))
    assert sorted(n for n, _, _ in asked) == sorted({*map(len, left)}) and all(n == m for n, m, _ in asked)
    assert [grid for n, _, grid in asked if n in (8,)] == [(1, 4, 2)] or all(grid is None for *_, grid in asked)


@torch.no_grad()
def test_two_threads():
    family, model = made("qwen2_5_vl")
    plain = family.inputs([5, "image", 7, 8])
    prompts = [plain, drawn(plain, family, kinds=1), drawn(family.inputs(*ROWS), family)]
    with turbovlm.apply(model, pixel_tolerance=0), ThreadPoolExecutor(2) as pool:
        alone = [generated(model, inputs) for inputs in prompts]
        for _ in range(4):
            work = [torch.no_grad()(generated)] * len(prompts)
            found = list(pool.map(lambda run, inputs: run(model, inputs), work, prompts))
            assert all(map(torch.equal, found, alone))


@torch.no_grad()
def test_an_exception_leaves_nothing_behind():
    family, model = made("qwen3_vl")
    inputs = drawn(family.inputs([5, "image", 6]), family, kinds=2)
    with turbovlm.apply(model, pixel_tolerance=0):
        wanted = model(**inputs).logits
        for module in (model.model.visual.patch_embed, model.model.visual.blocks[1]):
            hook = module.register_forward_hook(lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**inputs)
            hook.remove()
            assert not entrance.is_announced()
            assert torch.equal(model(**inputs).logits, wanted)
        tower = model.model.visual  # called by others it reads all
        out = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    assert torch.equal(
        out.pooler_output, tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    )


@pytest.mark.parametrize("name", PACKED)
def test_training(name):
    family, model = made(name)
    inputs = drawn(family.inputs(*ROWS), family)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == PAD) | (inputs["input_ids"] >= 90), -100)
    model.train()

    def gradients():
        model.zero_grad(set_to_none=True)
        model(**inputs, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with turbovlm.apply(model, pixel_tolerance=0):
        wanted = gradients()
        model.gradient_checkpointing_enable()
        for one, other in zip(gradients(), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert model.model.visual.patch_embed.proj.weight.grad.any()


@pytest.mark.parametrize("what", [pytest.param("tower", marks=pytest.mark.slow), "language model"])
@torch.no_grad()
def test_compiled(what):
    family, model = made("qwen3_vl")
    inputs = drawn(family.inputs([5, "image", 7]), family)
    torch._dynamo.reset()
    with turbovlm.apply(model, pixel_tolerance=0):
        wanted = model(**inputs).logits
        part = model.model.visual if what == "tower" else model.model.language_model
        part.forward = torch.compile(part.forward, backend="eager")
        found = model(**inputs).logits
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    config = ReadConfig(0.5, pixel_tolerance=0.02)
    config.save(tmp_path / "settings.json")
    assert ReadConfig.load(tmp_path / "settings.json") == config
    assert ReadConfig(pixel_tolerance=0).amount == "pixel_tolerance=0.0"
    assert turbovlm.apply(made("qwen2_vl")[1], visual_keep=0.5, pixel_tolerance=None).config == ReadConfig(0.5)


@pytest.mark.parametrize("value", [-1, -1e-9, True, "0", float("nan"), float("inf"), [0]])
def test_impossible_tolerances(value):
    with pytest.raises(ConfigError, match=r"pixel_tolerance=.*: must be a"):
        ReadConfig(pixel_tolerance=value)


@pytest.mark.parametrize(
    "settings",
    [{"visual_select": "uniform"}, {"reduce": "prune"}, {"question": 1}, {"min_visual_tokens": 3}, {"alpha": 3}],
)
def test_what_would_have_no_effect(settings):
    with pytest.raises(ConfigError, match=r"it would have no effect: .*without visual_keep"):
        ReadConfig(pixel_tolerance=0, **settings)


def test_what_cannot_be_done_says_why():
    with pytest.raises(ConfigError, match="'pooling': with pixel_tolerance"):
        ReadConfig(0.25, pixel_tolerance=0, visual_select="pooling")
    for name in ("llava", "internvl", "smolvlm", "gemma3"):
        with pytest.raises(UnsupportedModelError, match=r"tower of .* as a batch of equal length"):
            turbovlm.apply(seeded(VLMS[name].make), pixel_tolerance=0)
    family, model = made("qwen3_vl")
    with pytest.raises(ConfigError, match="proportional=False: it would have no effect"):
        turbovlm.apply(model, pixel_tolerance=0, proportional=False)
    turbovlm.apply(model, pixel_tolerance=0, r=4, proportional=False).remove()
    with pytest.raises(UnsupportedModelError, match=r"pixel_tolerance=0\.0: .* has no language model"):
        turbovlm.apply(model.model.visual, pixel_tolerance=0)
    inputs = family.inputs([5, "image", 6])
    with torch.no_grad():
        apart = encoded_apart(model, inputs)
        with turbovlm.apply(model, pixel_tolerance=0):
            with pytest.raises(StateError, match="pixel_tolerance=0: mm_encoder_outputs without what became of each"):
                model(**apart)
            with pytest.raises(StateError, match="pixel_tolerance cannot be exported"):
                torch.jit.trace(
                    lambda pixels: model.model.get_image_features(pixels, inputs["image_grid_thw"]).pooler_output[0],
                    noise(0, *inputs["pixel_values"].shape),
                    check_trace=False,
                )
