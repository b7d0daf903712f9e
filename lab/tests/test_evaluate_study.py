"""A study from data to scores: on the pretrained saliency ViT, and on answers that are known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from turbovlm import ReadConfig, TurboConfig
from turbovlm.errors import ConfigError, DataError
from turbovlm_lab.evaluate.builtin_data import saliency_data
from turbovlm_lab.evaluate.builtin_models import zoo_predictor
from turbovlm_lab.evaluate.check import check
from turbovlm_lab.evaluate.data import Data, LazyImage, Sample
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.scoring import agreement, decode_map, encode_map, scores
from turbovlm_lab.evaluate.settings import OWN, methods, smaller
from turbovlm_lab.evaluate.study import header_of, name_with_settings, run_study


def grey(value, name="p"):
    return LazyImage(f"{name} {value}", lambda: Image.new("RGB", (4, 4), (value,) * 3))


def valued(task, data, predictions):
    return {score.name: score.value for score in scores(task, data, predictions)}


def test_scores_of_classes():
    data = Data(
        "d", tuple(Sample(f"{i}", (grey(i),), answers=(name,)) for i, name in enumerate("abf")), tuple("abcdef")
    )
    assert valued("classification", data, [[0, 1, 2, 3, 4], [2, 1, 0, 3, 4], [0, 1, 2, 3, 4]]) == {
        "top-1": pytest.approx(1 / 3),
        "top-5": pytest.approx(2 / 3),
    }
    assert agreement("classification", [[0, 1], [1, 0]], [[0, 2], [0, 1]]) == [1, 0]


def test_scores_of_answers():
    questions = [Sample(f"{i}", (grey(0),), "what", ("red",) * 4) for i in range(2)]
    found = scores("vqa", Data("d", tuple(questions)), ["red", "blue"])
    assert found[0].value == 0.5 and found[0].parts == (1, 0) and found[0].groups == (0, 0)
    statements = [Sample(f"{i}", (grey(i), grey(9)), "so", ("True",)) for i in range(2)]
    found = scores("nlvr2", Data("d", tuple(statements)), ["True", "maybe"])
    assert found[0].value == 0.5 and found[0].groups == (0, 1)


def test_scores_of_retrieval():
    """Two images have two captions each; the second image's captions lie nearer to the first."""
    data = Data("d", tuple(Sample(f"{i}", (grey(i),), answers=("a", "b")) for i in range(12)))
    towards, near = torch.eye(12).tolist(), (0.9 * torch.eye(12)).tolist()
    predictions = [{"picture": towards[i], "captions": [towards[i], towards[i]]} for i in range(12)]
    predictions[1]["captions"] = [near[0], near[2]]
    found = {score.name: score for score in scores("retrieval", data, predictions)}
    assert found["text R@1"].value == pytest.approx(11 / 12)
    assert found["image R@1"].value == pytest.approx(22 / 24)
    right = [{"picture": towards[i], "captions": [towards[i], towards[i]]} for i in range(12)]
    assert agreement("retrieval", predictions, right) == [1, 0, *[1] * 10], "the second image has lost its captions"
    assert found["image R@1"].parts[2:4] == (0, 0) and found["image R@1"].groups[:4] == (0, 0, 1, 1)


def test_scores_of_captions():
    data = Data(
        "d", tuple(Sample(f"{i}", (grey(i),), answers=(f"a {w} dog",)) for i, w in enumerate("xyz")), tokenized=True
    )
    found = valued("captioning", data, ["a x dog", "a y dog", "a q cat"])
    assert found["CIDEr"] > 1 and 0 < found["BLEU-4"] < 1


def test_maps_are_kept_to_eight_bits():
    heat = torch.rand(20, 30)
    assert (decode_map(encode_map(heat)) - heat).abs().max() < 1 / 255
    assert agreement("saliency", [encode_map(heat)], [encode_map(heat)]) == [1]


@pytest.fixture(scope="module")
def saliency(tmp_path_factory):
    predictor, data = zoo_predictor("saliency", "saliency"), saliency_data(12)
    configs = methods((TurboConfig(r=18),), names=("turbovlm", "random"))
    folder = tmp_path_factory.mktemp("study")
    settings = [Setting(OWN), *configs, Setting("smaller image", image_size=112)]
    seen = []
    study = run_study(
        "saliency", "zoo:saliency", predictor, data, settings, folder, batch=4, on_progress=lambda *a: seen.append(a)
    )
    return study, folder, seen, (predictor, data, settings)


def test_merging_finds_what_the_model_finds(saliency):
    """Twemoji on photographs: the model finds them, and with the default it finds the same more than at random."""
    study = saliency[0]
    rows = {row.setting: row for row in study.rows}
    iou = {name: row.metrics[0].value.value for name, row in rows.items()}
    assert [metric.name for metric in rows[OWN].metrics] == ["IoU", "AUC", "MAE"]
    assert iou[OWN] > 0.7 and iou["turbovlm"] > 0.9 * iou[OWN]
    assert rows[OWN].ratio == 1 and 0.5 < rows["turbovlm"].ratio < 0.65
    assert rows[OWN].same is None and rows["turbovlm"].same.value > max(0.8, rows["random"].same.value)
    kept = rows["turbovlm"].metrics[0].kept
    assert kept.low <= kept.value <= kept.high and kept.value == pytest.approx(iou["turbovlm"] / iou[OWN])
    assert rows["turbovlm"].metrics[2].kept is None
    assert rows["smaller image"].image_size == 112 and rows["smaller image"].ratio < 0.3
    assert study.samples == 12 and study.to_dict()["rows"][1]["setting"] == "turbovlm"


def test_a_study_is_not_made_twice(saliency):
    study, folder, seen, (predictor, data, settings) = saliency
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name_with_settings(s)}.jsonl" for s in settings)
    again = []
    asked = []
    counted = dataclasses.replace(predictor, predict=lambda p: asked.append(len(p)) or predictor.predict(p))
    found = run_study(
        "saliency", "zoo:saliency", counted, data, settings, folder, batch=4, on_progress=lambda *a: again.append(a)
    )
    assert found == study and asked == [1] * len(settings)
    assert sum(done for _, done in seen) == sum(done for _, done in again) == 12 * len(settings)
    with pytest.raises(DataError, match=r"made otherwise \(model was 'zoo:saliency' and is 'another'\)"):
        run_study("saliency", "another", predictor, data, settings, folder)


def test_smaller_images_of_the_same_cost(saliency):
    predictor, data, _ = saliency[3]
    found = smaller(predictor, data.samples[0], saliency[0].rows[1].macs)
    assert 126 <= found.image_size <= 182 and found.configs == ()


def test_masks_are_where_the_drawings_are():
    for sample in saliency_data(5).samples:
        shown, mask = sample.images[0].open(), sample.mask.open("L")
        assert shown.size == mask.size == (224, 224)
        covered = sum(value > 127 for value in mask.getdata()) / 224**2
        assert 0.02 < covered < 0.9


def test_settings_are_told_apart_in_files():
    data = Data("d", (Sample("a"),))
    settings = [Setting(OWN), *methods((TurboConfig(keep=0.5), ReadConfig(0.3)))]
    headers = [header_of("vqa", "m", data, setting) for setting in settings]
    assert len({str(header) for header in headers}) == len(headers)
    assert headers[0]["setting"] == {}
    assert headers[1]["setting"] == {"TurboConfig": {"keep": 0.5}, "ReadConfig": {"visual_keep": 0.3}}
    assert headers[2]["setting"]["ReadConfig"] == {
        "visual_keep": 0.3,
        "visual_select": "information",
        "alpha": 180.0,
    }
    assert {kind: plain["degree"] for kind, plain in headers[-1]["setting"].items()} == {
        "TurboConfig": "evenly",
        "ReadConfig": "evenly",
    }


def test_wrong_settings(tmp_path):
    predictor, data = zoo_predictor("saliency", "saliency"), saliency_data(2)
    for settings in ([], [Setting("a", (TurboConfig(r=2),))], [Setting("a"), Setting("a")]):
        with pytest.raises(ConfigError, match="must be of different names, the unmerged model first"):
            run_study("saliency", "m", predictor, data, settings, tmp_path)
    with pytest.raises(ConfigError, match="method='magic': must be one of turbovlm, "):
        methods((TurboConfig(r=2),), names=("magic",))


def test_what_is_wrong_with_data_is_listed(tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    text, none = LazyImage.file(tmp_path / "bad.jpg"), LazyImage.file(tmp_path / "none.png")
    some = (Sample("good", (grey(3),)), Sample("x", (text,)), Sample("y", (grey(4),), mask=none))
    done = []
    good, bad = check(Data("d", some, left_out=("line 7: has no image",), real=(text, grey(5))), done.append)
    assert [sample.id for sample in good.samples] == ["good"] and len(good.real) == 1 and done == [1] * 5
    assert bad[0] == "line 7: has no image" and bad[3].startswith(f"{tmp_path / 'bad.jpg'}: does not decode")
    assert bad[1].startswith(f"x: {tmp_path / 'bad.jpg'}: does not decode") and len(bad) == 4
    assert bad[2] == f"y: {tmp_path / 'none.png'}: there is no such file"
