"""What one forward leaves to another: nothing, but for those that denoise one latent; and what is refused by name."""

from __future__ import annotations

import threading

import pytest
import torch

import turbovlm
from denoisers import DENOISERS, noise, unet_inputs
from prompted_pipelines import PIPES
from test_diffusion import run
from turbovlm.diffusion import rank
from turbovlm.diffusion.run import find_same_latents
from turbovlm.errors import ConfigError, StateError, TurboError, UnsupportedModelError

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def compared(monkeypatch):
    """One entry for each group of blocks whose tokens were compared."""
    compare, seen = rank.mutual_redundancy, []
    monkeypatch.setattr(rank, "mutual_redundancy", lambda *args, **how: (seen.append(1), compare(*args, **how))[1])
    return seen


def other_text(inputs):
    return {**inputs, "encoder_hidden_states": noise(77, *inputs["encoder_hidden_states"].shape)}


def test_halves_of_one_batch_merge_alike_one_by_one(compared):
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, 32, 32)
    first, second = torch.cat([inputs["sample"]] * 2).chunk(2)
    with turbovlm.apply(model, keep=0.5) as handle:
        run(model, {**inputs, "sample": first})
        once, merges = len(compared), [choice.merge for choice in handle.features[0].last.values()]
        run(model, {**other_text(inputs), "sample": second})
        assert len(compared) == once > 0
        assert all(a is choice.merge for a, choice in zip(merges, handle.features[0].last.values()))


@pytest.mark.parametrize("same", ["tensor", "values"])
def test_other_forwards_of_a_latent_choose_for_themselves(same):
    """Prompts in turn, from one noise: none is merged as that before it."""
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, 32, 32)
    other = other_text(inputs)
    if same == "values":
        other["sample"] = inputs["sample"].clone()
    with turbovlm.apply(model, keep=0.5):
        alone = run(model, other)
    with turbovlm.apply(model, keep=0.5):
        run(model, inputs)
        assert torch.equal(run(model, other), alone)


def test_two_latents_in_one_step_choose_for_themselves(compared):
    """Views of a panorama; with refresh, each goes by what was chosen for it."""
    pipe, inputs = PIPES["sd"](), unet_inputs(1, 32, 32)
    views = [inputs, {**inputs, "sample": noise(9, 1, 4, 32, 32)}, inputs]
    with turbovlm.apply(pipe, keep=0.5):
        alone = [run(pipe.unet, view) for view in views]
        once = len(compared) // 3
    for refresh, steps in ((1, 2), (2, 1)):
        compared.clear()
        with turbovlm.apply(pipe, keep=0.5, refresh=refresh):
            pipe.scheduler.set_timesteps(3)
            for timestep in pipe.scheduler.timesteps[:2]:
                outs = [run(pipe.unet, view) for view in views]
                pipe.scheduler.step(noise(0, 1, 4, 32, 32), timestep, noise(1, 1, 4, 32, 32))
        assert all(torch.equal(out, own) for out, own in zip(outs, alone))
        assert len(compared) == 2 * steps * once


def test_a_forward_that_failed_in_the_middle_leaves_nothing():
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, 32, 32)
    first, second = torch.cat([inputs["sample"]] * 2).chunk(2)
    with turbovlm.apply(model, keep=0.5):
        alone = run(model, other_text({**inputs, "sample": second}))
        fails = model.mid_block.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, {**inputs, "sample": first})
        fails.remove()
        assert torch.equal(run(model, other_text({**inputs, "sample": second})), alone)


def test_a_forward_within_a_forward():
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, 32, 32)
    inner = {**unet_inputs(2, 24, 24), "timestep": torch.tensor(100)}
    with turbovlm.apply(model, keep=0.5):
        outer_alone, inner_alone, outs = run(model, inputs), run(model, inner), []

        def within(*call):
            hook.remove()
            outs.append(run(model, inner))

        hook = model.down_blocks[0].register_forward_hook(within)
        assert torch.equal(run(model, inputs), outer_alone)
    assert torch.equal(outs[0], inner_alone)


def test_threads_that_share_a_denoiser():
    """One loop of a pipeline and bare forwards beside it, of the same latents."""
    pipe, given, inputs = PIPES["sd"](), PIPES["sd"], unet_inputs(1, 16, 20)
    for settings in ({}, {"refresh": 2}):
        with turbovlm.apply(pipe, keep=0.5, **settings):
            image, alone, outs = given.run(pipe, 16, 20, num_inference_steps=4), run(pipe.unet, inputs), []
            thread = threading.Thread(target=lambda to=outs: to.extend(run(pipe.unet, inputs) for _ in range(6)))
            thread.start()
            assert torch.equal(given.run(pipe, 16, 20, num_inference_steps=4), image)
            thread.join()
        assert len(outs) == 6 and all(torch.equal(out, alone) for out in outs)


def test_equal_latents_are_found_as_by_comparing_all():
    for batch in (1, 2, 3, 4, 6, 8, 9, 12):
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            latents = torch.randint(2, (batch, 1, 1, 1), generator=generator).float().expand(batch, 2, 2, 2)
            if seed % 2 and batch % 2 == 0:
                latents = torch.cat([latents[: batch // 2]] * 2)
            values = latents[:, 0, 0, 0]
            alike, place = values[:, None] == values, torch.arange(batch)
            apart = place[:, None] - place
            by = [apart % (batch // count) == 0 if batch % count == 0 else apart == 0 for count in (2, 3)]
            if batch % 6 == 0:
                pairs = by[0] if bool((alike | ~by[0]).all()) else by[1]
            else:
                pairs = by[1] if batch % 3 == 0 else by[0]
            same = (alike & pairs | (apart == 0)).float()
            assert torch.equal(find_same_latents(latents), same / same.sum(-1, keepdim=True)), (batch, seed)


def test_the_first_share_is_of_the_largest_resolution_that_has_blocks():
    model = DENOISERS["sdxl"]()  # its first stage has none
    with turbovlm.apply(model, keep=(0.5, 0.9)) as handle:
        run(model, DENOISERS["sdxl"].inputs(1, 32, 32))
        assert "256 → 128 tokens" in repr(handle) and "256 → 230 tokens" not in repr(handle)
    model = DENOISERS["sd15"]()
    with turbovlm.apply(model, keep=(0.5, 0.9)) as handle:
        run(model, unet_inputs(1, 32, 32))
        assert "1024 → 512 tokens" in repr(handle) and "256 → 230 tokens" in repr(handle)


@pytest.mark.parametrize("kind", ["UNet2DModel", "AutoencoderKL", "SanaTransformer2DModel"])
def test_models_of_diffusers_that_are_not_known_are_refused_with_those_that_are(kind):
    with torch.device("meta"):
        model = getattr(diffusers, kind)()
    for settings in ({"keep": 0.5}, {"r": 8}):
        with pytest.raises(
            UnsupportedModelError, match=f"{kind} is .*UNets, PixArt and DiT, Stable Diffusion 3, .*FLUX, "
        ):
            turbovlm.apply(model, **settings)


def test_components_as_text():
    with pytest.raises(ConfigError, match=r"components='attention': must be some of .*ffn, in a list"):
        turbovlm.DenoiseConfig(keep=0.5, components="attention")


@pytest.mark.parametrize("when", ["before", "after"])
def test_blocks_that_merge_by_themselves_already(when):
    """What tomesd does: it gives the blocks another class."""
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, 32, 32)

    def put():
        for block in (b for b in model.modules() if type(b).__name__ == "BasicTransformerBlock"):

            class ToMeBlock(type(block)):
                def forward(self, hidden_states, **kwargs):
                    half = hidden_states[:, ::2]
                    return super().forward(half, **kwargs).repeat_interleave(2, dim=1)

            ToMeBlock.__module__ = "tomesd.patch"
            block.__class__ = ToMeBlock

    if when == "before":
        put()
        with pytest.raises(TurboError, match=r"ToMeBlock of tomesd\.patch, .*call tomesd\.remove_patch first"):
            turbovlm.apply(model, keep=0.5)
        return
    with turbovlm.apply(model, keep=0.5):
        put()
        with pytest.raises(StateError, match=r"a .*ToMeBlock of tomesd\.patch has had another forward since"):
            run(model, inputs)


@pytest.mark.parametrize("when", ["before", "after"])
def test_blocks_compiled_one_by_one_are_refused(when):
    model, inputs = DENOISERS["flux"](), DENOISERS["flux"].inputs(1, 16, 16)
    if when == "before":
        model.compile_repeated_blocks(backend="eager")
        with pytest.raises(TurboError, match=r"transformer_blocks\.0 is compiled by itself.*compile the whole"):
            turbovlm.apply(model, keep=0.5, scope="part")
        return
    with turbovlm.apply(model, keep=0.5, scope="part"):
        model.compile_repeated_blocks(backend="eager")
        with pytest.raises(StateError, match=r"transformer_blocks\.0 is compiled by itself.*compile the whole"):
            run(model, inputs)
