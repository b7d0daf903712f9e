"""The counts of full-size denoisers: attention is told from the rest, and merges are counted, as arithmetic says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

LAYERS, HEADS, WIDTH, WORDS = 12, 2, 16, 512


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("denoiser_macs")


def attention(tokens: int) -> int:
    """Of every layer: to the tokens themselves and to the words, queries by keys and weights by values."""
    return LAYERS * 2 * tokens * (tokens + WORDS) * HEADS * WIDTH


def test_attention_and_merges_of_a_small_video_denoiser(script):
    config = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH, "in_channels": 4, "out_channels": 4}
    config |= {"text_dim": 32, "freq_dim": 32, "ffn_dim": 48, "num_layers": LAYERS}
    model = script.Model("WanTransformer3DModel", config, size=(128, 128), frames=9)
    found = script.counted(model, {"attention": 1e9, "rest": 1e9})
    assert found["tokens"] == 3 * 8 * 8 and found["attention"] == attention(192)
    assert found["seconds"] == pytest.approx(found["macs"] / 1e9)
    stacks, none_whole = (found["versions"][f"{scope}, keep=0.5"] for scope in ("stacks", "stacks, none whole"))
    assert none_whole["attention"] == attention(96) and none_whole["merges"] == 3
    assert stacks["attention"] == (4 * attention(192) + 8 * attention(96)) // LAYERS and stacks["merges"] == 2
    assert found["macs"] > stacks["macs"] > none_whole["macs"]
    assert "parts, keep=0.5" not in found["versions"]
    said = script.report(
        {"machine": script.machine(), "rates": {"attention": 1e12, "rest": 2e12}, "models": {"small": found}}
    )
    assert "## small, 128×128, 9 frames" in said and "192 tokens" in said


def test_the_rates_give_the_measured_times(script):
    per_second = script.rates()
    assert all(1e14 < each < 1e15 for each in per_second.values())
    model = script.built(script.SHALLOW)
    for side, time in script.MEASURED.items():
        inputs = script.inputs_asked(script.denoiser_request(model, (side, side), 1))
        assert script.seconds(*script.count(model, inputs), per_second) == pytest.approx(time)
