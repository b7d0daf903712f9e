"""What the benchmark of cross-attention asks: each image is looked at once, and sizes are told or not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import turbovlm

pytest.importorskip("transformers")
pytest.importorskip("torchao")
pytest.importorskip("scipy")
pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cross_attention

from turbovlm.encoder.cross_attention import merged_into
from turbovlm_lab.evaluate.scoring import Score
from turbovlm_lab.zoo.reader import load_scene_reader


@torch.inference_mode()
def test_images_are_looked_at_once_for_both_ways_of_reading():
    reader, pixels, looked = load_scene_reader(), torch.randn(3, 3, 112, 112), []
    with turbovlm.apply(reader, r=4):
        reader.encoder.register_forward_hook(lambda module, args, out: looked.append(len(out[0])))
        seen: dict = {}
        for by_size in (False, True):
            with cross_attention.looking(reader, seen, by_size):
                both, other = reader.look(pixels[:2]), reader.look(pixels[1:])
            assert looked == [2, 1] and torch.equal(both[1], other[0])
            assert (merged_into(both).logs is not None) == by_size
        assert torch.equal(merged_into(reader.look(pixels)).logs[:2], merged_into(both).logs)


def test_what_is_drawn_has_seeds_and_nothing_is_restored_unasked():
    ways = cross_attention.settings(3)
    assert len(ways["halves"]) == len(ways["random"]) == 3 and len(ways["default"]) == 1
    assert not any(getattr(config, "dense", False) for configs in ways.values() for config in configs)
    assert cross_attention.readings(ways["visual_keep=0.5"]) == [("alike", "sizes")]


def test_the_report_has_what_sizes_keep_more():
    own = Score("CIDEr", 2.0, (1.0, 3.0), (0, 1))
    row = cross_attention.kept_of(own, {"alike": [Score("CIDEr", 1.0, (1.0, 1.0), (0, 1))], "sizes": [own, own]})
    assert row["more"][0] == 0.5 and row["sizes"]["mean"] == (1.0, 1.0, 1.0)
    machine = {"cpu": "one"}
    entry = {"metric": "CIDEr", "own": 2.0, "ways": {"default": row | {"machine": machine}}}
    text = cross_attention.report({"images": 2, "vit": {"tasks": {"captioning": entry}}})
    assert "| default | 50.0%" in text and "100.0% ± 0.0% ×2 [100.0%, 100.0%]" in text and "+50.0 [" in text
