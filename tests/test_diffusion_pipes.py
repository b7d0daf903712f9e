"""Pipelines as they are called: batches, several images for a prompt, odd sizes, guidance on and off, refresh."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import turbovlm
from denoisers import unet_inputs
from prompted_pipelines import PIPES
from test_diffusion import precise, run
from turbovlm.diffusion import choose, rank

pytest.importorskip("diffusers")

OWN_NOISE = {"sd-inpaint", "sd-inpaint9", "sdxl-inpaint", "sd3-img2img", "sd-adapter", "flux-img2img", "flux-fill"}
"""Kinds whose batches differ from single runs by themselves, or that take no such batches: of images given once."""
KINDS = [kind for kind in PIPES if kind not in OWN_NOISE]


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_as_single_runs(kind):
    pipe, given = PIPES[kind](), PIPES[kind]
    exact = kind in ("sd-pix2pix", "flux-cfg")  # make much of rounding
    if exact:
        pipe.to(torch.float64)

    def images(*which):
        embeds = precise(given.prompt(list(which))) if exact else {}
        return given.run(pipe, 16, 20, which=which, num_inference_steps=3, **embeds)

    with turbovlm.apply(pipe, keep=0.5):
        together = images(0, 1)
        for row in (0, 1):
            assert gap(together[row], images(row)[0]) < (1e-9 if exact else 1e-4)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart", "flux"])
def test_two_images_of_a_prompt_are_as_two_runs(kind):
    pipe, given = PIPES[kind](), PIPES[kind]
    with turbovlm.apply(pipe, keep=0.5):
        together = given.run(pipe, 16, 20, seeds=(0, 5), num_images_per_prompt=2)
        for row, seed in enumerate((0, 5)):
            assert gap(together[row], given.run(pipe, 16, 20, seeds=(seed,))[0]) < 1e-4


@pytest.mark.parametrize("kind", PIPES)
def test_the_grid_is_that_of_the_latent(kind, monkeypatch):
    pipe, given = PIPES[kind](), PIPES[kind]
    chosen, seen = choose._choose, set()

    def noted(run, *args):
        seen.update(run.grids)
        return chosen(run, *args)

    monkeypatch.setattr(choose, "_choose", noted)
    rows, columns = (22, 36) if given.multiple == 2 else (17, 23)
    with turbovlm.apply(pipe, keep=0.5):
        given.run(pipe, rows, columns, num_inference_steps=2)
    by = given.multiple
    assert seen and seen <= {(1, rows // by, columns // by), (1, (rows + 1) // 2, (columns + 1) // 2)}


@pytest.mark.parametrize("kind", ["sd", "sd-lcm", "sdxl", "sd3", "flux-cfg"])
def test_guidance_may_come_and_go(kind):
    pipe, given = PIPES[kind](), PIPES[kind]
    off = {"true_cfg_scale" if kind == "flux-cfg" else "guidance_scale": 1.0}
    with turbovlm.apply(pipe, keep=0.5):
        alone = given.run(pipe, 16, 20, **off)
        guided = given.run(pipe, 16, 20)
        assert torch.equal(given.run(pipe, 16, 20, **off), alone)
        assert torch.equal(given.run(pipe, 16, 20), guided)
    assert kind == "sd-lcm" or not torch.equal(alone, guided)


def test_a_pipeline_from_another_shares_its_denoiser():
    from diffusers import AutoPipelineForImage2Image

    pipe = PIPES["sd"]()
    other, given = AutoPipelineForImage2Image.from_pipe(pipe, requires_safety_checker=False), PIPES["sd-img2img"]
    plain = given.run(other, 16, 20)
    with turbovlm.apply(pipe, keep=0.5):
        merged = given.run(other, 16, 20)
        assert turbovlm.get_handle(other).config.keep == 0.5 and not torch.equal(merged, plain)
    assert torch.equal(given.run(other, 16, 20), plain)


def test_perturbed_attention_beside_it():
    from diffusers import StableDiffusionPAGPipeline

    pipe, given = PIPES["sd"](), PIPES["sd"]
    pipe = StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False, pag_applied_layers="mid")
    pipe.set_progress_bar_config(disable=True)
    settings = {"pag_scale": 3.0, "num_inference_steps": 2}
    plain = given.run(pipe, 16, 20, **settings)
    with turbovlm.apply(pipe, keep=0.5):
        merged = given.run(pipe, 16, 20, **settings)
        assert gap(given.run(pipe, 16, 20, which=(0, 1), **settings)[:1], merged) < 1e-4
        assert not torch.equal(given.run(pipe, 16, 20, num_inference_steps=2, pag_scale=0.0), merged)
    assert torch.equal(given.run(pipe, 16, 20, **settings), plain)


def test_free_u_and_the_decoder_in_tiles():
    pipe, given = PIPES["sd"](), PIPES["sd"]
    with turbovlm.apply(pipe, keep=0.5):
        merged = given.run(pipe, 16, 20)
        pipe.enable_freeu(0.9, 0.2, 1.5, 1.6)
        assert not torch.equal(given.run(pipe, 16, 20), merged)
        pipe.disable_freeu()
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
        assert given.run(pipe, 16, 20, output_type="pt").shape == (1, 3, 128, 160)
        assert torch.equal(given.run(pipe, 16, 20), merged)


def test_what_is_saved_is_the_plain_pipeline(tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe, given = PIPES["sd"](), PIPES["sd"]
    plain = given.run(pipe, 16, 20)
    nothing = dict.fromkeys(("safety_checker", "text_encoder", "tokenizer", "feature_extractor", "image_encoder"))
    with turbovlm.apply(pipe, keep=0.5, refresh=2):
        given.run(pipe, 16, 20)
        pipe.save_pretrained(tmp_path)
    assert not any(b"turbovlm" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, **nothing, requires_safety_checker=False)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(given.run(loaded, 16, 20), plain)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_two_prompts_of_one_seed_are_as_two_runs(kind):
    pipe, given = PIPES[kind](), PIPES[kind]
    with turbovlm.apply(pipe, keep=0.5):
        together = given.run(pipe, 16, 20, which=(0, 1), seeds=(3, 3), num_inference_steps=2)
        alone = given.run(pipe, 16, 20, which=(0,), seeds=(3,), num_inference_steps=2)
    assert gap(together[:1], alone) < 1e-4


def test_a_run_leaves_nothing_to_the_next():
    pipe, given, inputs = PIPES["sd"](), PIPES["sd"], unet_inputs(2, 16, 20)
    with turbovlm.apply(pipe, keep=0.5, refresh=3):
        given.run(pipe, 16, 20)
        first = run(pipe.unet, inputs)
        assert torch.equal(run(pipe.unet, inputs), first)


@pytest.mark.parametrize("refresh", [1, 2])
def test_guidance_in_two_forwards_decides_once_for_both(monkeypatch, refresh):
    compare, seen = rank.mutual_redundancy, []
    monkeypatch.setattr(rank, "mutual_redundancy", lambda *args, **how: (seen.append(1), compare(*args, **how))[1])
    pipe, given = PIPES["flux-cfg"](), PIPES["flux-cfg"]
    with turbovlm.apply(pipe, keep=0.5, refresh=refresh):
        given.run(pipe, num_inference_steps=4)
        groups = len({site.group for site in turbovlm.get_handle(pipe).features[0].sites})
    assert len(seen) == 4 // refresh * groups


def test_guidance_by_skipped_layers():
    pipe, given = PIPES["sd3"](), PIPES["sd3"]
    skipped = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with turbovlm.apply(pipe, keep=0.5):
        assert given.run(pipe, 16, 20, **skipped).isfinite().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_of_a_pipeline_counts_its_own_steps(copied):
    pipe, given = PIPES["sd"](), PIPES["sd"]
    with turbovlm.apply(pipe, keep=0.5, refresh=3):
        merged = given.run(pipe, 16, 20)
        twin = copied(pipe)
        assert torch.equal(given.run(twin, 16, 20), merged) and torch.equal(given.run(pipe, 16, 20), merged)
    assert torch.equal(given.run(twin, 16, 20), merged)
    turbovlm.get_handle(twin).remove()
    assert not {"step", "set_timesteps"} & set(twin.scheduler.__dict__)
    assert torch.equal(given.run(twin, 16, 20), given.run(pipe, 16, 20))


def test_a_copy_of_a_pipeline_gives_its_scheduler_back():
    pipe = PIPES["sd"]()
    with turbovlm.apply(pipe, keep=0.5, refresh=2):
        twin = copy.deepcopy(pipe)
    turbovlm.get_handle(twin).remove()
    plain = PIPES["sd"].run(pipe, 16, 20)
    assert torch.equal(PIPES["sd"].run(twin, 16, 20), plain)
    assert "step" not in twin.scheduler.__dict__
