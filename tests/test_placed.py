"""Models in half precision, compiled in parts, offloaded, dispatched and sharded: accelerated where they are."""

from __future__ import annotations

import os
import socket

import pytest
import torch

import turbovlm
from test_compressed import PIXELS, out, timm_vit, vit
from turbovlm import TurboError, UnsupportedModelError
from vlms import made, seeded

accelerate = pytest.importorskip("accelerate")
SPREAD = {"embeddings": "cpu", "layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu", "layernorm": "cpu"}


def offloaded(model, folder):
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def on_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device="cpu")
    return model


def dispatched(model, folder):
    return accelerate.dispatch_model(model, {**SPREAD, "pooler": "cpu"}, main_device="cpu", offload_dir=folder)


def halved(model, folder):
    return model.half()


def in_bfloat16(model, folder):
    return model.bfloat16()


def compiled_blocks(model, folder):
    for block in model.layers:
        block.compile(backend="eager")
    return model


def wrapped_blocks(model, folder):
    for index, block in enumerate(model.layers):
        model.layers[index] = torch.compile(block, backend="eager")
    return model


PLACED = [offloaded, on_disk, dispatched, halved, in_bfloat16, compiled_blocks, wrapped_blocks]


@torch.inference_mode()
def tokens(model):
    return model(PIXELS.to(model.dtype)).last_hidden_state


@pytest.mark.parametrize("place", [compiled_blocks, wrapped_blocks])
@pytest.mark.parametrize("amounts", [({"keep": 0.5}, {"keep": 0.7}), ({"r": 4}, {"r": 2}), ({"r": 2}, {"r": 0})])
def test_compiled_blocks_merge_by_the_settings_at_hand(place, amounts, tmp_path):
    """The graph of a block that was compiled under one amount does not serve another."""
    plain, model = vit(), place(vit(), str(tmp_path))
    for settings in amounts:
        with turbovlm.apply(model, **settings), turbovlm.apply(plain, **settings):
            torch.testing.assert_close(tokens(model), tokens(plain))


@pytest.mark.parametrize("place", PLACED)
def test_placed_models_merge_and_come_back(place, tmp_path):
    plain, model = vit(), place(vit(), str(tmp_path))
    own = tokens(model)
    with turbovlm.apply(model, r=0):
        assert torch.equal(tokens(model), own)
    with turbovlm.apply(model, r=8) as handle, turbovlm.apply(plain, r=8):
        merged = tokens(model)
        assert merged.shape[1] == own.shape[1] - 8 * 3 and handle.active
        if model.dtype == torch.float32:
            torch.testing.assert_close(merged, tokens(plain))
    assert torch.equal(tokens(model), own)


def test_hooks_that_go_first_leave_the_merges(tmp_path):
    model = dispatched(vit(), str(tmp_path))
    own = tokens(model)
    handle = turbovlm.apply(model, r=8)
    merged = tokens(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert handle.active and torch.equal(tokens(model), merged)
    handle.remove()
    assert torch.equal(tokens(model), own) and not handle.active


def test_one_encoder_on_several_devices_is_refused():
    model = vit()
    for block, device in zip(model.layers, ("cpu", "cpu", "meta")):
        accelerate.hooks.add_hook_to_module(block, accelerate.hooks.AlignDevicesHook(execution_device=device))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0 on cpu, layers\.2 on meta"):
        turbovlm.apply(model, r=4)
    with pytest.raises(TurboError, match="not accelerated"):
        turbovlm.get_handle(model)


def test_a_forward_below_the_hook_that_another_library_has_set():
    model = vit()
    model.layers[1].forward = lambda *args, **kwargs: None
    accelerate.hooks.add_hook_to_module(model.layers[1], accelerate.hooks.ModelHook())
    with pytest.raises(TurboError, match=r"layers.1 has a forward of its own"):
        turbovlm.apply(model, r=4)


@pytest.mark.parametrize("settings", [{"r": 2}, {"visual_keep": 0.5}, {"r": 2, "visual_keep": 0.5}])
def test_a_dispatched_vision_language_model(settings):
    family, model = made("llava")
    inputs = family.inputs([5, "image", 6, 7])
    with torch.no_grad():
        own = model(**inputs).logits
        with turbovlm.apply(model, **settings):
            expected = model(**inputs).logits
        for module in model.modules():
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
        with turbovlm.apply(model, **settings):
            assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, own)
    assert expected.shape != own.shape or not torch.equal(expected, own)


def test_a_dispatched_reader_across():
    from vlms import blip, noise

    model = seeded(lambda: blip("ConditionalGeneration"))
    inputs = {"pixel_values": noise(0, 1, 3, 48, 48), "input_ids": torch.tensor([[2, 5, 6, 7]])}
    with torch.no_grad():
        with turbovlm.apply(model, r=2, cross_keep=0.5):
            expected = model(**inputs).logits
        for module in model.modules():
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
        with turbovlm.apply(model, r=2, cross_keep=0.5):
            assert torch.equal(model(**inputs).logits, expected)


def test_merged_adapters_are_linear_layers_again():
    peft = pytest.importorskip("peft")
    names = [name for name, module in vit().named_modules() if isinstance(module, torch.nn.Linear)]
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(vit(), config).eval().merge_and_unload()
    own = out(model)
    with turbovlm.apply(model, r=8) as handle, turbovlm.apply(vit(), r=8) as plain:
        assert handle.schedules == plain.schedules and out(model).shape[1] == own.shape[1] - 24
    assert torch.equal(out(model), own)


def _on_one_of_two(rank, port, make):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    init_process_group("gloo")
    plain, model = make(), make()
    for block in model.layers if hasattr(model, "layers") else model.blocks:
        fully_shard(block)
    fully_shard(model)
    with torch.no_grad():
        own = out(model)
        with turbovlm.apply(plain, r=8):
            expected = out(plain)
        with turbovlm.apply(model, r=8):
            torch.testing.assert_close(out(model), expected)
        assert torch.equal(out(model), own)
    destroy_process_group()


@pytest.mark.parametrize("make", [vit, pytest.param(timm_vit, marks=pytest.mark.slow)])
def test_sharded_over_two_processes(make):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_on_one_of_two, (port, make), nprocs=2)
