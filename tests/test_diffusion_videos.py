"""Denoisers of videos, whose blocks merge whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import turbovlm
from denoisers import Watch, noise
from equal_tokens import stand_for
from test_diffusion import check_merges_and_comes_back, run
from turbovlm.errors import ConfigError, UnsupportedModelError
from video_denoisers import (
    COLUMNS,
    FRAMES,
    ROWS,
    TOKENS,
    VIDEOS,
    animate,
    hunyuan,
    ltx_inputs,
    small,
    vace,
    wan,
    wan_inputs,
)

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


@torch.no_grad()
@pytest.mark.parametrize("given", SCOPES, ids=str)
def test_a_stack_is_its_blocks_on_equal_tokens(video, given):
    """Sizes, positions, times, text and update, against the model's own blocks on all tokens."""
    model, inputs = video().double(), {name: doubles(value) for name, value in video.inputs(1).items()}
    if (embedding := getattr(model, "learnable_pos_embed", None)) is not None:
        embedding.to(torch.float32)  # as it has to be
    with turbovlm.apply(model, keep=0.5, restore="copy", **given) as handle:
        merged = run(model, inputs)
        places, choices = handle.features[0].places, handle.features[0].last
    stand_for(model, places, choices, alone=video.make in (vace, animate))
    torch.testing.assert_close(run(model, inputs), merged, rtol=0, atol=1e-9 * float(merged.abs().max()))


@pytest.mark.parametrize("given", SCOPES, ids=str)
def test_merges_and_comes_back(video, given):
    check_merges_and_comes_back(video(), video.inputs(2), f"{TOKENS} → {TOKENS // 2 + 1} tokens", given)


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


def test_tokens_beside_the_video_that_are_no_images_are_refused():
    model, inputs = VIDEOS["ltx"](), ltx_inputs(1)
    inputs["hidden_states"] = noise(0, 1, TOKENS + 9, 4)
    inputs["video_coords"] = noise(1, 1, 3, TOKENS + 9)
    with turbovlm.apply(model, keep=0.5, scope="block"), pytest.raises(UnsupportedModelError, match="fill no image"):
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


@pytest.mark.parametrize("name", ["wan-times", "hunyuan", "cogvideox", "ltx2", "cosmos"])
def test_gradients_are_those_of_checkpoints(name):
    """Blocks are given all that they are given by place, then."""
    video = VIDEOS[name]
    model, inputs, found = video(), video.inputs(1), []
    with turbovlm.apply(model, keep=0.5, scope="stack", span=2):
        for checkpointed in (False, True):
            if checkpointed:
                model.enable_gradient_checkpointing()
            model.train().zero_grad()
            model(**inputs, return_dict=False)[0].square().mean().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max() + 1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mochi", "ltx2"])
def test_a_compiled_denoiser_is_one_graph(name):
    """Those whose attention is counted in ways of their own; the others' is as in `test_diffusion_stack`."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    video, counter = VIDEOS[name], CompileCounter()
    model, inputs = video(), video.inputs(2)
    with turbovlm.apply(model, keep=0.5, scope="stack"):
        merged = run(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        torch.testing.assert_close(run(compiled, inputs), merged, rtol=0, atol=1e-5 * float(merged.abs().max()))
    assert counter.frame_count == 1


@torch.no_grad()
def test_control_residuals_leave_their_blocks_whole():
    """Only some blocks have one, and only these read all tokens."""
    model, inputs = VIDEOS["cosmos"](), VIDEOS["cosmos"].inputs(1)
    model.register_to_config(controlnet_block_every_n=2)
    inputs["block_controlnet_hidden_states"] = [noise(7, 1, TOKENS, 32)] * 2
    with turbovlm.apply(model, keep=0.5, scope="stack") as handle:
        assert run(model, inputs).isfinite().all()
        assert set(handle.features[0].whole) == {"transformer_blocks.0", "transformer_blocks.2"}


@torch.no_grad()
def test_attention_that_is_left_out_for_guidance_leaves_its_block_whole():
    model, inputs = VIDEOS["ltx2-perturbed"](), VIDEOS["ltx2-perturbed"].inputs(1)
    inputs["spatio_temporal_guidance_blocks"] = [1]
    with turbovlm.apply(model, keep=0.5, scope="stack") as handle:
        assert run(model, inputs).isfinite().all()
        assert set(handle.features[0].whole) == {"transformer_blocks.1"}


@torch.no_grad()
def test_sound_that_is_as_long_as_the_merged_video():
    """Only the video's keys count by their sizes."""
    video = VIDEOS["ltx2"]
    model, inputs = video().double(), {name: doubles(value) for name, value in video.inputs(1).items()}
    length = TOKENS // 2 + 1
    inputs |= {"audio_hidden_states": noise(9, 1, length, 4).double(), "audio_num_frames": length}
    with turbovlm.apply(model, keep=0.5, restore="copy", scope="stack") as handle:
        merged = run(model, inputs)
        places, choices = handle.features[0].places, handle.features[0].last
    stand_for(model, places, choices)
    torch.testing.assert_close(run(model, inputs), merged, rtol=0, atol=1e-9 * float(merged.abs().max()))


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"scope='part': blocks of Wan merge whole"):
        turbovlm.apply(wan(), keep=0.5, scope="part")
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


def latte() -> Any:
    return diffusers.LatteTransformer3DModel(
        2, 16, in_channels=4, num_layers=1, sample_size=16, patch_size=2, caption_channels=32
    )


def framepack() -> Any:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    return HunyuanVideoFramepackTransformer3DModel(
        **small(num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=8),
        rope_axes_dim=(4, 4, 8),
    )


@pytest.mark.parametrize("make", [latte, framepack])
def test_videos_whose_tokens_lie_in_another_way_are_refused(make):
    with pytest.raises(UnsupportedModelError, match=r"is in a .*, of which turbovlm does not know how its tokens lie"):
        turbovlm.apply(make(), keep=0.5, scope="block")


def test_a_replaced_first_frame_is_refused():
    """Its blocks treat the first frame's tokens in another way."""
    with pytest.raises(UnsupportedModelError, match="without a block that turbovlm knows"):
        turbovlm.apply(hunyuan(image_condition_type="token_replace"), keep=0.5)
