"""Copies that share weights: nothing of the one is seen in the other but the weights."""

from __future__ import annotations

import threading

import pytest
import torch

import turbovlm
from turbovlm import TurboError, UnsupportedModelError
from turbovlm.patching import patches_on

diffusers = pytest.importorskip("diffusers")

from denoisers import DENOISERS  # noqa: E402
from pipelines import PIPES  # noqa: E402


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def made(pipe, family, steps=2):
    inputs = PIPES[family].inputs(32, 48)
    call = {"num_inference_steps": steps, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe(**inputs, **call).images


def run(model, family):
    with torch.no_grad():
        return model(**DENOISERS[family].inputs(2, 24, 32), return_dict=False)[0]


def test_a_copy_of_a_module_is_another_with_the_same_weights():
    model = DENOISERS["flux"]()
    plain, copied = run(model, "flux"), turbovlm.share_weights(model)
    assert type(copied) is type(model) and copied is not model
    assert all(a is b for a, b in zip(tensors(model), tensors(copied), strict=True))
    assert not {id(each) for each in model.modules()} & {id(each) for each in copied.modules()}
    assert torch.equal(run(copied, "flux"), plain)
    with turbovlm.apply(copied, keep=0.5):
        merged = run(copied, "flux")
        assert not torch.equal(merged, plain) and torch.equal(run(model, "flux"), plain)
        assert not any(True for _ in patches_on(model))
    with torch.no_grad():
        model.x_embedder.weight.mul_(1.5)
    assert torch.equal(run(copied, "flux"), run(model, "flux")) and not torch.equal(run(model, "flux"), plain)


def test_the_mode_stays():
    assert turbovlm.share_weights(DENOISERS["flux"]().train()).training


def test_a_copy_of_an_accelerated_module_has_a_handle_of_its_own():
    model = DENOISERS["sd15"]()
    plain = run(model, "sd15")
    with turbovlm.apply(model, keep=0.5):
        merged, copied = run(model, "sd15"), turbovlm.share_weights(model)
        assert torch.equal(run(copied, "sd15"), merged)
        turbovlm.get_handle(copied).remove()
        assert torch.equal(run(copied, "sd15"), plain) and torch.equal(run(model, "sd15"), merged)
        again = turbovlm.share_weights(model)
    assert torch.equal(run(again, "sd15"), merged) and torch.equal(run(model, "sd15"), plain)


@pytest.mark.parametrize("family", ["text to image", "FLUX", "ControlNet"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_copy_of_a_pipeline(family, when):
    pipe = PIPES[family]()
    plain = made(pipe, family)
    copied = turbovlm.share_weights(pipe)
    handle = turbovlm.apply(pipe, keep=0.5, refresh=2)
    merged = made(pipe, family)
    if when == "before":
        assert torch.equal(made(copied, family), plain)
        turbovlm.apply(copied, keep=0.5, refresh=2)
    else:
        copied = turbovlm.share_weights(pipe)
    assert copied.scheduler is not pipe.scheduler and type(copied) is type(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            other = copied.components[name]
            assert other is not part and all(a is b for a, b in zip(tensors(part), tensors(other), strict=True))
    assert torch.equal(made(copied, family), merged)
    handle.remove()
    assert torch.equal(made(copied, family), merged) and torch.equal(made(pipe, family), plain)
    turbovlm.get_handle(copied).remove()
    assert torch.equal(made(copied, family), plain)
    assert not {"step", "set_timesteps"} & set(copied.scheduler.__dict__)


def test_a_copy_for_each_thread():
    """Loops of several lengths at a time give what they give one after another."""
    family = "text to image"
    pipe = PIPES[family]()
    turbovlm.apply(pipe, keep=0.5, refresh=2)
    copies, lengths, found = [turbovlm.share_weights(pipe) for _ in range(3)], (3, 4, 5), {}
    wanted = [made(pipe, family, steps) for steps in lengths]

    def work(place):
        found[place] = [made(copies[place], family, lengths[place]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, image in enumerate(wanted):
        assert all(torch.equal(each, image) for each in found[place])


def test_what_has_no_weights():
    with pytest.raises(UnsupportedModelError, match=r"a str is neither a torch.nn.Module nor a pipeline"):
        turbovlm.share_weights("a/model")
    with pytest.raises(UnsupportedModelError, match="a DDIMScheduler is neither"):
        turbovlm.share_weights(diffusers.DDIMScheduler())


def test_weights_that_move():
    accelerate = pytest.importorskip("accelerate")
    from diffusers.hooks import apply_group_offloading

    model = DENOISERS["flux"]()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(TurboError, match=r"is offloaded .*: its weights move in every forward"):
        turbovlm.share_weights(model)
    model = DENOISERS["flux"]()
    devices = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    apply_group_offloading(model, **devices, offload_type="leaf_level")
    with pytest.raises(TurboError, match="is offloaded"):
        turbovlm.share_weights(model)
    model = DENOISERS["flux"]()
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    with pytest.raises(TurboError, match=r"FluxTransformer2DModel is offloaded \(CpuOffload"):
        turbovlm.share_weights(model)
