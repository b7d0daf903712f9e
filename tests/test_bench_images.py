"""`compare_images` and `turbovlm bench` of image generation: their books, not their seconds."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch

import turbovlm
from folders import stable_diffusion_folder
from turbovlm import ConfigError, DenoiseConfig, TurboError, UnsupportedModelError
from turbovlm.cli import main
from turbovlm.diffusion.inputs import denoiser_inputs
from turbovlm.loading import ModelSpec
from turbovlm.loading.pipelines import load_pipeline
from turbovlm.patching import patches_on
from turbovlm.profile import Comparison, Drift, Generation, Quartiles, Run, Timing, compare_images, macs

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from pipelines import PIPES  # noqa: E402

HALF = DenoiseConfig(keep=0.5)
QUICK = {"steps": 2, "rounds": 1, "warmup": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def pipe(folder):
    return load_pipeline(ModelSpec(f"diffusers:{folder}"), pretrained=True)


def bench(*argv):
    return main(["bench", *map(str, argv), "--rounds", "1", "--warmup", "0"])


def test_the_books_of_a_comparison(pipe):
    before, denoiser, scheduler = dict(pipe.__dict__), pipe.unet, dict(pipe.scheduler.__dict__)
    forwards = {name: dict(module.__dict__) for name, module in pipe.unet.named_modules()}
    configs, seen = {"all": DenoiseConfig(keep=1.0), "half": HALF}, []
    result = compare_images(pipe, configs, batch=2, steps=3, rounds=2, warmup=1, seed=5, progress=seen.append)
    assert [run.name for run in result.runs] == ["model", "all", "half"] and len(seen) == (2 + 1) * 3
    assert result.generation.size == (64, 64) and result.batch == 2 and result.clock == "process CPU time"
    for run in result.runs:
        image, step = run.timings["image"], run.timings["step"]
        assert len(image.seconds) == len(run.wall_seconds) == len(step.seconds) == 2
        assert all(0 < 3 * part < whole for part, whole in zip(step.seconds, image.seconds))
        assert min(image.peak_bytes, step.peak_bytes) > 0 and len(run.drifts) == 2
    for name in ("model", "all"):
        assert result.run(name).drift == Drift(0, math.inf, 0)
    for drift in result.run("half").drifts:
        assert drift.latent > 1e-4 and 0 < drift.psnr < 100 and 0 < drift.difference < 1
    assert result.macs_ratio("half") > result.macs_ratio("all") >= result.macs_ratio("model") == 1
    assert pipe.__dict__ == before and pipe.unet is denoiser and pipe.scheduler.__dict__ == scheduler
    assert {name: dict(module.__dict__) for name, module in pipe.unet.named_modules()} == forwards
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["height"] == 64 and plain["runs"][1]["drift"]["psnr"] is None and plain["rounds"] == 2
    assert plain["runs"][2]["drift"]["latent"] == result.run("half").drift.latent
    assert "half" in str(result) and "3 steps, seed 5" in str(result)


def test_drift_is_of_what_the_pipeline_makes(pipe):
    """The same images and latents as those of a user who applies turbovlm to the pipeline."""
    given = {"num_inference_steps": 2, "prompt": ["a cat", "a dog", "a cat"], "height": 48, "width": 80}

    def made(kind):
        generator = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
        return pipe(**given, output_type=kind, generator=generator).images.double()

    own = made("latent"), made("pt")
    with turbovlm.apply(pipe, HALF):
        merged = made("latent"), made("pt")
    more = {"size": (48, 80), "batch": 3, "seed": 3, "prompt": ["a cat", "a dog"]}
    drifts = compare_images(pipe, HALF, **more, **QUICK).run("keep=0.5").drifts
    for i, drift in enumerate(drifts):
        assert drift.latent == pytest.approx(float((own[0][i] - merged[0][i]).norm() / own[0][i].norm()), rel=1e-4)
        error = own[1][i] - merged[1][i]
        assert drift.difference == pytest.approx(float(error.abs().mean()), rel=1e-4)
        assert drift.psnr == pytest.approx(-10 * math.log10(float((error**2).mean())), rel=1e-4)


@pytest.mark.parametrize("family", ["text to image", "SDXL", "PixArt", "SD3", "FLUX"])
def test_every_family(family):
    kind = PIPES[family]
    pipe, inputs = kind(), kind.inputs(32, 48)
    result = compare_images(pipe, HALF, inputs=inputs, **QUICK)
    assert result.generation.size == (32, 48)
    assert result.baseline.drift.latent == 0 < result.run("keep=0.5").drift.latent
    assert result.macs_ratio("keep=0.5") > 1.05
    pipe.image_processor.register_to_config(vae_scale_factor=pipe.image_processor.config.vae_scale_factor * 4)
    pipe.vae_scale_factor *= 4  # that of the real ones, 8
    multiple = 8 if family in ("text to image", "SDXL") else 16
    with pytest.raises(ConfigError, match=f"multiples of {multiple} pixels"):
        compare_images(pipe, HALF, size=(32, 32 + multiple // 2), inputs=inputs, **QUICK)


def test_classes():
    pipe = PIPES["DiT"]()
    result = compare_images(pipe, HALF, batch=2, prompt=[3, 4], **QUICK)
    assert result.generation.size == (32, 32) and len(result.run("keep=0.5").drifts) == 2
    assert result.baseline.drift.latent == 0 < result.run("keep=0.5").drift.latent
    with pytest.raises(ConfigError, match="images of one size only"):
        compare_images(pipe, HALF, size=(64, 64), **QUICK)
    with pytest.raises(ConfigError, match="images of class numbers"):
        compare_images(pipe, HALF, prompt="a cat", **QUICK)


def test_multiply_accumulates_are_those_of_a_forward_on_average(pipe):
    configs = {"each": HALF, "second": DenoiseConfig(keep=0.5, refresh=2)}
    result = compare_images(pipe, configs, **QUICK)
    inputs = denoiser_inputs(pipe.unet, None, 2)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :16]
    assert result.baseline.macs == macs(pipe.unet.eval(), **inputs)
    with turbovlm.apply(pipe.unet, HALF):
        assert result.run("each").macs == macs(pipe.unet, **inputs)
    assert result.run("second").macs < result.run("each").macs


def test_versions_alternate_and_share_weights(pipe, monkeypatch):
    order = []
    draw = turbovlm.profile.pipelines.WatchedPipeline.draw

    def noted(self):
        order.append(self)
        assert self._denoisers["unet"] is not pipe.unet
        assert all(a is b for a, b in zip(self._denoisers["unet"].parameters(), pipe.unet.parameters()))
        draw(self)

    monkeypatch.setattr(turbovlm.profile.pipelines.WatchedPipeline, "draw", noted)
    compare_images(pipe, HALF, steps=1, rounds=3, warmup=0)
    first, second = order[:2]
    assert order == [first, second, second, first, first, second]


@pytest.mark.slow
def test_compiled_versions(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # `reset` leaves what other tests counted
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    pipe, config, compiled = PIPES["DiT"](), DenoiseConfig(keep=0.5, refresh=2), []
    settings = {"steps": 2, "rounds": 2, "warmup": 1, "compile": True}
    frames = torch._dynamo.utils.counters["frames"]
    result = compare_images(pipe, config, **settings, progress=lambda _: compiled.append(dict(frames)))
    assert compiled[1] == compiled[-1] and compiled[1]["total"] == compiled[1]["ok"]  # all of it in the warm-up
    plain = compare_images(pipe, config, **QUICK)
    assert result.compiled and "compiled" in result.conditions and not any(True for _ in patches_on(pipe.transformer))
    merged, same = result.run("keep=0.5"), plain.run("keep=0.5")
    assert merged.drift.latent == pytest.approx(same.drift.latent, rel=1e-3) and merged.macs == same.macs


def test_a_safety_checker_is_left_out(pipe):
    def blacken(*args, **kwargs):
        raise AssertionError("was asked")

    pipe.safety_checker, pipe.feature_extractor = torch.nn.Identity(), blacken
    compare_images(pipe, HALF, **QUICK)
    assert isinstance(pipe.safety_checker, torch.nn.Identity)


def test_ratios_are_paired_round_by_round():
    def run(name, cost, image, step, *drifts):
        return Run(name, cost, {"image": Timing(image, None), "step": Timing(step, None)}, (1.0,) * 3, 8, drifts)

    own = run("model", 10, (1.0, 2.0, 4.0), (0.2, 0.4, 0.8), Drift(0.0, math.inf, 0.0))
    other = run("a", 5, (0.5, 1.0, 2.0), (0.1, 0.1, 0.2), Drift(0.1, 20, 0.2), Drift(0.3, 40, 0.4))
    result = Comparison((own, other), 2, "x", "float32", 1, "clock", False, Generation((64, 96), 4, 0))
    assert result.speedup("a") == Quartiles(2, 2, 2) and result.speedup("a", "step") == Quartiles(4, 3, 4)
    assert result.seconds_per_image("a") == 0.5 and result.seconds_per_image("a", "step") == 0.05
    assert result.macs_ratio("a") == 2 and result.efficiency("a") == 4 / 2
    assert other.drift.latent == pytest.approx(0.2) and other.drift.psnr == 30 and "96×64" in str(result)
    plain = result.to_dict()
    assert (plain["height"], plain["width"], plain["steps"], plain["seed"]) == (64, 96, 4, 0)
    assert plain["runs"][1]["speedup"] == 2 and plain["runs"][1]["step_speedup_quartiles"] == [3, 4]
    assert plain["runs"][1]["step_seconds"] == [0.1, 0.1, 0.2] and plain["runs"][0]["drift"]["psnr"] is None
    assert result.table().splitlines() == [
        "                                                MACs  peak          PSNR",
        "              s/image  speed-up    quartiles   ratio    MB   drift    dB",
        "model  image        1    1.000x  1.000–1.000                0.0000  same",
        "       step       0.2    1.000x  1.000–1.000  1.000x",
        "a      image      0.5    2.000x  2.000–2.000                0.2000  30.0",
        "       step      0.05    4.000x  3.000–4.000  2.000x",
    ]
    assert "drift" not in result.table(drift=False)
    with pytest.raises(ConfigError, match="'b': no such run"):
        result.run("b")


@pytest.mark.parametrize(
    ("configs", "settings", "message"),
    [
        ([], {}, "at least one"),
        (turbovlm.TurboConfig(r=4), {}, "must be a DenoiseConfig"),
        ({"a": 4}, {}, r"configs\['a'\]=4"),
        (HALF, {"batch": 0}, "batch=0"),
        (HALF, {"steps": 0}, "steps=0"),
        (HALF, {"rounds": 1.5}, "rounds=1.5"),
        (HALF, {"warmup": 0, "compile": True}, "warmup=0"),
        (HALF, {"size": (64, 60)}, r"size=\(64, 60\): StableDiffusionPipeline makes images of multiples of 8"),
        (HALF, {"size": (0, 64)}, "two integers ≥ 1"),
        (HALF, {"prompt": 3}, "images of texts"),
        (HALF, {"prompt": []}, "images of texts"),
    ],
)
def test_bad_input(pipe, configs, settings, message):
    with pytest.raises(ConfigError, match=message):
        compare_images(pipe, configs, **settings)


def test_what_cannot_be_measured(pipe):
    with turbovlm.apply(pipe, HALF), pytest.raises(TurboError, match="accelerated already"):
        compare_images(pipe, HALF)
    with pytest.raises(UnsupportedModelError, match="no pipeline with a denoiser"):
        compare_images(pipe.unet, HALF)
    with pytest.raises(TurboError, match="has no text encoder"):
        compare_images(PIPES["text to image"](), HALF)


@pytest.mark.slow
def test_the_command_line_with_random_weights(folder, tmp_path, capsys):
    """No weights are needed, and none are read."""
    bare = tmp_path / "bare"
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            (bare / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (bare / file.relative_to(folder)).write_bytes(file.read_bytes())
    out = tmp_path / "bench.json"
    argv = [f"diffusers:{bare}", "--keep", "0.5", "0.75", "--image-size", "64", "80x48", "--dtype", "bfloat16"]
    assert bench(*argv, "--steps", "2", "--refresh", "2", "--json", out) == 0
    printed = capsys.readouterr().out
    assert "80x48 pixels, refresh=2" in printed and "keep=0.75" in printed and "…" not in printed
    assert "PSNR" not in printed.replace("drift and PSNR", "") and "--pretrained" in printed
    found = json.loads(out.read_text())
    assert list(found["images"]) == ["64x64", "80x48"] and not found["pretrained"]
    wide = found["images"]["80x48"]
    assert (wide["height"], wide["width"], wide["dtype"], wide["steps"]) == (48, 80, "bfloat16", 2)
    assert [run["name"] for run in wide["runs"]] == ["model", "keep=0.5", "keep=0.75"]
    assert bench(f"diffusers:{bare}", "--pretrained") == 2
    assert "diffusers could not load it" in capsys.readouterr().err


def test_the_command_line_with_weights(folder, tmp_path, capsys):
    plot, out = tmp_path / "drift.png", tmp_path / "bench.json"
    argv = [f"diffusers:{folder}", "--pretrained", "--keep", "0.5", "1.0", "0.9999", "--steps", "2", "--batch", "2"]
    more = ["--prompt", "a cat", "7", "--seed", "3", "--guidance-scale", "0", "--components", "attention", "ffn"]
    assert bench(*argv, *more, "--plot", plot, "--json", out) == 0
    printed = capsys.readouterr().out
    assert "attention and ffn alone" in printed and "PSNR" in printed and "same" in printed
    assert "…" not in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("diffusers:"))
    found = json.loads(out.read_text())
    half = found["images"]["64x64"]["runs"][1]
    assert half["drift"]["latent"] > 0 and len(half["drifts"]) == 2
    assert plot.stat().st_size > 10_000 and found["settings"]["prompt"] == ["a cat", "7"]
    pipe = load_pipeline(ModelSpec(f"diffusers:{folder}"), pretrained=True)
    given = {"prompt": ["a cat", "7"], "batch": 2, "seed": 3, "inputs": {"guidance_scale": 0.0}}
    again = compare_images(pipe, DenoiseConfig(keep=0.5, components=["attention", "ffn"]), **given, **QUICK)
    assert half["drift"]["latent"] == pytest.approx(again.run("keep=0.5").drift.latent, rel=1e-4)


def test_the_command_line_of_a_denoiser(folder, tmp_path, capsys):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    argv = [f"diffusers:{folder / 'unet'}", "--keep", "0.5", "--image-size", "128", "256x128", "--batch", "2"]
    assert bench(*argv, "--json", out, "--plot", plot) == 0
    assert "one forward, 256x128 pixels" in " ".join(capsys.readouterr().out.split()) and plot.stat().st_size > 10_000
    found = json.loads(out.read_text())["denoiser"]
    small, wide = (found[size]["runs"][0]["macs"] for size in ("128x128", "256x128"))
    assert 1.9 * small < wide < 3 * small and found["128x128"]["batch"] == 2
    assert bench(*argv[:3], "--pretrained") == 0
    assert "its own size" in " ".join(capsys.readouterr().out.split())


def test_the_emoji_pipeline(pipe, monkeypatch, capsys):
    from turbovlm_lab.zoo import emoji

    monkeypatch.setattr(emoji, "load_emoji_pipeline", lambda: pipe)
    assert bench("zoo:emoji", "--pretrained", "--keep", "0.5", "--steps", "2") == 0
    assert "zoo:emoji, 64x64 pixels" in capsys.readouterr().out


def test_another_share_in_later_steps(pipe, folder, monkeypatch, capsys):
    from turbovlm_lab.zoo import emoji

    monkeypatch.setattr(emoji, "load_emoji_pipeline", lambda: pipe)
    assert bench("zoo:emoji", "--pretrained", "--keep", "0.5", "0:0.5,0.5:1", "--steps", "2") == 0
    assert "keep=0:0.5,0.5:1" in capsys.readouterr().out
    assert bench(f"diffusers:{folder / 'unet'}", "--keep", "0:0.5,0.5:1") == 2
    assert "a pipeline's scheduler says when a step ends; apply to the pipeline" in capsys.readouterr().err
    for text in ("half", "0:0.5,1", "0:0.5:1", ""):
        with pytest.raises(SystemExit):
            bench("zoo:emoji", "--keep", text)
        assert f"{text!r} is no share such as 0.5; with commas the share" in capsys.readouterr().err


BAD = [
    (["--r", "4"], "--r: image generation takes --keep"),
    (["--flops", "0.5"], "--flops: image generation takes --keep"),
    (["--keep", "0.1"], "keep=0.1: must be ≥ 0.25"),
    (["--keep", "1.5"], "keep=1.5"),
    (["--keep", "0.1:0.5,0.5:1"], "keep=((0.1, 0.5), (0.5, 1.0)): the first progress must be 0"),
    (["--image-size", "64x"], "--image-size 64x: must be N or WIDTHxHEIGHT"),
    (["--image-size", "0"], "--image-size 0: must be N or WIDTHxHEIGHT"),
    (["--image-size", "64", "60x64"], "multiples of 8 pixels"),
    (["--steps", "0"], "--steps 0"),
    (["--batch", "0"], "--batch 0"),
    (["--refresh", "0"], "refresh=0"),
    (["--compile"], "--warmup 0"),
    (["--plot", "x.png"], "give --pretrained"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_options(folder, argv, message, capsys):
    assert bench(f"diffusers:{folder}", *argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


WRONG = [
    (["timm:vit_tiny_patch16_224", "--steps", "4"], "--steps has no place with an encoder"),
    (["timm:vit_tiny_patch16_224", "--refresh", "2"], "--refresh has no place with an encoder"),
    (["timm:vit_tiny_patch16_224", "--image-size", "96x96"], "--image-size 96x96: must be one integer"),
    (["timm:vit_tiny_patch16_224", "--image-size", "96", "64"], "--image-size 96 64: must be one integer"),
    (["diffusers:./no/such/folder"], "there is no such folder"),
    (["zoo:emoji"], "give --pretrained"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_what_does_not_go_together(argv, message, capsys):
    assert bench(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_folders_of_something_else(folder, tmp_path, capsys):
    assert bench(f"diffusers:{tmp_path}") == 2
    assert "neither a pipeline's model_index.json nor a denoiser's config.json" in capsys.readouterr().err
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "vae": ["os", "system"]}))
    assert bench(f"diffusers:{tmp_path}") == 2
    assert "os.system: only classes of diffusers and transformers" in capsys.readouterr().err
    assert bench(f"diffusers:{folder / 'unet'}", "--steps", "4") == 2
    assert "--steps: " in capsys.readouterr().err
    assert bench(f"diffusers:{folder / 'vae'}") == 2
    assert "AutoencoderKL is a model of diffusers without a block that turbovlm knows" in capsys.readouterr().err
