"""What is decided once and used often: by several steps, by both halves of guidance, by all parts of a group."""

from __future__ import annotations

import copy

import pytest
import torch

import turbovlm
from denoisers import DENOISERS, noise, unet_inputs, words
from test_diffusion import image, in_a_run, pipeline, run
from turbovlm.diffusion import rank
from turbovlm.diffusion.choose import mean_attention, text_attention
from turbovlm.diffusion.run import find_same_latents
from turbovlm.errors import ConfigError, TurboError

pytest.importorskip("diffusers")


@pytest.fixture
def decisions(monkeypatch):
    """The number of tokens compared, at each comparison."""
    seen, compare = [], rank.mutual_redundancy

    def counted(features, split, **how):
        seen.append(features.shape[1])
        return compare(features, split, **how)

    monkeypatch.setattr(rank, "mutual_redundancy", counted)
    return seen


def feature_of(model):
    return turbovlm.get_handle(model).features[0]


def merges_of(model):
    """The merges of the last forward, by group."""
    return {key: choice.merge for key, choice in feature_of(model).last.items() if choice.merge is not None}


@pytest.mark.parametrize(("refresh", "steps"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_refresh_decides_every_kth_step(decisions, refresh, steps):
    pipe = pipeline()
    with turbovlm.apply(pipe, keep=0.5, refresh=refresh):
        first = image(pipe)
        groups = len({site.group for site in feature_of(pipe).sites})
        assert len(decisions) == steps * groups
        assert torch.equal(image(pipe), first) and len(decisions) == 2 * steps * groups
        other = image(pipe, height=40, width=88)
        assert len(decisions) == 3 * steps * groups and other.isfinite().all()


def test_a_scheduler_is_followed_and_given_back(decisions):
    from diffusers import DPMSolverMultistepScheduler

    pipe = pipeline()
    first, plain = pipe.scheduler, image(pipe)
    before = dict(first.__dict__)
    handle = turbovlm.apply(pipe, keep=0.5, refresh=4)
    assert {"step", "set_timesteps"} <= set(first.__dict__)
    pipe.scheduler = second = DPMSolverMultistepScheduler.from_config(first.config)
    image(pipe)
    assert len(decisions) == len({site.group for site in feature_of(pipe).sites})
    assert not {"step", "set_timesteps"} & set(first.__dict__)
    handle.remove()
    assert not {"step", "set_timesteps"} & set(second.__dict__)
    pipe.scheduler = first
    assert torch.equal(image(pipe), plain)
    assert set(first.__dict__) == set(before)


def test_what_wraps_the_scheduler_later_stays():
    pipe = pipeline()
    handle, steps = turbovlm.apply(pipe, keep=0.5, refresh=2), []
    inside = pipe.scheduler.step

    def step(*args, **kwargs):
        steps.append(args[1])
        return inside(*args, **kwargs)

    pipe.scheduler.step = step
    merged = image(pipe)
    counted = len(steps)
    handle.remove()
    assert pipe.scheduler.step is step and "set_timesteps" not in pipe.scheduler.__dict__
    plain = image(pipe)
    assert len(steps) == 2 * counted > 0 and not torch.equal(plain, merged)
    del pipe.scheduler.step
    assert torch.equal(image(pipe), plain)


def test_a_run_that_failed_leaves_no_merges(decisions):
    pipe, inputs = pipeline(), unet_inputs(1, 32, 32)
    fails = pipe.unet.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with turbovlm.apply(pipe, keep=0.5, refresh=4):
        with pytest.raises(ZeroDivisionError):
            image(pipe)
        fails.remove()
        decisions.clear()
        run(pipe.unet, inputs)
        once = len(decisions)
        run(pipe.unet, inputs)
        assert len(decisions) == 2 * once > 0


def test_a_forward_that_nobody_counts_decides(decisions):
    pipe, inputs = pipeline(), unet_inputs(1, 32, 32)
    with turbovlm.apply(pipe, keep=0.5, refresh=4):
        run(pipe.unet, inputs)
        once = len(decisions)
        run(pipe.unet, inputs)
        assert len(decisions) == 2 * once
        run(copy.deepcopy(pipe.unet), inputs)
        assert len(decisions) == 3 * once


def test_a_sampler_that_takes_no_steps_of_the_scheduler(decisions):
    """It is no loop: its latents are neither kept nor, changed in place, taken for those of a forward before."""
    pipe, inputs = pipeline(), unet_inputs(1, 32, 32)
    with turbovlm.apply(pipe, keep=0.5):
        steps, seen = feature_of(pipe).steps, []
        pipe.scheduler.set_timesteps(30)
        for turn in range(40):
            inputs["sample"].copy_(noise(turn, 1, 4, 32, 32))
            run(pipe.unet, inputs)
            seen.append(len(decisions))
        assert seen == [seen[0] * (turn + 1) for turn in range(40)]
        assert not steps.counting and len(steps._latents) <= 16


def test_a_scheduler_that_cannot_be_counted_with():
    class Holding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet, self.scheduler = pipeline().unet, "ddim"

    with turbovlm.apply(Holding(), keep=0.5):
        pass
    with pytest.raises(TurboError, match="refresh=2: the pipeline's scheduler, a str, has no set_timesteps"):
        turbovlm.apply(Holding(), keep=0.5, refresh=2)


def test_a_shared_scheduler_counts_for_the_pipeline_with_refresh(decisions):
    pipe, twin = pipeline(), pipeline()
    twin.scheduler = pipe.scheduler
    own = dict(pipe.scheduler.__dict__)
    with turbovlm.apply(pipe, keep=0.5):
        alone = image(pipe)
        each = len(decisions)
        with turbovlm.apply(twin, keep=0.5, refresh=9):
            decisions.clear()
            image(twin)
            assert len(decisions) * 4 == each
            assert torch.equal(image(pipe), alone)
    assert pipe.scheduler.__dict__.keys() == own.keys()


def test_a_shared_scheduler_that_cannot_be_had_is_left_as_it_was():
    pipe, twin = pipeline(), pipeline()
    twin.scheduler = pipe.scheduler
    with turbovlm.apply(pipe, keep=0.5):
        inside = pipe.scheduler.step
        pipe.scheduler.step = lambda *args, **kwargs: inside(*args, **kwargs)
        before = dict(pipe.scheduler.__dict__)
        with pytest.raises(TurboError, match="step of this DDIMScheduler is replaced already"):
            turbovlm.apply(twin, keep=0.5, refresh=2)
        assert pipe.scheduler.__dict__ == before and "set_timesteps" in before


def test_refresh_needs_a_pipeline():
    pipe = pipeline()
    with pytest.raises(ConfigError, match="refresh=2: a pipeline's scheduler says when a step ends"):
        turbovlm.apply(pipe.unet, keep=0.5, refresh=2)
    with pytest.raises(ConfigError, match=r"refresh=0: it must be an integer ≥ 1"):
        turbovlm.apply(pipe, keep=0.5, refresh=0)
    with turbovlm.apply(pipe, keep=0.5, refresh=2):
        twin = pipeline()
        twin.scheduler = pipe.scheduler
        with pytest.raises(TurboError, match="set_timesteps of this DDIMScheduler is replaced already"):
            turbovlm.apply(twin, keep=0.5, refresh=2)
        with pytest.raises(TurboError, match="not accelerated"):
            turbovlm.get_handle(twin)


def test_what_fails_leaves_the_scheduler_as_it_was():
    """A method of it that is another library's, and a cache below the merge."""
    from diffusers import PyramidAttentionBroadcastConfig

    pipe = pipeline()
    pipe.scheduler.step = pipe.scheduler.step
    with pytest.raises(TurboError, match="the step of this DDIMScheduler is replaced already"):
        turbovlm.apply(pipe, keep=0.5, refresh=2)
    assert "set_timesteps" not in pipe.scheduler.__dict__
    del pipe.scheduler.step
    pipe.unet, blocks = DENOISERS["flux"](), ("transformer_blocks",)
    pipe.unet.enable_cache(
        PyramidAttentionBroadcastConfig(2, current_timestep_callback=int, spatial_attention_block_identifiers=blocks)
    )
    with pytest.raises(TurboError, match="enable the cache after"):
        turbovlm.apply(pipe, keep=0.5, refresh=2)
    assert not {"step", "set_timesteps"} & set(pipe.scheduler.__dict__)
    pipe.unet.disable_cache()
    turbovlm.apply(pipe, keep=0.5, refresh=2).remove()
    pipe.scheduler = None
    with pytest.raises(ConfigError, match="refresh=2: a pipeline's scheduler says when a step ends"):
        turbovlm.apply(pipe, keep=0.5, refresh=2)


@pytest.mark.slow
def test_a_compiled_denoiser_has_one_graph_that_decides_and_one_that_does_not():
    pipe = pipeline()
    with turbovlm.apply(pipe, keep=0.5, refresh=2):
        eager = image(pipe)
        torch.compiler.reset()
        pipe.unet.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(image(pipe), eager, rtol=0, atol=1e-4)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(image(pipe), eager, rtol=0, atol=1e-4)


def test_both_halves_of_guidance_merge_alike():
    pipe = pipeline()
    with turbovlm.apply(pipe, keep=0.5, scope="part"):
        image(pipe)
        merges = list(merges_of(pipe).values())
    assert len(merges) == 6 and all(len(merge.source) == 2 for merge in merges)
    assert all(torch.equal(merge.source[0], merge.source[1]) for merge in merges)


def test_other_images_never_merge_alike():
    pipe = pipeline()
    prompt = {"prompt_embeds": noise(5, 2, 7, 32), "negative_prompt_embeds": noise(6, 2, 7, 32)}

    def images(rows):
        seeds = [torch.Generator().manual_seed(row) for row in rows]
        embeds = {name: value[rows] for name, value in prompt.items()}
        return pipe(**embeds, num_inference_steps=3, output_type="latent", generator=seeds).images

    with turbovlm.apply(pipe, keep=0.5):
        together = images([0, 1])
        source = next(iter(merges_of(pipe).values())).source
        assert torch.equal(source[0], source[2]) and not torch.equal(source[0], source[1])
        for row in (0, 1):
            torch.testing.assert_close(images([row])[0], together[row], rtol=0, atol=1e-4 * float(together.abs().max()))


@pytest.mark.parametrize("prompts", [2, 3])
def test_prompts_of_one_seed_never_merge_alike(prompts):
    """Three prompts in halves are as many latents as two in thirds."""
    pipe = pipeline()
    embeds = {"prompt_embeds": noise(5, prompts, 7, 32), "negative_prompt_embeds": noise(6, prompts, 7, 32)}

    def images(rows):
        some, seeds = {k: v[rows] for k, v in embeds.items()}, [torch.Generator().manual_seed(0) for _ in rows]
        return pipe(**some, num_inference_steps=2, output_type="latent", generator=seeds).images

    with turbovlm.apply(pipe, keep=0.5):
        together = images(list(range(prompts)))
        for row in range(prompts):
            far = 1e-4 * float(together.abs().max())
            torch.testing.assert_close(images([row])[0], together[row], rtol=0, atol=far)


def test_an_image_that_is_not_finite_changes_no_other():
    model, inputs = DENOISERS["sd15"](), unet_inputs(3, 16, 16)
    with turbovlm.apply(model, keep=0.5):
        good = run(model, inputs)
        inputs["sample"][1] = float("nan")
        assert torch.equal(run(model, inputs)[::2], good[::2])


def test_same_latents_are_found():
    latent = noise(0, 2, 4, 8, 8)
    halves = find_same_latents(torch.cat([latent, latent[1:], latent[1:]]))
    assert torch.equal(halves, torch.tensor([[1, 0, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 1, 0], [0, 0.5, 0, 0.5]]))
    assert torch.equal(find_same_latents(latent[:1].expand(3, 4, 8, 8)), torch.full((3, 3), 1 / 3))
    assert torch.equal(find_same_latents(latent[:1].expand(6, 4, 8, 8)), torch.eye(3).repeat(2, 2) / 2)
    assert torch.equal(find_same_latents(latent.repeat(3, 1, 1, 1)), torch.eye(2).repeat(3, 3) / 3)
    assert torch.equal(find_same_latents(torch.full((2, 4), torch.nan)), torch.eye(2))


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True])
def test_attention_rows_are_those_of_the_definition(lora):
    """Both ways of computing them: by one vector per head, and by all projected tokens, for projections not plain."""
    block = DENOISERS["sd15"]().down_blocks[0].attentions[0].transformer_blocks[0]
    x, text = noise(1, 2, 256, 32), words(2)
    rows = {}
    for path, guide, asked in (("attn1", x, "to_k"), ("attn2", text, "to_q")):
        attention = getattr(block, path)
        mean = guide.mean(dim=1, keepdim=True)
        query = (attention.to_q(mean) if path == "attn1" else attention.to_k(mean)).view(2, 1, 8, 4)
        made = getattr(attention, asked)(x).view(2, 256, 8, 4)
        rows[path] = (made * query).sum(-1).mul(4**-0.5).softmax(dim=1).mean(dim=2)
        if lora:
            setattr(attention, asked, torch.nn.Sequential(getattr(attention, asked)))
    torch.testing.assert_close(mean_attention(block.attn1, x), rows["attn1"])
    torch.testing.assert_close(text_attention(block.attn2, x, text, None), rows["attn2"])
    padded = torch.cat([text, noise(9, 2, 3, 32)], dim=1)
    bias = torch.zeros(2, 1, 10)
    bias[..., 7:] = -10000.0
    torch.testing.assert_close(text_attention(block.attn2, x, padded, bias), rows["attn2"])


def test_cross_attention_is_guided_by_the_text():
    model, inputs = DENOISERS["sd15"](), unet_inputs(1, 32, 32)
    with turbovlm.apply(model, keep=0.5, scope="part", degree="weighted_difference", alpha=1000):
        run(model, inputs)
        first = {key: merge.rows for key, merge in merges_of(model).items()}
        run(model, {**inputs, "encoder_hidden_states": noise(8, 1, 7, 32)})
        second = {key: merge.rows for key, merge in merges_of(model).items()}
    own, text = "down_blocks.0:0", "down_blocks.0:0, by the text"
    assert torch.equal(first[own], second[own]) and not torch.equal(first[text], second[text])


@torch.no_grad()
def test_large_images_merge_within_bands():
    model = DENOISERS["sd15"]()
    with turbovlm.apply(model, keep=0.3):
        block = model.down_blocks[0].attentions[0].transformer_blocks[0]
        _, run = in_a_run(model, block, noise(3, 1, 96 * 96, 32), encoder_hidden_states=words(1))
        merge = run.choices["down_blocks.0:0"].merge
    band = torch.arange(96 * 96) // (96 * 96 // 2)
    assert torch.equal(band[merge.kept.gather(1, merge.source)[0]], band)
