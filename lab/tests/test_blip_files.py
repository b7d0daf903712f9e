"""BLIP from its authors' files, whole or pruned by UPop, as `turbovlm evaluate` asks them."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from folders import tokenizer
from test_evaluate_predictors import asked, loaded, samples
from test_upop import CLASSES, HEAD_DIM, PRUNED, WHOLE, checkpoint
from turbovlm import TurboConfig
from turbovlm.cli import main
from turbovlm.errors import ConfigError, TurboError
from turbovlm_lab.evaluate.predictors.generating import LONGEST
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.settings import encoder_macs, methods

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Small models in the published files' layout, a tokenizer beside them."""
    from turbovlm_lab import models

    monkeypatch.setattr(models, "load_upop", functools.partial(models.load_upop, head_dim=HEAD_DIM))
    monkeypatch.setitem(LONGEST, "captioning", 12)  # these have 20 positions
    tokenizer().save_pretrained(tmp_path)

    def saved(task, widths=PRUNED):
        torch.save({"model": checkpoint(task, widths)}, tmp_path / "model.pth")
        return f"blip:{tmp_path / 'model.pth'}"

    return saved


QUESTION = {"captioning": "", "vqa": "what is a dog", "nlvr2": "what is a dog", "retrieval": ""}


@pytest.mark.parametrize("widths", [PRUNED, WHOLE], ids=["pruned", "whole"])
@pytest.mark.parametrize("task", CLASSES)
def test_every_task_is_asked(task, widths, file):
    predictor = loaded(task, file(task, widths))
    assert type(predictor.model).__name__ == CLASSES[task]
    some = samples(3, QUESTION[task], ("a dog",), images=2 if task == "nlvr2" else 1)
    own = asked(predictor, some)
    assert len(own) == 3 and asked(predictor, some) == own
    costs = [encoder_macs(predictor, some[0], s) for s in [Setting("own"), *methods((TurboConfig(r=5),))]]
    assert max(costs[1:]) < 0.9 * costs[0]


def test_captions_are_those_of_the_model(file):
    predictor = loaded("captioning", file("captioning"))
    (text,) = asked(predictor, samples(1))
    image = samples(1)[0].images[0].open()
    processor = transformers.BlipImageProcessor(
        size={"height": 48, "width": 48},
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
    )
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    made = predictor.model.generate(pixels, max_new_tokens=12, do_sample=False)
    assert text == tokenizer().decode(made[0], skip_special_tokens=True).strip()


def test_statements_are_judged(file):
    predictor = loaded("nlvr2", file("nlvr2"))
    some = samples(3, "what is a dog", ("True",), images=2)
    pixels = torch.stack([predictor.prepare(sample, None)[0] for sample in some])
    assert pixels.shape == (3, 2, 3, 48, 48)
    words = tokenizer()(["what is a dog"] * 3, return_tensors="pt")
    with torch.no_grad():
        scores = predictor.model(pixels, words["input_ids"])
    assert asked(predictor, some) == [("False", "True")[best] for best in scores.argmax(dim=1).tolist()]


@torch.no_grad()
def test_vectors_of_images_and_captions(file):
    predictor = loaded("retrieval", file("retrieval"))
    some = samples(2, answers=("a dog", "a temple"))
    pixels = torch.stack([predictor.prepare(sample, None)[0] for sample in some])
    model = predictor.model
    seen = F.normalize(model.vision_proj(model.vision_model(pixels).last_hidden_state[:, 0]), dim=-1)
    found = asked(predictor, some)
    torch.testing.assert_close(torch.tensor([each["picture"] for each in found]), seen, rtol=0, atol=1e-5)
    assert [len(each["captions"]) for each in found] == [2, 2]


def test_the_command(file, tmp_path, capsys):
    for number, pair in enumerate(samples(4, images=2)):
        for side, each in enumerate(pair.images):
            each.open().save(tmp_path / f"dev-{number}-0-img{side}.png")
    lines = [{"identifier": f"dev-{n}-0-0", "sentence": "what is a dog", "label": "True"} for n in range(4)]
    (tmp_path / "dev.json").write_text("\n".join(json.dumps(line) for line in lines))
    report = tmp_path / "study.json"
    data = ["--data", tmp_path / "dev.json", "--images", tmp_path, "--out", tmp_path / "out", "--json", report]
    command = ["evaluate", "nlvr2", "--model", file("nlvr2"), "--r", "5", *map(str, data)]
    assert main(command) == 0, capsys.readouterr().err
    own, ours = json.loads(report.read_text())["rows"]
    assert own["setting"] == "unmerged" and ours["ratio"] < 0.9


def test_what_is_wrong(file):
    with pytest.raises(TurboError, match=r"'blip' has no model for classification, which takes an image classifier"):
        loaded("classification", file("vqa"))
    with pytest.raises(ConfigError, match=r"task='captioning': .*model\.pth has no|it has a model for"):
        loaded("captioning", file("nlvr2"))
    with pytest.raises(TurboError, match=r"none\.pth: there is no such file"):
        loaded("nlvr2", "blip:none.pth")


def test_a_pruned_model_is_reproduced_beside_its_printed_rows(file, tmp_path, capsys):
    for number in range(3):
        Image.new("RGB", (60, 40), (60 * number, 90, 0)).save(tmp_path / f"{number}.jpg")
    said = [
        {"filename": f"{number}.jpg", "split": "test", "sentences": [{"raw": f"a dog w{30 + number}"}]}
        for number in range(3)
    ]
    (tmp_path / "coco.json").write_text(json.dumps({"images": said, "dataset": "coco"}))
    entry = {"model": file("captioning"), "data": [str(tmp_path / "coco.json")], "images": str(tmp_path)}
    (tmp_path / "s.json").write_text(json.dumps({"table3/BLIP-B/COCO/UPop": entry}))
    given = ["reproduce", "table3", "--sources", str(tmp_path / "s.json"), "--out", str(tmp_path / "out")]
    # the small model has 9 patches, of which r=30 takes all that can go
    assert main(given) == 0
    assert "has nothing for: table3/BLIP-B/COCO, table3/BLIP2/COCO" in capsys.readouterr().err
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text()).values()
    own, turbo = found["numbers"]["lines"][:2]
    assert own["printed"]["plugin"] == "UPop" and turbo["printed"]["plugin"] == "turbo+UPop"
    assert turbo["row"]["ratio"] < 0.9 and own["row"]["ratio"] == 1
    report = (tmp_path / "out" / "report.md").read_text()
    assert "BLIP-B pruned by UPop on COCO" in report and "| turbo, r=30* | 60.8 | 37.3 | 126 |" in report
