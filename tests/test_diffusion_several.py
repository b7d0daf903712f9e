"""Several images in one sequence: each on its own grid, merged within itself, by one ranking of all."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import turbovlm
from doubled import double
from equal_tokens import stand_for
from several_denoisers import SEVERAL, Grids, kontext_inputs, places, tokens
from turbovlm.diffusion.grids import grids_at
from turbovlm.errors import ConfigError, StateError, UnsupportedModelError
from turbovlm.ops.merging import Merge

diffusers = pytest.importorskip("diffusers")
SCOPES = ({"scope": "block"}, {"scope": "stack", "span": 2}, {"scope": "stack", "span": 8})
KONTEXT, QWEN = SEVERAL["kontext"], SEVERAL["qwen edit"]


@pytest.fixture(params=SEVERAL)
def several(request):
    return SEVERAL[request.param]


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def in_float64(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(in_float64, value))
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def alone(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """What a batch of two is given, for one of its sequences."""
    return {
        name: value[row : row + 1]
        if getattr(value, "ndim", 1) and isinstance(value, list | Tensor) and len(value) == 2
        else value
        for name, value in inputs.items()
    }


def spans(grids: Grids) -> list[slice]:
    """Where the tokens of each image are."""
    ends = [0]
    for grid in grids:
        ends.append(ends[-1] + math.prod(grid))
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def as_equal_tokens(model: Any, feature: Any) -> None:
    """Have the model's own blocks run on all tokens, of which those of a merged one are equal."""
    if feature.family.startswith("LTX"):
        stand_for(model, feature.places, feature.last)
    else:
        double(model, feature)


def merges_of(handle: Any) -> list[Merge]:
    return [choice.merge for choice in handle.features[0].last.values()]


@pytest.mark.parametrize("given", SCOPES, ids=str)
def test_a_stack_is_its_blocks_on_equal_tokens(several, given):
    """Sizes, positions, times of references, text and update, against the model's own blocks on all tokens."""
    model = several().double()
    inputs = {name: in_float64(value) for name, value in several.given(1).items()}
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5, restore="copy", **given) as handle:
        merged = run(model, inputs)
        feature = handle.features[0]
    assert (merged - plain).abs().max() > 1e-4 * plain.abs().max()
    as_equal_tokens(model, feature)
    torch.testing.assert_close(run(model, inputs), merged, rtol=0, atol=1e-9 * float(merged.abs().max()))


def test_merges_and_comes_back(several):
    model, inputs = several(), several.given(2)
    plain = run(model, inputs)
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    with turbovlm.apply(model, keep=1.0):
        assert torch.equal(run(model, inputs), plain)
    with turbovlm.apply(model, keep=0.5) as handle:
        merged = run(model, inputs)
        assert torch.equal(run(model, inputs), merged) and merged.isfinite().all() and merged.shape == plain.shape
        count = tokens(several.grids)
        assert f"{count} → {int(count / 2 + 0.5)} tokens of {len(several.grids)} images" in repr(handle)
        assert "left whole" not in repr(handle)
    assert 1e-4 * plain.std() < (merged - plain).abs().mean() < 2 * plain.std()
    assert torch.equal(run(model, inputs), plain)
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == before


def test_a_batch_is_as_single_sequences(several):
    model, inputs = several(), several.given(2)
    with turbovlm.apply(model, keep=0.5):
        together = run(model, inputs)
        for row in (0, 1):
            close = {"rtol": 1e-3, "atol": 1e-4 * float(together.std())}
            torch.testing.assert_close(run(model, alone(inputs, row))[0], together[row], **close)


@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_tokens_merge_within_their_image(several, keep):
    """`keep` is the share of all; every 2×2 cell of every image keeps one."""
    model, inputs = several(), several.given(2)
    with turbovlm.apply(model, keep=keep) as handle:
        run(model, inputs)
        merges = merges_of(handle)
    assert merges
    cells = sum(frames * -(-rows // 2) * -(-columns // 2) for frames, rows, columns in several.grids)
    for merge in merges:
        assert merge.sizes.shape[1] == max(math.floor(keep * tokens(several.grids) + 0.5), cells)
        into = merge.kept.gather(1, merge.source)
        for grid, span in zip(several.grids, spans(several.grids)):
            assert ((into[:, span] >= span.start) & (into[:, span] < span.stop)).all()
            stays = torch.zeros(into.shape, dtype=torch.int).scatter(1, merge.kept, 1)[:, span]
            assert (stays.view(-1, *grid)[:, :, ::2, ::2] == 1).all()


def test_those_most_alike_merge_wherever_they_are():
    """A flat reference beside noise is all that merges."""
    model, inputs = KONTEXT(), KONTEXT.given(1)
    reference, count = spans(KONTEXT.grids)[1], tokens(KONTEXT.grids)
    inputs["hidden_states"][:, reference] = 1 + 0.1 * inputs["hidden_states"][:, reference]
    with turbovlm.apply(model, keep=0.7, whole_first=0) as handle:
        run(model, inputs)
        choice = next(iter(handle.features[0].last.values()))
    assert choice.left_of_first() == [(96, 96), (140, math.floor(0.7 * count + 0.5) - 96)]


def test_where_a_token_goes_depends_on_no_other_image():
    model, found = KONTEXT(), []
    with turbovlm.apply(model, keep=0.5, whole_first=0, span=1) as handle:
        for grids in (KONTEXT.grids, KONTEXT.grids[:1]):
            inputs = kontext_inputs(1, grids)
            inputs["hidden_states"] = kontext_inputs(1, KONTEXT.grids)["hidden_states"][:, : tokens(grids)]
            run(model, inputs)
            merge = next(iter(handle.features[0].last.values())).merge
            found.append(merge.kept.gather(1, merge.source)[0, : tokens(KONTEXT.grids[:1])])
    places = torch.arange(len(found[0]))
    both = (found[0] != places) & (found[1] != places)
    assert both.sum() > 10 and torch.equal(found[0][both], found[1][both])


@pytest.mark.parametrize(
    ("grids", "settings", "left"),
    [
        (((1, 8, 12), (1, 6, 8)), {}, "144 → 96 {n} 96 → 48, 48 → 48"),
        (((1, 6, 8), (1, 8, 12)), {}, "144 → 96 {n} 48 → 48, 96 → 48"),
        (
            ((1, 8, 12), (1, 8, 8)),
            {"min_tokens": 65},
            "160 → 112 {n} 96 → 48, 64 → 64",
        ),
        (
            ((1, 1, 1), (1, 8, 12), (1, 1, 1)),
            {},
            "98 → 50 {n} 1 → 1, 96 → 48, 1 → 1",
        ),
    ],
)
@pytest.mark.parametrize("restore", ["copy", "linear"])
def test_small_images_are_left_whole(grids, settings, left, restore):
    for several in (KONTEXT, QWEN):
        model, inputs = several().double(), several.given(1, grids)
        inputs = {name: in_float64(value) for name, value in inputs.items()}
        with turbovlm.apply(model, keep=0.5, restore=restore, **settings) as handle:
            merged = run(model, inputs)
            feature = handle.features[0]
            images = f"tokens of {len(grids)} images, in the first sequence"
            assert left.format(n=images) in repr(handle)
        if restore == "copy":
            as_equal_tokens(model, feature)
            torch.testing.assert_close(run(model, inputs), merged, rtol=0, atol=1e-9 * float(merged.abs().max()))


def test_images_that_are_all_small_are_said_so():
    model, inputs = KONTEXT(), KONTEXT.given(1, ((1, 6, 8), (1, 6, 8)))
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5) as handle:
        with pytest.warns(UserWarning, match="at most 48 tokens of an image, and images of fewer than 64"):
            assert torch.equal(run(model, inputs), plain)
        assert "96 tokens of 2 images: images of fewer than 64 are left" in repr(handle)


@pytest.mark.parametrize("settings", [{"scope": "part"}, {"components": ["attention"]}, {"restore": "linear"}], ids=str)
def test_by_parts(settings):
    model, inputs = KONTEXT(), KONTEXT.given(2)
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=0.5, **{"scope": "part", **settings}) as handle:
        merged = run(model, inputs)
        assert "236 → 118 tokens of 2 images" in repr(handle)
        torch.testing.assert_close(run(model, alone(inputs, 1))[0], merged[1], rtol=1e-3, atol=1e-4)
    assert 1e-4 < (merged - plain).abs().mean() < plain.std() and torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("degree", ["weighted_difference", "weighted_distance", "random"])
def test_degrees(degree):
    for several in (KONTEXT, QWEN):
        model, inputs = several(), several.given(2)
        with turbovlm.apply(model, keep=0.5, degree=degree):
            merged = run(model, inputs)
        with turbovlm.apply(model, keep=0.5):
            assert merged.isfinite().all() and not torch.equal(run(model, inputs), merged)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ids: ids[:-1], None),
        (lambda ids: ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))], "tokens"),
        (lambda ids: torch.cat((ids[:90], ids[91:])), "tokens 0 to 94 of 235"),
        (lambda ids: torch.cat((ids[:200], ids[199:-1])), "tokens 199 and 200 of 236 at one place"),
    ],
    ids=["one less", "any order", "an image that is not full", "one twice"],
)
def test_positions_that_are_no_images_are_refused(spoil, message):
    model, inputs = KONTEXT(), KONTEXT.given(1)
    ids = spoil(inputs["img_ids"])
    inputs["img_ids"], inputs["hidden_states"] = ids, inputs["hidden_states"][:, : len(ids)]
    with turbovlm.apply(model, keep=0.5), pytest.raises(UnsupportedModelError, match=message or "img_ids place"):
        run(model, inputs)


def test_any_images_are_found_by_their_positions():
    generator = torch.Generator().manual_seed(0)

    def drawn(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    for _ in range(200):
        grids = tuple((1, drawn(7), drawn(7)) for _ in range(drawn(4)))
        ids = places(grids, 3, lambda image: image) + torch.tensor([0, drawn(5), drawn(9)])
        zeros = ids.new_zeros(len(ids), 1)
        at = torch.cat((ids[:, :1], zeros, ids[:, 1:]), dim=1)
        assert grids_at("ids", at.to([torch.bfloat16, torch.int64, torch.float32][drawn(3) - 1])) == grids
    videos = ((3, 4, 5), (2, 4, 5), (1, 2, 2))
    axes = [torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).view(3, -1).T for grid in videos]
    assert grids_at("ids", torch.cat(axes) * torch.tensor([0.04, 32, 32])) == videos
    beside = torch.cat((axes[1], axes[1] + torch.tensor([0, 0, 5])))  # the second goes back to the first row
    assert grids_at("ids", beside) == (videos[1], videos[1])


def test_positions_in_half_precision_that_run_together_are_refused():
    """From 256 on bfloat16 has even numbers alone."""
    ids = places(((1, 2, 300),), 3, lambda image: 0).bfloat16()
    ids = torch.cat((ids[:, :1], ids), dim=1)
    with pytest.raises(UnsupportedModelError, match=r"tokens 256 and 257 of 600 at one place.*float32"):
        grids_at("img_ids", ids)


def test_sequences_of_other_images_in_a_batch_are_refused():
    model, inputs = QWEN(), QWEN.given(2)
    inputs["img_shapes"][1] = [(1, 9, 9), (1, 8, 12)]
    with turbovlm.apply(model, keep=0.5), pytest.raises(UnsupportedModelError, match="images of several sizes"):
        run(model, inputs)


def test_other_tokens_of_which_nothing_says_where_they_are():
    several = SEVERAL["ltx condition"]
    model, inputs = several(), several.given(1)
    del inputs["video_coords"]
    with turbovlm.apply(model, keep=0.5), pytest.raises(UnsupportedModelError, match="video_coords is None"):
        run(model, inputs)


def test_references_whose_keys_are_kept_leave_blocks_whole():
    """What is kept of the references in one step is of all of their tokens."""
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2KVAttnProcessor,
        Flux2KVParallelSelfAttnProcessor,
    )

    several = SEVERAL["flux2, two references"]
    model, inputs = several(), several.given(1)
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    references = tokens(several.grids[:1])
    step = {"kv_cache_mode": "extract", "num_ref_tokens": references}
    with torch.no_grad():
        plain, kept = model(**inputs, **step, return_dict=False)
        with turbovlm.apply(model, keep=0.5), pytest.warns(UserWarning, match="it is given kv_cache_mode"):
            merged, kept_too = model(**inputs, **step, return_dict=False)
            assert torch.equal(merged, plain)
            later = {
                "hidden_states": inputs["hidden_states"][:, references:],
                "img_ids": inputs["img_ids"][:, references:],
            }
            cached = {"kv_cache": kept_too, "kv_cache_mode": "cached"}
            with_cache = model(**{**inputs, **later}, **cached, return_dict=False)[0]
        cached["kv_cache"] = kept
        assert torch.equal(model(**{**inputs, **later}, **cached, return_dict=False)[0], with_cache)


@pytest.mark.parametrize("name", ["kontext", "qwen edit 2511"])
def test_gradients_are_those_of_checkpoints(name):
    several = SEVERAL[name]
    model, inputs = several(), several.given(1)
    found = []
    with turbovlm.apply(model, keep=0.5, span=2):
        for checkpointed in (False, True):
            if checkpointed:
                model.enable_gradient_checkpointing()
            model.train().zero_grad()
            model(**inputs, return_dict=False)[0].square().mean().backward()
            found.append({path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max() + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("several", "grids", "settings"),
    [
        (KONTEXT, KONTEXT.grids, {"grid": ((8, 12), (10, 14))}),
        (KONTEXT, KONTEXT.grids, {}),
        (KONTEXT, ((1, 8, 8), (1, 6, 8)), {"grid": ((8, 8), (6, 8))}),
        (QWEN, QWEN.grids, {}),
    ],
    ids=["kontext", "kontext, not told", "a small reference", "qwen"],
)
def test_compiled(several, grids, settings):
    model, inputs = several(), several.given(1, grids)
    torch.compiler.reset()
    with turbovlm.apply(model, keep=0.5, **settings):
        eager = run(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(run(compiled, inputs), eager, rtol=0, atol=1e-5 * float(eager.abs().max()))
        with torch.compiler.set_stance("fail_on_recompile"):
            run(compiled, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"degree": lambda R, A, block: R},
            r"a function cannot be compiled where positions say how tokens lie; give grid",
        ),
        ({"grid": (8, 12)}, r"grid=\(8, 12\): the image has 236 tokens; give its rows and columns, or those of each"),
        ({"grid": ((8, 12), (10, 13))}, r"grid=\(\(8, 12\), \(10, 13\)\): the image has 236 tokens"),
    ],
)
def test_compiled_it_has_to_be_told(settings, message):
    model, inputs = KONTEXT(), KONTEXT.given(1)
    torch.compiler.reset()
    with turbovlm.apply(model, keep=0.5, **settings), pytest.raises(Exception, match=message):
        run(torch.compile(model, fullgraph=True, backend="eager"), inputs)


@pytest.mark.slow
def test_compiled_it_has_to_be_told_of_small_images():
    """They are left whole, which the number of all tokens does not tell."""
    model, inputs = KONTEXT(), KONTEXT.given(1, ((1, 8, 8), (1, 6, 8)))
    torch.compiler.reset()
    with turbovlm.apply(model, keep=0.5), pytest.raises(StateError, match="of which 32 tokens go, and 56 in what was"):
        run(torch.compile(model, fullgraph=True, backend="eager"), inputs)


def test_the_grids_that_are_given():
    config = turbovlm.DenoiseConfig(0.5, grid=[[8, 12], (10, 14)])
    assert config.grid == config.sides == ((8, 12), (10, 14))
    one = turbovlm.DenoiseConfig(0.5, grid=[8, 12])
    assert one.grid == (8, 12) and one.sides == ((8, 12),) and turbovlm.DenoiseConfig(0.5).sides is None
    for wrong in ([], [[8, 12], 4], [[8, 12], [4]], [[8, 0]]):
        with pytest.raises(ConfigError, match="grid="):
            turbovlm.DenoiseConfig(0.5, grid=wrong)
