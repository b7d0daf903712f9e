"""The command line, run in-process."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from turbovlm.cli import main
from vlms import VLMS, blip, blip2, seeded, vision_encoder_decoder

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")


@pytest.fixture
def folder(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


COMMANDS = ("inspect", "bench", "calibrate", "embed", "macs", "doctor", "demo", "evaluate", "reproduce", "studio")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_teaches_by_example_in_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and max(map(len, printed.splitlines())) <= 80


def test_inspect_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["inspect", folder, "--r", "2", "--json", str(out)]) == 0
    assert "encoder.layer.2" in capsys.readouterr().out.replace("\n", "")
    encoder = json.loads(out.read_text())["encoders"][0]
    assert encoder["tokens"] == [17, 14, 14, 11] and len(encoder["blocks"]) == 3


ACROSS = {
    "blip": lambda: blip("ConditionalGeneration"),
    "blip2": blip2,
    "vision_encoder_decoder": vision_encoder_decoder,
}


@pytest.mark.parametrize("family", [*VLMS, *ACROSS])
def test_inspect_says_what_is_read(family, tmp_path, capsys):
    """For one square image or tile, as many tokens as the model itself makes of it."""
    build = VLMS[family].make if family in VLMS else ACROSS[family]
    model = seeded(build)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    out = tmp_path / "plan.json"
    size = "112" if family in ("qwen2_vl", "qwen2_5_vl") else "128"
    sized = ["--image-size", size] if "qwen" in family else []
    assert main(["inspect", str(tmp_path), "--visual-keep", "0.5", *sized, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    tokens = {"llava_next": 36, "llava_onevision": 36, "qwen2_vl": 16, "qwen2_5_vl": 16, "qwen3_vl": 16}.get(family)
    if tokens is None:
        tokens = VLMS[family].image(0)[0] if family in VLMS else 36
    assert found["reading"]["tokens"] == [tokens, (tokens + 1) // 2] and found["encoders"] == []
    assert f"{(tokens + 1) // 2} of the {tokens} visual tokens would be read" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        ("timm:vit_tiny_patch16_224", 197),
        ("torchvision:vit_b_32", 50),
        ("open_clip:ViT-B-32", 50),
        ("timm:vit_tiny_patch16_224 --image-size 96", 37),
    ],
)
def test_inspect_and_macs_by_name(spec, tokens, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["inspect", *spec.split(), "--keep", "0.5", "--json", str(out)]) == 0
    left = json.loads(out.read_text())["encoders"][0]["tokens"]
    assert left[0] == tokens and left[-1] == round(tokens / 2)
    assert main(["macs", *spec.split(), "--flops", "0.7", "--json", str(out)]) == 0
    row = json.loads(out.read_text())["encoders"][0]
    assert row["macs_merged"] / row["macs"] == pytest.approx(0.7, abs=0.02)
    capsys.readouterr()


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_macs_of_families_with_inputs_of_their_own(tmp_path, capsys):
    small = SMALL
    made = {
        "BlipVisionModel": transformers.BlipVisionConfig(**small, image_size=48, patch_size=8),
        "Blip2VisionModel": transformers.Blip2VisionConfig(**small, image_size=48, patch_size=8),
        "Siglip2VisionModel": transformers.Siglip2VisionConfig(**small, num_patches=36, patch_size=8),
        "VideoMAEModel": transformers.VideoMAEConfig(**small, image_size=48, patch_size=16, num_frames=4),
    }
    for name, config in made.items():
        config.architectures = [name]
        config.save_pretrained(tmp_path / name)
        assert main(["macs", str(tmp_path / name), "--r", "3"]) == 0
        assert "GMACs" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_so150m_patch16_reg4_map_256"])
def test_macs_with_a_convolutional_stem_or_a_pooling_query(name, capsys):
    pytest.importorskip("timm")
    assert main(["macs", f"timm:{name}", "--r", "2"]) == 0
    assert re.search(r"^VisionTransformer +\d+ +[\d.]+ +\d+ +[\d.]+ +[\d.]+%$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_the_papers_numbers_beside_ours(tmp_path, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    out = tmp_path / "paper.json"
    assert main(["macs", "--paper", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "717.5" in text and "r=39" in text and "330.2" in text
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 27 and rows[0]["image_size"] == 480
    assert rows[0]["gmacs"] == pytest.approx(rows[0]["printed_gmacs"], rel=0.008)


def test_without_rich_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["inspect", "timm:vit_tiny_patch16_224"]) == 2
    assert "pip install 'turbovlm[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "library"), [(["inspect", "timm:x"], "timm"), (["macs", "--paper"], "torchvision")])
def test_without_a_library_it_says_what_to_install(argv, library, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else found(name))
    assert main(argv) == 2
    assert f"pip install 'turbovlm[{library}]'" in capsys.readouterr().err


def test_no_weights_are_fetched(monkeypatch, capsys):
    pytest.importorskip("torchvision")
    pytest.importorskip("open_clip")

    def refuse(*args, **kwargs):
        raise AssertionError("weights asked for")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert main(["inspect", "torchvision:fasterrcnn_resnet50_fpn"]) == 2
    assert "no block that turbovlm can accelerate" in capsys.readouterr().err
    asked = {}
    monkeypatch.setattr("open_clip.create_model", lambda name, **settings: asked.update(settings) or refuse())
    assert main(["inspect", "open_clip:roberta-ViT-B-32"]) == 2
    assert asked["load_weights"] is False and asked["pretrained_text"] is False
    capsys.readouterr()


@pytest.mark.parametrize("spec", ["timm:vit_tiny_patch16_224", "open_clip:ViT-B-32"])
def test_nothing_but_the_result_is_written(spec, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("open_clip")
    assert main(["inspect", spec]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "blocks would be accelerated" in captured.out


def test_a_folder_without_a_usable_config(tmp_path, capsys):
    for content, message in [
        (None, "could not load it"),
        ({"model_type": "vit", "hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "could not load it"),
    ]:
        if content is not None:
            (tmp_path / "config.json").write_text(json.dumps(content))
        assert main(["inspect", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error and str(tmp_path) in error and error.count("\n") == 1


def test_an_image_size_where_there_is_none(tmp_path, capsys):
    config = transformers.Siglip2VisionConfig(**SMALL, num_patches=36, patch_size=8)
    config.architectures = ["Siglip2VisionModel"]
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--image-size", "96"]) == 2
    assert "--image-size 96" in capsys.readouterr().err


def test_bench_measures_prints_and_writes(folder, tmp_path, capsys):
    out = tmp_path / "bench.json"
    plot = tmp_path / "bench.png"
    argv = ["bench", folder, "--r", "2", "1", "--batch", "2", "--rounds", "2", "--warmup", "0"]
    assert main([*argv, "--json", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "r=2" in printed and "process CPU time" in printed and "…" not in printed
    encoder = json.loads(out.read_text())["encoders"]["Dinov2Model"]
    assert encoder["batch"] == 2 and encoder["rounds"] == 2 and encoder["dtype"] == "float32"
    assert [run["name"] for run in encoder["runs"]] == ["model", "r=2", "r=1"]
    assert plot.stat().st_size > 10_000


def test_bench_loads_weights_where_asked(tmp_path, capsys, monkeypatch):
    config = transformers.Dinov2Config(**{**SMALL, "image_size": 56, "patch_size": 14})
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    asked = []
    load = transformers.Dinov2Model.from_pretrained
    monkeypatch.setattr(
        transformers.Dinov2Model, "from_pretrained", lambda *a, **k: (asked.append(a), load(*a, **k))[1]
    )
    argv = ["bench", str(tmp_path), "--r", "2", "--batch", "1", "--rounds", "1", "--warmup", "0", "--dtype", "bfloat16"]
    assert main(argv) == 0 and not asked
    assert main([*argv, "--pretrained"]) == 0 and asked == [(str(tmp_path),)]
    assert "bfloat16" in capsys.readouterr().out


BAD = [
    (["bench", "timm:vit_tiny_patch16_224", "--batch", "0"], "--batch 0"),
    (["bench", "timm:vit_tiny_patch16_224", "--rounds", "0"], "--rounds 0"),
    (["bench", "timm:vit_tiny_patch16_224", "--warmup", "0", "--compile"], "--warmup 0"),
    (["bench", "timm:vit_tiny_patch16_224", "--r", "4", "-4"], "r=-4"),
    (["bench", "timm:vit_tiny_patch16_224", "--device", "gpu"], "--device gpu"),
    (["bench", "timm:vit_tiny_patch16_224", "--device", "meta"], "--device meta"),
    (["bench", "timm:vit_tiny_patch16_224", "--plot", "x.bmp"], "--plot x.bmp"),
    (["bench", "zoo:saliency"], "give --pretrained"),
    (["bench", "zoo:nothing"], "there are zoo:clip, zoo:drawings, zoo:emoji, zoo:moving, zoo:pairs, zoo:saliency"),
    (["bench", "open_clip:ViT-B-32", "--pretrained"], "hf-hub:ID or local-dir:FOLDER"),
    (["inspect", "timm:no_such_model"], "Unknown model"),
    (["inspect", "timm:swin_tiny_patch4_window7_224"], "hierarchy of stages"),
    (["inspect", "/no/such/folder"], "no such folder"),
    (["inspect", "open_clip:no_such_model"], "no_such_model"),
    (["inspect", "open_clip:hf-hub:me/mine"], "open_clip:hf-hub:me/mine: "),
    (["inspect", "torchvision:no_such_model"], "Unknown model"),
    (["macs", "--paper", "--r", "4"], "--r has no place beside --paper"),
    (["macs", "--paper", "--image-size", "96"], "--image-size has no place beside --paper"),
    (["macs", "zoo:emoji"], "zoo:emoji: makes images, and is no encoder; turbovlm inspect"),
    (["inspect", "keras:vit"], "'keras' is none of transformers, timm"),
    (["inspect", "timm:vit_tiny_patch16_224", "--r", "-3"], "r=-3"),
    (["inspect", "timm:vit_tiny_patch16_224", "--keep", "1.5"], "keep=1.5"),
    (["inspect", "timm:vit_tiny_patch16_224", "--image-size", "0"], "--image-size 0"),
    (["inspect", "torchvision:vit_b_16", "--image-size", "97"], "could not load it"),
    (["inspect", "timm:vit_tiny_patch16_224", "--json", "/no/such/folder/x.json"], "--json /no/such/folder/x.json"),
    (["macs"], "MODEL or --paper"),
    (["macs", "timm:vit_tiny_patch16_224", "--paper"], "MODEL or --paper"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_message_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


UNWRITABLE = [
    ["inspect", "timm:vit_tiny_patch16_224", "--json", "no/such/folder/x.json"],
    ["macs", "timm:vit_tiny_patch16_224", "--json", "no/such/folder/x.json"],
    ["macs", "--paper", "--json", "no/such/folder/x.json"],
    ["bench", "timm:vit_tiny_patch16_224", "--json", "no/such/folder/x.json"],
    ["bench", "timm:vit_tiny_patch16_224", "--plot", "no/such/folder/x.png"],
    ["bench", "diffusers:a/pipeline", "--json", "no/such/folder/x.json"],
    ["calibrate", "timm:vit_tiny_patch16_224", "photos", "--flops", "0.5", "--out", "no/such/folder/x.json"],
    ["evaluate", "saliency", "--json", "no/such/folder/x.json"],
    ["evaluate", "saliency", "--plot", "no/such/folder/x.png"],
    ["evaluate", "saliency", "--out", "file/predictions"],
    ["reproduce", "all", "--builtin", "--out", "file"],
    ["demo", "--out", "no/such/folder/x.html"],
    ["demo", "--json", "no/such/folder/x.json"],
]


@pytest.mark.parametrize("argv", UNWRITABLE, ids=[" ".join(argv) for argv in UNWRITABLE])
def test_what_cannot_be_written_is_refused_before_anything_is_built(argv, tmp_path, monkeypatch, capsys):
    pytest.importorskip("turbovlm_lab")

    def refuse(*args, **kwargs):
        raise AssertionError("something was built")

    for name in ("models.load_model", "pipelines.load_pipeline", "processors.load_for_images"):
        monkeypatch.setattr(f"turbovlm.loading.{name}", refuse)
    for name in ("evaluate.asking.asked", "costs.paper.paper_costs", "zoo.load_saliency_vit"):
        monkeypatch.setattr(f"turbovlm_lab.{name}", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"turbovlm: {argv[-2]} {argv[-1]}: ") and error.count("\n") == 1


def test_unknown_options_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["macs", "--papers"])
    assert stop.value.code == 2
    capsys.readouterr()


def test_importing_the_library_imports_nothing_optional():
    code = (
        "import sys, turbovlm, turbovlm.ops\n"
        "names = ('transformers', 'timm', 'torchvision', 'open_clip', 'rich', 'PIL', 'onnx', 'matplotlib')\n"
        "print([n for n in names if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_library_imports_no_compiler():
    """They take ten times as long to import as all the rest."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import turbovlm, turbovlm.ops\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'triton', 'sympy', 'torch.onnx', 'torch.utils.flop_counter'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "turbovlm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("turbovlm 0.")
