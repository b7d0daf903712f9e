"""Interleaved timing: its books, not its seconds."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn as nn

import turbovlm
from turbovlm import ConfigError, TurboConfig, TurboError
from turbovlm.profile import Comparison, Quartiles, Run, Timing, compare, macs
from turbovlm.profile.timing import interleaved, peak_memory

timm = pytest.importorskip("timm")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=3, img_size=96)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 96, 96)


def test_the_books_of_a_comparison(vit, images):
    before = {name: value.data_ptr() for name, value in vit.state_dict().items()}
    seen = []
    result = compare(vit, images, [TurboConfig(r=4), TurboConfig(keep=0.5)], rounds=3, warmup=1, progress=seen.append)
    assert [run.name for run in result.runs] == ["model", "r=4", "keep=0.5"]
    assert len(seen) == (3 + 1) * 3 and result.batch == 2 and result.clock == "process CPU time"
    assert result.baseline.macs == macs(vit.eval(), images)
    with turbovlm.apply(vit, r=4):
        assert result.run("r=4").macs == macs(vit, images)
    for run in result.runs:
        assert len(run.seconds) == len(run.wall_seconds) == 3 and min(run.seconds) > 0
        assert run.peak_bytes > 2 * 37 * 192 * 4  # at least the tokens
    assert result.speedup("model") == Quartiles(1, 1, 1)
    for name in ("model", "r=4", "keep=0.5", "ciency"):
        assert name in str(result)
    assert json.loads(json.dumps(result.to_dict()))["runs"][1]["macs"] == result.run("r=4").macs
    assert {name: value.data_ptr() for name, value in vit.state_dict().items()} == before
    with pytest.raises(ConfigError, match="'r=5': no such run"):
        result.run("r=5")


def test_ratios_are_paired_round_by_round():
    """2, 4 and 4 times as fast: not the ratio of the medians, 2; with a fifth of the work, 0.8 of what that allows."""
    runs = (
        Run("model", 10, {"forward": Timing((1.0, 2.0, 4.0), None)}, (1.0, 2.0, 4.0), 8),
        Run("a", 2, {"forward": Timing((0.5, 0.5, 1.0), 3_000_000)}, (0.25, 1.0, 0.5), 8),
        Run("b", 5, {"forward": Timing((0.5, 1.0, 2.0), None)}, (1.0,) * 3, 8),
    )
    result = Comparison(runs, 8, "x", "float32", 1, "clock", False)
    assert result.speedup("a") == Quartiles(median=4, low=3, high=4)
    assert result.macs_ratio("a") == 5 and result.efficiency("a") == 0.8
    assert result.speedup("b") == Quartiles(2, 2, 2) and result.efficiency("b") == 1
    assert result.images_per_second("model") == 4 and result.images_per_second("a") == 16
    assert result.seconds_per_image("model") == 2 / 8
    assert str(result).splitlines()[:4] == [
        "x, float32, batch 8, eager, 3 rounds, clock",
        "                images                                  MACs   effi-  peak",
        "       s/batch      /s  GMACs  speed-up    quartiles   ratio  ciency    MB",
        "model        2       4   0.00    1.000x  1.000–1.000  1.000x   1.000",
    ]


def test_runs_alternate_and_the_model_stays_as_it_is(vit, images):
    training = vit.training
    order: list[str] = []

    def noted(name):
        def prepare(model: nn.Module) -> None:
            assert model is not vit and not model.training
            assert model.cls_token is vit.cls_token
            forward = model.forward
            model.forward = lambda x: (order.append(name), forward(x))[1]

        return prepare

    compare(vit, images, {"a": noted("a"), "b": noted("b")}, rounds=4, warmup=0)
    timed = order[2:-2]  # after the counts, before the memory
    assert timed == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert vit.training == training and "forward" not in vit.__dict__


def test_inputs_by_name_and_in_sequence():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config.image_size, config.patch_size = 48, 8
    model, x = transformers.ViTModel(config), torch.randn(3, 3, 48, 48)
    by_name = compare(model, {"pixel_values": x}, TurboConfig(r=2), rounds=1, warmup=0)
    in_sequence = compare(model, [x], TurboConfig(r=2), rounds=1, warmup=0)
    assert by_name.batch == in_sequence.batch == 3
    assert by_name.run("r=2").macs == in_sequence.run("r=2").macs


@pytest.mark.slow
def test_compiled_versions(vit, images):
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    result = compare(vit, images, {f"r{r}": TurboConfig(r=r) for r in (1, 4)}, rounds=1, warmup=1, compile=True)
    assert result.compiled and "compiled" in result.conditions
    assert result.macs_ratio("r4") > result.macs_ratio("r1") > 1
    assert torch._dynamo.config.recompile_limit == limit


def test_peak_memory_counts_what_lives_at_once():
    def forward():
        a = torch.empty(1000, dtype=torch.float32)
        b = torch.empty(500, dtype=torch.float32)
        del a
        return b, torch.empty(700, dtype=torch.float32)

    assert peak_memory(forward, CPU) == 6000
    assert peak_memory(forward, torch.device("meta")) is None


def test_interleaved_ends_once_its_seconds_are_over():
    runs = []
    clock, wall = interleaved([lambda: runs.append("a"), lambda: runs.append("b")], CPU, 9, 0, id, 0.0, 3)
    assert [len(seconds) for seconds in (*clock, *wall)] == [3, 3, 3, 3]
    assert "".join(runs) == "abbaab"


def test_interleaved_gives_the_collector_back():
    import gc

    with pytest.raises(ZeroDivisionError):
        interleaved([lambda: 1 / 0], CPU, 1, 0, print)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("configs", "settings", "message"),
    [
        ([], {}, "at least one"),
        ([TurboConfig(r=1), TurboConfig(r=1, seed=1)], {}, "several are called 'r=1'"),
        ({"model": TurboConfig(r=1)}, {}, "'model' is the model's own"),
        ({"a": 16}, {}, r"configs\['a'\]=16"),
        (TurboConfig(r=1), {"rounds": 0}, "rounds=0"),
        (TurboConfig(r=1), {"rounds": 1.5}, "rounds=1.5"),
        (TurboConfig(r=1), {"warmup": -1}, "warmup=-1"),
        (TurboConfig(r=1), {"warmup": 0, "compile": True}, "warmup=0"),
    ],
)
def test_bad_input(vit, images, configs, settings, message):
    with pytest.raises(ConfigError, match=message):
        compare(vit, images, configs, **settings)


def test_an_accelerated_model_is_no_baseline(vit, images):
    with turbovlm.apply(vit, r=1), pytest.raises(TurboError, match="accelerated already"):
        compare(vit, images, TurboConfig(r=1))
    with pytest.raises(TurboError, match="no parameters"):
        compare(nn.Identity(), images, TurboConfig(r=1))
    with pytest.raises(ConfigError, match="no tensor"):
        compare(vit, {"x": 3}, {"a": lambda model: None})
