"""`keep` over the steps: what is kept is that of the scheduler's present step, in each of its forwards."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import turbovlm
from denoisers import DENOISERS, noise, unet_inputs
from pipelines import PIPES
from test_diffusion import image, pipeline
from test_diffusion_steps import feature_of
from turbovlm import DenoiseConfig
from turbovlm.errors import ConfigError, StateError, TurboError

pytest.importorskip("diffusers")
HALVES = {0: 0.5, 0.5: 1.0}


@pytest.fixture
def watched():
    """Watches a denoiser's forwards: what they are given and give, and the share of the largest resolution kept."""
    hooks = []

    def watch(denoiser):
        seen = []

        def note(module, args, kwargs, out):
            last = max(feature_of(module).last.values(), key=lambda choice: choice.tokens)
            kept = last.tokens if last.merge is None else last.merge.sizes.shape[1]
            seen.append((kept / last.tokens, args, kwargs, out))

        hooks.append(denoiser.register_forward_hook(note, with_kwargs=True))
        return seen

    yield watch
    for hook in hooks:
        hook.remove()


def shares(seen):
    return [share for share, *_ in seen]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("text to image", {}, [0.5, 0.5, 1, 1]),
        ("image to image", {"strength": 0.75}, [0.5, 1, 1]),
        ("image to image", {"strength": 0.5}, [1, 1]),
        ("inpainting", {"strength": 0.5}, [1, 1]),
        ("SDXL", {}, [0.5, 0.5, 1, 1]),
        ("SDXL", {"denoising_end": 0.75}, [0.5, 0.5, 1]),
        ("SDXL image to image", {"strength": 0.5}, [1, 1]),
        ("SD3", {}, [0.5, 0.5, 1, 1]),
        ("SD3 image to image", {"strength": 0.5}, [1, 1]),
        ("FLUX", {}, [0.5, 0.5, 1, 1]),
        ("PixArt", {}, [0.5, 0.5, 1, 1]),
        ("DiT", {}, [0.5, 0.5, 1, 1]),
    ],
)
def test_each_forward_is_that_of_its_share(watched, name, settings, expected):
    """Bit for bit; where all is kept, the model's own."""
    pipe = PIPES[name]()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    inputs = PIPES[name].inputs(64, 64) | settings | {"num_inference_steps": 4, "output_type": "latent"}
    with turbovlm.apply(pipe, keep=HALVES):
        seen = watched(denoiser)
        pipe(**inputs, generator=torch.Generator().manual_seed(0))
        runs = list(seen)
    assert shares(runs) == expected
    for share, args, kwargs, out in runs:
        outs = {}
        for keep in (0.5, 1.0):
            with turbovlm.apply(denoiser, keep=keep), torch.no_grad():
                outs[keep] = denoiser(*args, **kwargs)[0]
        with torch.no_grad():
            own = denoiser.__class__.forward(denoiser, *args, **kwargs)[0]
        assert torch.equal(outs[share], out[0]) and not torch.equal(outs[1.5 - share], out[0])
        assert torch.equal(own, outs[1.0])


SCHEDULERS = {
    **dict.fromkeys(("DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "IPNDM"), 1),
    **dict.fromkeys(("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "LCM", "TCD"), 1),
    **dict.fromkeys(("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"), 2),
}
"""Those of `diffusers`, and how many forwards a step takes."""


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("strength", [None, 0.5])
def test_every_scheduler_tells_its_steps(watched, kind, strength):
    import diffusers

    name = "text to image" if strength is None else "image to image"
    if strength is not None and kind == "IPNDM":
        pytest.skip("it adds no noise, so it begins nowhere else")
    pipe, inputs = PIPES[name](), PIPES[name].inputs(64, 64)
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler")()
    inputs |= {} if strength is None else {"strength": strength}
    keep = {0: 0.5, 0.25: 0.625, 0.5: 0.75, 0.75: 1.0}
    with turbovlm.apply(pipe, keep=keep):
        seen = watched(pipe.unet)
        for _ in range(2):
            seen.clear()
            pipe(**inputs, num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0))
            each = [share for share in (0.5, 0.625, 0.75, 1.0) for _ in range(SCHEDULERS[kind])]
            expected = each[: len(each) + 1 - SCHEDULERS[kind]]  # the last evaluates once
            assert shares(seen) == (expected if strength is None else expected[len(each) // 2 :])


def test_timesteps_that_come_twice(watched):
    """PNDM begins with the same one twice, as a step more."""
    from diffusers import PNDMScheduler

    pipe = PIPES["text to image"]()
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True)
    with turbovlm.apply(pipe, keep={0: 0.5, 0.6: 1.0}):
        seen = watched(pipe.unet)
        image(pipe)
    assert shares(seen) == [0.5, 0.5, 0.5, 1, 1]


def test_all_forwards_of_a_step_keep_the_same(watched):
    """Guidance one forward after another."""
    pipe, inputs = PIPES["FLUX"](), PIPES["FLUX"].inputs(64, 64)
    negative = {"negative_prompt_embeds": noise(6, 1, 7, 32), "negative_pooled_prompt_embeds": noise(8, 1, 32)}
    with turbovlm.apply(pipe, keep=HALVES):
        seen = watched(pipe.transformer)
        pipe(**inputs, **negative, true_cfg_scale=2.0, num_inference_steps=4, output_type="latent")
    assert shares(seen) == [0.5] * 4 + [1.0] * 4


def test_a_function_is_asked_once_a_step_and_resolutions_differ(watched):
    asked = []

    def kept(progress):
        asked.append(progress)
        return (0.5, 1.0) if progress < 0.5 else 0.75

    pipe = pipeline()
    with turbovlm.apply(pipe, keep=kept) as handle:
        assert "kept(progress) of the tokens" in repr(handle) and handle.config.amount == "keep=kept"
        asked.clear()
        seen = watched(pipe.unet)
        image(pipe)
        assert asked == [0, 0.25, 0.5, 0.75] and shares(seen) == [0.5, 0.5, 0.75, 0.75]


@pytest.mark.parametrize(("refresh", "steps"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 3, 5]), (4, [0, 3])])
def test_what_was_chosen_for_another_share_does_not_hold(watched, refresh, steps):
    pipe = pipeline()
    prompt = {"prompt_embeds": noise(5, 1, 7, 32), "negative_prompt_embeds": noise(6, 1, 7, 32)}
    with turbovlm.apply(pipe, keep={0: 0.5, 0.5: 0.75}, refresh=refresh):
        merges = []
        pipe.unet.register_forward_hook(
            lambda *_: merges.append(max(feature_of(pipe).last.values(), key=lambda choice: choice.tokens).merge)
        )
        pipe(**prompt, num_inference_steps=6, output_type="latent")
    chosen = [i for i, merge in enumerate(merges) if i == 0 or merge is not merges[i - 1]]
    assert chosen == steps


def test_a_run_that_is_left_early_leaves_nothing_to_the_next():
    pipe = pipeline()

    def leave(pipe, step, timestep, kwargs):
        if step == 2:
            raise KeyboardInterrupt
        return kwargs

    plain = image(pipe)
    own = dict(pipe.scheduler.__dict__)
    with turbovlm.apply(pipe, keep=HALVES) as handle:
        first = image(pipe)
        with pytest.raises(KeyboardInterrupt):
            image(pipe, callback_on_step_end=leave)
        assert torch.equal(image(pipe), first) and not torch.equal(first, plain)
        assert torch.equal(image(copy.deepcopy(pipe)), first)
        shown = repr(handle)
        assert "keep={0: 0.5, 0.5: 1.0}" in shown and "256 → 256 tokens in the last step" in shown
        assert "50% of the tokens, 100% from 0.5 of the steps on, in stacks" in shown
    assert torch.equal(image(pipe), plain) and pipe.scheduler.__dict__.keys() == own.keys()


def test_outside_of_the_schedulers_loop_nothing_is_guessed():
    pipe, inputs = pipeline(), unet_inputs(1, 32, 32)
    with turbovlm.apply(pipe, keep=HALVES):
        for _ in range(2):
            with pytest.raises(StateError, match=r"keep={0: 0.5, 0.5: 1.0}: no loop of the pipeline's scheduler is"):
                pipe.unet(**inputs)
            image(pipe)
        pipe.scheduler.set_timesteps(4)
        raised = []

        def elsewhere():
            try:
                pipe.unet(**inputs)
            except StateError as error:
                raised.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert "in the loop's thread" in raised[0]


@torch.no_grad()
def test_a_loop_of_ones_own(watched):
    """By the scheduler's timesteps it is known where it is; by others it is not."""
    pipe, inputs = pipeline(), unet_inputs(1, 32, 32)
    with turbovlm.apply(pipe, keep=HALVES):
        seen = watched(pipe.unet)
        pipe.scheduler.set_timesteps(4)
        for timestep in pipe.scheduler.timesteps:
            pipe.unet(**{**inputs, "timestep": timestep})
        assert shares(seen) == [0.5, 0.5, 1, 1]
        pipe.scheduler.set_timesteps(4)
        pipe.unet(**{**inputs, "timestep": torch.tensor(700.5)})
        pipe.unet(**{**inputs, "timestep": torch.tensor(700.5)})
        with pytest.raises(StateError, match="nobody takes the scheduler's steps"):
            pipe.unet(**{**inputs, "timestep": torch.tensor(300.5)})


@torch.no_grad()
def test_a_loop_that_begins_in_the_middle_and_tells_no_scheduler(watched):
    """As Wan's from video to video does."""
    from diffusers import UniPCMultistepScheduler

    pipe, inputs = pipeline(), unet_inputs(1, 32, 32)
    pipe.scheduler = UniPCMultistepScheduler()
    with turbovlm.apply(pipe, keep={0: 0.5, 0.25: 0.625, 0.75: 1.0}):
        seen = watched(pipe.unet)
        pipe.scheduler.set_timesteps(4)
        latent = inputs["sample"]
        for timestep in pipe.scheduler.timesteps[2:]:
            noise_found = pipe.unet(**{**inputs, "sample": latent, "timestep": timestep.expand(1)}).sample
            latent = pipe.scheduler.step(noise_found, timestep, latent, return_dict=False)[0]
        assert shares(seen) == [0.625, 1]


def test_a_scheduler_has_to_tell():
    pipe, twin = pipeline(), pipeline()
    with pytest.raises(ConfigError, match=r"keep={0: 0.5, 0.5: 1.0}: a pipeline's scheduler .* apply to the pipeline"):
        turbovlm.apply(pipe.unet, keep=HALVES)
    with turbovlm.apply(pipe.unet, keep={0: 0.5}):
        pass
    twin.scheduler = pipe.scheduler
    with turbovlm.apply(pipe, keep=HALVES), pytest.raises(TurboError, match=r"keep={.*}: the .* is replaced already"):
        turbovlm.apply(twin, keep=HALVES)
    inside = pipe.scheduler.scale_model_input
    pipe.scheduler.scale_model_input = lambda *args, **kwargs: inside(*args, **kwargs)
    with pytest.raises(TurboError, match=r"the scale_model_input of this DDIMScheduler is replaced already"):
        turbovlm.apply(pipe, keep=HALVES)
    with turbovlm.apply(pipe, keep=0.5):
        image(pipe)
    del pipe.scheduler.scale_model_input
    with turbovlm.apply(pipe, keep=0.5):  # counts, but can do without
        alone = image(pipe)
        with turbovlm.apply(twin, keep=HALVES):
            assert not torch.equal(image(twin), alone)
            assert torch.equal(image(pipe), alone)


def test_a_cuda_graph_would_repeat_one_step(monkeypatch):
    pipe, inputs = pipeline(), unet_inputs(1, 32, 32)
    with turbovlm.apply(pipe, keep=HALVES):
        pipe.scheduler.set_timesteps(4)
        monkeypatch.setattr("turbovlm.diffusion.denoiser.is_captured", lambda x: True)
        with pytest.raises(StateError, match="a CUDA graph repeats what was kept in the step in which it was captured"):
            pipe.unet(**inputs)


def test_another_scheduler_is_followed(watched):
    from diffusers import EulerDiscreteScheduler

    pipe = pipeline()
    first, before = pipe.scheduler, dict(pipe.scheduler.__dict__)
    with turbovlm.apply(pipe, keep=HALVES):
        seen = watched(pipe.unet)
        pipe.scheduler = EulerDiscreteScheduler.from_config(first.config)
        image(pipe)
        assert shares(seen) == [0.5, 0.5, 1, 1] and first.__dict__.keys() == before.keys()


@pytest.mark.parametrize("nonsense", [None, 2, "half", (), [0.5, 0.1], float("nan")])
def test_a_function_that_returns_no_share(nonsense):
    def kept(progress):
        return nonsense

    def later(progress):
        return nonsense if progress >= 0.5 else 0.5

    pipe = pipeline()
    plain = image(pipe)
    with pytest.raises(ConfigError, match=r"keep: kept\(0\) has returned"):
        turbovlm.apply(pipe, keep=kept)
    assert not any(name in pipe.scheduler.__dict__ for name in ("step", "set_timesteps"))
    with turbovlm.apply(pipe, keep=later):
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"keep: later\(0.5\) has returned"):
                image(pipe)
    assert torch.equal(image(pipe), plain)


def test_another_keep_for_another_pass(watched):
    """The same pipeline again, from what it has made, larger."""
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe, larger = PIPES["text to image"](), PIPES["image to image"].inputs(128, 128)
    again = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    larger |= {"num_inference_steps": 4, "output_type": "latent", "strength": 0.5}

    def passes(first, second):
        with first():
            image(pipe)
        with second():
            return again(**larger, generator=torch.Generator().manual_seed(0)).images

    seen = watched(pipe.unet)
    apart = passes(lambda: turbovlm.apply(pipe, keep=0.75), lambda: turbovlm.apply(again, keep={0: 0.5, 0.7: 1.0}))
    assert shares(seen) == [0.75] * 4 + [0.5, 1.0]
    now = {"keep": 0.75}
    with turbovlm.apply(pipe, keep=lambda progress: 1.0 if progress >= now.get("whole", 1.0) else now["keep"]):
        seen.clear()
        image(pipe)
        now |= {"keep": 0.5, "whole": 0.7}
        together = again(**larger, generator=torch.Generator().manual_seed(0)).images
        assert shares(seen) == [0.75] * 4 + [0.5, 1.0]
    assert torch.equal(together, apart)


@pytest.mark.slow
@pytest.mark.parametrize("refresh", [1, 3])
def test_a_compiled_denoiser_has_a_graph_for_each_share(refresh):
    from torch._dynamo.testing import CompileCounter

    pipe, counter = pipeline(), CompileCounter()
    plain = image(pipe)
    with turbovlm.apply(pipe, keep={0: 0.5, 0.25: 0.75, 0.5: 0.5, 0.75: 1.0}, refresh=refresh):
        eager = image(pipe)
        torch.compiler.reset()
        pipe.unet.compile(fullgraph=True, backend=counter)
        torch.testing.assert_close(image(pipe), eager, rtol=0, atol=1e-4)
        assert counter.frame_count == 3
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(image(pipe), eager, rtol=0, atol=1e-4)
        with pytest.raises(Exception, match="no loop of the pipeline's scheduler is under way"):
            pipe.unet(**unet_inputs(2, 32, 32))
    torch.testing.assert_close(image(pipe), plain, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_blocks_compiled_by_themselves_are_compiled_for_no_share_again():
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    pipe, counters = PIPES["SDXL"](), (CompileCounter(), CompileCounter())
    inputs = PIPES["SDXL"].inputs(64, 64)

    def made():
        return pipe(**inputs, num_inference_steps=4, output_type="latent", generator=torch.Generator()).images

    with turbovlm.apply(pipe, keep={0: 0.5, 0.25: 0.75, 0.5: 1.0, 0.75: 0.6}):
        eager = made()
        pipe.unet.compile_repeated_blocks(fullgraph=True, backend=counters[0])
        for _ in range(2):
            torch.testing.assert_close(made(), eager, rtol=0, atol=1e-4 * float(eager.abs().max()))
            first = counters[0].frame_count
            assert first <= 4
        assert counters[0].frame_count == first


def test_of_a_compared_pipeline_all_steps_are_counted():
    pipe = PIPES["text to image"]()
    found = turbovlm.profile.compare_images(
        pipe,
        {"constant": DenoiseConfig(0.5), "over the steps": DenoiseConfig({0: 0.5, 0.75: 1.0})},
        size=(64, 64),
        steps=4,
        inputs={name: value for name, value in PIPES["text to image"].inputs(64, 64).items() if "embeds" in name},
        rounds=1,
        warmup=0,
    )
    own, constant, over = (run.macs for run in found.runs)
    assert over == pytest.approx(0.75 * constant + 0.25 * own, rel=1e-6) and constant < own


def test_the_zoo_of_denoisers_is_told_a_timestep():
    """By the name that their forwards have for it."""
    import inspect

    from turbovlm.diffusion.denoiser import TIMESTEPS

    for make in DENOISERS.values():
        assert set(TIMESTEPS) & set(inspect.signature(type(make()).forward).parameters)
