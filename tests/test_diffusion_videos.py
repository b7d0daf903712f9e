"""Denoisers of videos, whose blocks merge whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import turbovlm
from denoisers import Watch, noise
from equal_tokens import stand_for
from test_diffusion import run
from turbovlm.errors import ConfigError, UnsupportedModelError
from video_denoisers import COLUMNS, FRAMES, ROWS, TOKENS, VIDEOS, animate, ltx_inputs, vace, wan, wan_inputs

diffusers = pytest.importorskip("diffusers")
SCOPES = ({"scope": "block"}, {"scope": "stack", "span": 2}, {"scope": "stack", "span": 8})


@pytest.fixture(params=VIDEOS)
def video(request):
    return VIDEOS[request.param]


def doubles(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(doubles, value))
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def first(value: Any, i: int) -> Any:
    """What one video of a batch of two is given."""
    return value[i : i + 1] if torch.is_tensor(value) and value.ndim and len(value) == 2 else value


@pytest.fixture
def all_double():
    """Layers and angles that a model computes in single precision whatever it is in are in double, too."""
    torch.Tensor.float = lambda x: x.double()
    yield
    del torch.Tensor.float  # inherited, and PyTorch's compiler minds that it is


@torch.no_grad()
@pytest.mark.parametrize("given", SCOPES, ids=str)
def test_a_stack_is_its_blocks_on_equal_tokens(video, given, all_double):
    """Sizes, positions, times, text and update, against the model's own blocks on all tokens."""
    model, inputs = video().double(), {name: doubles(value) for name, value in video.inputs(1).items()}
    if (embedding := getattr(model, "learnable_pos_embed", None)) is not None:
        embedding.to(torch.float32)  # as it has to be
    with turbovlm.apply(model, keep=0.5, restore="copy", **given) as handle:
        merged = run(model, inputs)
        places, choices = handle.features[0].places, handle.features[0].last
    stand_for(model, places, choices, alone=video.make in (vace, animate))
    torch.testing.assert_close(run(model, inputs), merged, rtol=0, atol=1e-9 * float(merged.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("given", SCOPES, ids=str)
def test_merges_and_comes_back(video, given):
    model, inputs = video(), video.inputs(2)
    plain = run(model, inputs)
    with turbovlm.apply(model, keep=1.0, **given):
        assert torch.equal(run(model, inputs), plain)
    with turbovlm.apply(model, keep=0.5, **given) as handle:
        merged = run(model, inputs)
        assert torch.equal(run(model, inputs), merged) and merged.isfinite().all()
        assert merged.shape == plain.shape
        assert "left whole" not in repr(handle) and f"{TOKENS} → {TOKENS // 2 + 1} tokens" in repr(handle)
    assert 1e-4 * plain.std() < (merged - plain).abs().mean() < plain.std()
    assert torch.equal(run(model, inputs), plain)


@torch.no_grad()
def test_a_batch_is_as_single_videos(video):
    model, inputs = video(), video.inputs(2)
    with turbovlm.apply(model, keep=0.5, scope="stack"):
        together = run(model, inputs)
        for i in (0, 1):
            own = {name: first(value, i) for name, value in inputs.items() if not name.endswith("scale")}
            alone = run(model, {**inputs, **own})
            torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-4 * float(together.std()))


@torch.no_grad()
def test_every_layer_reads_fewer_tokens_and_all_of_the_text(video):
    whole, merged = lengths_in_blocks(video, 1.0), lengths_in_blocks(video, 0.5)
    assert max(whole.values()) >= TOKENS
    assert merged == {
        path: length if length < TOKENS or length == 512 else length - TOKENS + TOKENS // 2 + 1
        for path, length in whole.items()
    }


def lengths_in_blocks(video: Any, keep: float) -> dict[str, int]:
    """How many tokens each layer of the blocks reads."""
    model, seen = video(), {}
    with turbovlm.apply(model, keep=keep, scope="stack", span=8) as handle:
        for place in handle.features[0].places:
            for name, layer in model.get_submodule(place.name).named_modules():
                if isinstance(layer, torch.nn.Linear):
                    path = f"{place.name}.{name}"
                    Watch(layer, lambda x, out, path=path: seen.update({path: x.shape[1] if x.ndim == 3 else 0}))
        run(model, video.inputs(2))
        assert "left whole" not in repr(handle)
    return seen


def test_stacks(video):
    with turbovlm.apply(video(), keep=0.5, scope="stack", span=8) as handle:
        stacks = dict.fromkeys(place.stack for place in handle.features[0].places)
    assert tuple(len(stack.blocks) for stack in stacks) == video.stacks


@torch.no_grad()
def test_every_cell_of_every_frame_keeps_a_token(video):
    model = video()
    with turbovlm.apply(model, keep=0.25, scope="stack") as handle:
        run(model, video.inputs(1))
        merges = [choice.merge for choice in handle.features[0].last.values()]
    for merge in merges:
        frames, rows, columns = torch.unravel_index(merge.kept[0], (FRAMES, ROWS, COLUMNS))
        cells = set(zip(frames.tolist(), (rows // 2).tolist(), (columns // 2).tolist()))
        assert len(cells) == len(merge.kept[0]) == FRAMES * -(-ROWS // 2) * -(-COLUMNS // 2)


@torch.no_grad()
def test_tokens_merge_across_frames():
    model, inputs = wan(), wan_inputs(1)
    still = noise(0, 1, 4, 1, 2 * ROWS, 2 * COLUMNS)
    inputs["hidden_states"] = still + 0.01 * inputs["hidden_states"]
    with turbovlm.apply(model, keep=0.5, scope="stack") as handle:
        run(model, inputs)
        (choice,) = handle.features[0].last.values()
    merge = choice.merge
    merged_into = merge.kept.gather(1, merge.source)[0] // (ROWS * COLUMNS)
    own = torch.arange(TOKENS) // (ROWS * COLUMNS)
    assert int((merged_into != own).sum()) > 0.1 * TOKENS


@torch.no_grad()
def test_what_is_added_between_blocks_finds_all_tokens():
    """Control hints: each block merges for itself, alike, so a stack is as its blocks."""
    video = VIDEOS["vace"]
    model, inputs = video(), video.inputs(1)
    with turbovlm.apply(model, keep=0.5, scope="block"):
        blocks = run(model, inputs)
    with turbovlm.apply(model, keep=0.5, scope="stack"):
        stacks = run(model, inputs)
    assert (stacks - blocks).abs().mean() < 0.05 * stacks.std()


@torch.no_grad()
def test_guided_tokens_merge_alike():
    """The halves of guidance are found by their latents, also where these are given as tokens."""
    video = VIDEOS["ltx"]
    model, inputs = video(), video.inputs(2)
    inputs["hidden_states"] = inputs["hidden_states"][:1].expand(2, -1, -1)
    with turbovlm.apply(model, keep=0.5, scope="stack", span=2) as handle:
        run(model, inputs)
        for choice in handle.features[0].last.values():
            assert torch.equal(choice.merge.source[0], choice.merge.source[1])


def test_tokens_beside_the_video_are_refused():
    """Those of images that a video goes by stand before its own."""
    model, inputs = VIDEOS["ltx"](), ltx_inputs(1)
    inputs["hidden_states"] = noise(0, 1, TOKENS + 9, 4)
    inputs["video_coords"] = noise(1, 1, 3, TOKENS + 9)
    with turbovlm.apply(model, keep=0.5, scope="block"), pytest.raises(UnsupportedModelError, match="114 are given"):
        run(model, inputs)


@torch.no_grad()
def test_a_mask_over_positions_leaves_blocks_whole():
    """Each pair of frames attends to those before it."""
    model = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        num_frame_per_block=3,
    ).eval()
    plain = run(model, wan_inputs(1))
    with turbovlm.apply(model, keep=0.5, scope="stack") as handle:
        with pytest.warns(UserWarning, match="its attention_mask is set"):
            assert torch.equal(run(model, wan_inputs(1)), plain)
        assert "left whole" in repr(handle)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"scope='part': blocks of Wan merge whole"):
        turbovlm.apply(wan(), keep=0.5)
    with pytest.raises(ConfigError, match=r"degree='semantics': .* does not know of Wan"):
        turbovlm.apply(wan(), keep=0.5, scope="block", degree="semantics")


@torch.no_grad()
@pytest.mark.parametrize("name", ["hunyuan", "hunyuan-1.5", "cogvideox", "mochi", "allegro", "cosmos"])
def test_the_semantic_value_counts(name):
    video = VIDEOS[name]
    model, inputs = video(), video.inputs(2)
    found = []
    for degree in ("redundancy", "semantics"):
        with turbovlm.apply(model, keep=0.5, scope="stack", degree=degree):
            found.append(run(model, inputs))
    assert found[1].isfinite().all() and not torch.equal(*found)


def test_videos_whose_tokens_lie_in_another_way_are_refused():
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        2, 16, in_channels=4, num_layers=1, sample_size=16, patch_size=2, caption_channels=32
    )
    with pytest.raises(UnsupportedModelError, match="LatteTransformer3DModel, of which turbovlm does not know"):
        turbovlm.apply(model, keep=0.5, scope="block")
