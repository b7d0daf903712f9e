"""The command line, run in-process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from turbovlm.cli import main

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


@pytest.mark.parametrize("command", [[], ["demo"], ["inspect"], ["macs"]])
def test_help_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_inspect_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["inspect", folder, "--r", "2", "--json", str(out)]) == 0
    assert "encoder.layer.2" in capsys.readouterr().out.replace("\n", "")
    encoder = json.loads(out.read_text())["encoders"][0]
    assert encoder["tokens"] == [17, 15, 13, 11] and len(encoder["blocks"]) == 3


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


def test_macs_of_families_with_inputs_of_their_own(tmp_path, capsys):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = {
        "Siglip2VisionModel": transformers.Siglip2VisionConfig(**small, num_patches=36, patch_size=8),
        "VideoMAEModel": transformers.VideoMAEConfig(**small, image_size=48, patch_size=16, num_frames=4),
    }
    for name, config in made.items():
        config.architectures = [name]
        config.save_pretrained(tmp_path / name)
        assert main(["macs", str(tmp_path / name), "--r", "3"]) == 0
        assert "GMACs" in capsys.readouterr().out


BAD = [
    (["inspect", "timm:no_such_model"], "Unknown model"),
    (["inspect", "timm:swin_tiny_patch4_window7_224"], "windowed attention"),
    (["inspect", "/no/such/folder"], "no such folder"),
    (["inspect", "keras:vit"], "'keras' is none of transformers, timm"),
    (["inspect", "timm:vit_tiny_patch16_224", "--r", "-3"], "r=-3"),
    (["inspect", "timm:vit_tiny_patch16_224", "--keep", "1.5"], "keep=1.5"),
    (["inspect", "timm:vit_tiny_patch16_224", "--image-size", "0"], "--image-size 0"),
    (["inspect", "torchvision:vit_b_16", "--image-size", "97"], "could not build it"),
    (["inspect", "timm:vit_tiny_patch16_224", "--json", "/no/such/folder/x.json"], "--json /no/such/folder/x.json"),
    (["macs"], "MODEL or --paper"),
    (["macs", "timm:vit_tiny_patch16_224", "--paper"], "MODEL or --paper"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_message_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_unknown_options_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["macs", "--papers"])
    assert stop.value.code == 2
    capsys.readouterr()


def test_importing_the_library_imports_nothing_optional():
    code = (
        "import sys, turbovlm, turbovlm.functional\n"
        "names = ('transformers', 'timm', 'torchvision', 'open_clip', 'rich', 'PIL', 'onnx')\n"
        "print([n for n in names if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "turbovlm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("turbovlm 0.")
