"""The command line with pipelines and denoisers: `inspect`, `bench` and `calibrate`, from folders."""

from __future__ import annotations

import json

import pytest
import torch

import turbovlm
from denoisers import DENOISERS
from folders import stable_diffusion_folder
from turbovlm import Calibration, DenoiseConfig, TurboConfig
from turbovlm.cli import main
from turbovlm.profile import compare_images

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from image_denoisers import IMAGE_DENOISERS  # noqa: E402
from video_denoisers import VIDEOS  # noqa: E402

QUICK = ("--rounds", "1", "--warmup", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion_folder(tmp_path_factory.mktemp("pipeline"))


def config_folder(tmp_path, model):
    """A denoiser's config, without weights."""
    model.save_config(tmp_path / "denoiser")
    return f"diffusers:{tmp_path / 'denoiser'}"


def handle_lines(model, size, frames=None):
    """What `print(handle)` says behind a forward of that size."""
    inputs = turbovlm.diffusion.inputs.denoiser_inputs(model, size, 1, frames)
    with turbovlm.apply(model, keep=0.5) as handle, torch.no_grad():
        model(**inputs)
        said = repr(handle)
    return [" ".join(line.split()) for line in said.splitlines() if "merges run on" not in line]


def printed(capsys):
    """What was printed, however it was wrapped."""
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("model", "size", "frames"),
    [
        (DENOISERS["sd15"], (96, 128), None),
        (DENOISERS["flux"], (192, 256), None),
        (IMAGE_DENOISERS["qwen"], (192, 256), None),
        (VIDEOS["wan"], (128, 160), 9),
    ],
    ids=["sd15", "flux", "qwen", "wan"],
)
def test_inspect_says_what_the_handle_would(model, size, frames, tmp_path, capsys):
    model, out = model(), tmp_path / "plan.json"
    argv = ["inspect", config_folder(tmp_path, model), "--image-size", f"{size[1]}x{size[0]}", "--json", str(out)]
    assert main([*argv, *(("--frames", str(frames)) if frames else ())]) == 0
    found = printed(capsys)
    assert all(line in found for line in handle_lines(model, size, frames))
    plan = json.loads(out.read_text())
    inputs = turbovlm.diffusion.inputs.denoiser_inputs(model, size, 1, frames)
    with turbovlm.apply(model, keep=0.5):
        assert plan["macs"][1] == turbovlm.profile.macs(model, **inputs)
    assert plan["macs"][0] == turbovlm.profile.macs(model, **inputs)
    assert any(tokens == 2 * left for tokens, left in (group["tokens"] for group in plan["groups"]))


@pytest.mark.parametrize("name", ["glm", "hidream", "qwen 2.1"])
def test_inspect_where_nothing_can_be_counted(name, tmp_path, capsys):
    argv = ["inspect", config_folder(tmp_path, IMAGE_DENOISERS[name]()), "--keep", "0.3", "--image-size", "512"]
    assert main(argv) == 0
    found = printed(capsys)
    assert "30% of the tokens in stacks" in found and "nothing can be counted without weights" in found


def test_inspect_a_pipeline_by_a_settings_file(folder, tmp_path, capsys):
    DenoiseConfig((0.5, 0.75), scope="block", refresh=2).save(tmp_path / "turbo.json")
    assert main(["inspect", f"diffusers:{folder}", "--settings", str(tmp_path / "turbo.json")]) == 0
    found = printed(capsys)
    assert "64x64 pixels" in found and "50%, 75% of the tokens in blocks, chosen in every second step" in found
    assert main(["inspect", f"diffusers:{folder}", "--keep", "0.5,0.75"]) == 0
    assert "50%, 75% of the tokens" in printed(capsys)


def test_inspect_a_trained_pipeline(capsys):
    assert main(["inspect", "zoo:drawings", "--keep", "0.5"]) == 0
    found = printed(capsys)
    assert "64x64 pixels, 32x32 patches" in found and "behind the first 4, which are left whole" in found


BAD = [
    (["inspect", "--r", "4"], "--r: a denoiser takes --keep"),
    (["inspect", "--visual-keep", "0.5"], "--visual-keep: a denoiser takes --keep"),
    (["inspect", "--image-size", "60"], "size=(60, 60): StableDiffusionPipeline makes images of multiples of 8 pixels"),
    (["inspect", "--image-size", "64x"], "--image-size 64x: must be N or WIDTHxHEIGHT"),
    (["inspect", "--frames", "9"], "--frames 9: UNet2DConditionModel makes images"),
    (["inspect", "--keep", "0.1"], "keep=0.1: must be ≥ 0.25"),
    (["inspect", "--keep", "0:0.5,0.5:1"], "one forward is inspected, which is of no step"),
    (["inspect", "--settings", "no/such.json"], "no/such.json: there is no such file"),
    (["bench", "--settings", "no/such.json"], "no/such.json: there is no such file"),
    (["bench", "--frames", "9"], "--frames 9: StableDiffusionPipeline makes images"),
    (["calibrate", "no/such.txt", "--flops", "0.9"], "no/such.txt: there is no such file"),
    (["calibrate", "no.txt", "--flops", "0.9", "--dense"], "--dense has no place with a pipeline"),
    (["calibrate", "no.txt", "--flops", "0.9", "--effort", "2"], "--effort has no place with a pipeline"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_options(folder, argv, message, capsys):
    assert main([argv[0], f"diffusers:{folder}", *argv[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_options_of_denoisers_are_refused_for_encoders(tmp_path, capsys):
    for argv in (["inspect", "--frames", "9"], ["inspect", "--settings", "x.json"], ["bench", "--frames", "9"]):
        assert main([argv[0], "timm:vit_tiny_patch16_224", *argv[1:]]) == 2
        assert f"{argv[1]} has no place with an encoder" in capsys.readouterr().err
    assert main(["inspect", "timm:vit_tiny_patch16_224", "--image-size", "96x96"]) == 2
    assert "--image-size 96x96: must be one integer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qwen", "ltx"])
def test_bench_a_denoiser_by_its_config(name, tmp_path, capsys):
    model = {**IMAGE_DENOISERS, **VIDEOS}[name]()
    folder, out = config_folder(tmp_path, model), tmp_path / "bench.json"
    frames = () if name == "qwen" else ("--frames", "17")
    size = "192x256" if name == "qwen" else "384x512"
    assert main(["bench", folder, "--image-size", size, *frames, "--json", str(out), *QUICK]) == 0
    assert f"one forward, {size} pixels" in capsys.readouterr().out
    own, *merged = json.loads(out.read_text())["denoiser"][size]["runs"]
    assert [run["name"] for run in merged] == ["keep=0.7", "keep=0.5"]
    assert own["macs"] > merged[0]["macs"] > merged[1]["macs"]


def test_bench_with_lists_of_keep_and_settings_files(folder, tmp_path, capsys):
    DenoiseConfig(0.5, scope="part").save(tmp_path / "parts.json")
    out = tmp_path / "bench.json"
    argv = ["bench", f"diffusers:{folder}", "--settings", str(tmp_path / "parts.json"), "--steps", "2", *QUICK]
    assert main([*argv, "--keep", "0.5,0.75", "0.6", "--json", str(out)]) == 0
    runs = json.loads(out.read_text())["images"]["64x64"]["runs"]
    assert [run["name"] for run in runs] == ["model", "keep=0.5,0.75", "keep=0.6", "parts.json"]
    capsys.readouterr()
    assert main(argv) == 0  # these alone
    found = printed(capsys)
    assert "parts.json" in found and "keep=" not in found
    assert main([*argv, "--refresh", "2"]) == 2
    assert "--refresh: it is of --keep" in capsys.readouterr().err


def test_bench_an_encoder_with_a_settings_file(tmp_path, capsys):
    pytest.importorskip("timm")
    TurboConfig(keep=0.5).save(tmp_path / "turbo.json")
    argv = ["bench", "timm:vit_tiny_patch16_224", "--settings", str(tmp_path / "turbo.json"), "--batch", "1", *QUICK]
    assert main(argv) == 0
    found = printed(capsys)
    assert "turbo.json" in found and "r=16" not in found
    DenoiseConfig(0.5).save(tmp_path / "turbo.json")
    assert main(argv) == 2
    assert "holds settings of DenoiseConfig" in capsys.readouterr().err


def test_videos_are_compared():
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.WanPipeline(None, None, vae.eval(), scheduler, VIDEOS["wan"]())
    words = {name: torch.randn(1, 7, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    given = {"size": (64, 96), "steps": 2, "rounds": 1, "warmup": 0, "inputs": {**words, "num_frames": 9}}
    found = compare_images(pipe, DenoiseConfig(0.5), **given)
    assert found.generation.size == (64, 96) and found.baseline.drift.latent == 0
    assert found.run("keep=0.5").drift.latent > 0 and found.macs_ratio("keep=0.5") > 1.5
    with pytest.raises(turbovlm.ConfigError, match="WanPipeline makes images of multiples of 16 pixels"):
        compare_images(pipe, DenoiseConfig(0.5), **{**given, "size": (64, 90)})


def test_calibrate_reads_prompts_and_writes_settings(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    asked = {}

    def calibrate(pipe, prompts, **given):
        asked.update(given, pipe=type(pipe).__name__, prompts=prompts)
        return Calibration(DenoiseConfig((0.5, 0.75)), 0.9, 0.01, 0.02, 0.8, 15, None, ((0.9, 0.01), (0.8, 0.02)))

    monkeypatch.setattr(turbovlm, "calibrate", calibrate, raising=False)
    (tmp_path / "prompts.txt").write_text("\n".join(f"a dog {i}\n" for i in range(40)))
    out = tmp_path / "turbo.json"
    argv = ["calibrate", f"diffusers:{folder}", str(tmp_path / "prompts.txt"), "--flops", "0.9", "--out", str(out)]
    assert main([*argv, "--limit", "30", "--steps", "2", "--image-size", "80x48", "--guidance-scale", "0"]) == 0
    assert asked["pipe"] == "StableDiffusionPipeline" and len(asked["prompts"]) == 30
    assert asked["prompts"][1] == "a dog 1" and asked["size"] == (48, 80) and asked["steps"] == 2
    assert asked["flops"] == 0.9 and asked["inputs"] == {"guidance_scale": 0.0} and asked["batch"] is None
    assert DenoiseConfig.load(out).keep == (0.5, 0.75) and out.with_suffix(".png").stat().st_size > 5000
    assert "settings: " in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("a dog\n")
    assert main(argv) == 2
    assert "holds 1 prompt, too few" in capsys.readouterr().err
    assert main(["calibrate", f"diffusers:{folder / 'unet'}", *argv[2:]]) == 2
    assert "too few" in capsys.readouterr().err


def test_calibrate_wants_a_pipeline(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(f"a dog {i}" for i in range(40)))
    argv = ["calibrate", f"diffusers:{folder / 'unet'}", str(tmp_path / "prompts.txt"), "--flops", "0.9"]
    assert main(argv) == 2
    assert "is a denoiser alone" in capsys.readouterr().err
