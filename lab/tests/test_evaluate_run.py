"""Predictions are kept, runs go on, and nothing is counted twice."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys

import pytest
import torch

import turbovlm
from turbovlm import TurboConfig
from turbovlm.errors import DataError, UnsupportedModelError
from turbovlm_lab.evaluate.data import Data, LazyImage, Sample
from turbovlm_lab.evaluate.run import Predictor, Setting, arranged, predict_all, read_predictions
from turbovlm_lab.evaluate.study import header_of, name_with_settings, run_study

Image = pytest.importorskip("PIL.Image")
HEADER = {"task": "classification", "model": "tiny"}
SAMPLES = [
    Sample(f"s{i}", (LazyImage(f"p{i}", lambda i=i: Image.new("RGB", (4, 4), (i, i, i))),), answers=("1",))
    for i in range(7)
]


class Counting:
    """Predicts the image's grey, and counts."""

    def __init__(self, stop_after=None):
        self.asked = []
        self.stop_after = stop_after
        self.predictor = Predictor(torch.nn.Identity(), self.prepare, self.predict)

    def prepare(self, sample, image_size):
        return sample.id, sample.images[0].open().getpixel((0, 0))[0]

    def predict(self, prepared):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += [name for name, _ in prepared]
        return [grey for _, grey in prepared]


def test_predictions_come_in_order_and_are_kept(tmp_path):
    counting, seen = Counting(), []
    found = predict_all(
        counting.predictor, SAMPLES, Setting("own"), tmp_path / "a.jsonl", HEADER, batch=3, on_progress=seen.append
    )
    assert found == list(range(7))
    assert seen == [0, 3, 3, 1]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == [HEADER, *({"id": f"s{i}", "prediction": i} for i in range(7))]


def test_a_stopped_run_goes_on_and_counts_nothing_twice(tmp_path):
    file = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict_all(Counting(stop_after=4).predictor, SAMPLES, Setting("own"), file, HEADER, batch=2)
    again, seen = Counting(), []
    found = predict_all(again.predictor, SAMPLES, Setting("own"), file, HEADER, batch=2, on_progress=seen.append)
    assert found == list(range(7))
    assert again.asked == ["s4", "s5", "s6"]
    assert seen == [4, 2, 1]
    assert len(file.read_text().splitlines()) == 8


def test_half_a_line_is_made_again(tmp_path):
    file = tmp_path / "a.jsonl"
    predict_all(Counting().predictor, SAMPLES[:3], Setting("own"), file, HEADER, batch=2)
    file.write_bytes(file.read_bytes()[:-4])
    again = Counting()
    assert predict_all(again.predictor, SAMPLES, Setting("own"), file, HEADER, batch=2) == list(range(7))
    assert again.asked == ["s2", "s3", "s4", "s5", "s6"]
    assert read_predictions(file, HEADER) == {f"s{i}": i for i in range(7)}


def test_batches_are_the_same_where_a_run_was_stopped(tmp_path):
    class Together(Counting):
        def predict(self, prepared):
            return [sum(super().predict(prepared))] * len(prepared)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    found = predict_all(Together().predictor, SAMPLES, Setting("own"), whole, HEADER, batch=2)
    with pytest.raises(KeyboardInterrupt):
        predict_all(Together(stop_after=2).predictor, SAMPLES, Setting("own"), stopped, HEADER, batch=2)
    stopped.write_bytes(stopped.read_bytes()[:-4])
    assert predict_all(Together().predictor, SAMPLES, Setting("own"), stopped, HEADER, batch=2) == found


def test_a_file_of_another_run_is_refused_and_left(tmp_path):
    file = tmp_path / "a.jsonl"
    predict_all(Counting().predictor, SAMPLES, Setting("own"), file, HEADER)
    before = file.read_bytes()
    with pytest.raises(DataError, match=r"a\.jsonl: was made otherwise \(model was 'tiny' and is 'large'\)"):
        predict_all(Counting().predictor, SAMPLES, Setting("own"), file, {**HEADER, "model": "large"})
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "changed",
    [
        {"text": "how many"},
        {"answers": ("cat",)},
        {"images": (LazyImage("blurred/p0", lambda: None),)},
        {"id": "other"},
    ],
)
def test_other_content_of_the_same_name_is_another_run(changed):
    sample = Sample("s0", (LazyImage("p0", lambda: None),), "what", ("dog",))
    headers = [
        header_of("vqa", "m", Data("d", (each,)), Setting("own"))
        for each in (sample, dataclasses.replace(sample, **changed))
    ]
    assert headers[0] != headers[1]


@pytest.fixture
def encoder():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.ViTModel(transformers.ViTConfig(image_size=64, patch_size=8, **size)).eval()


def test_how_a_model_was_asked_is_part_of_a_run(tmp_path, encoder):
    def study(**about):
        predictor = dataclasses.replace(Counting().predictor, model=encoder, about=about)
        return run_study("nlvr2", "m", predictor, Data("d", tuple(SAMPLES)), [Setting("own")], tmp_path)

    study(dtype="bfloat16")
    study(dtype="bfloat16")
    with pytest.raises(DataError, match=r"was made otherwise \(dtype was 'bfloat16' and is None\)"):
        study()
    with pytest.raises(DataError, match=r"prompt was None and is 'Q: {}'"):
        study(dtype="bfloat16", prompt="Q: {}")


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (Setting("unmerged"), "unmerged"),
        (Setting("turbovlm", (TurboConfig(flops=0.5),)), "turbovlm-flops=0.5"),
        (Setting("r=8, degree=random", (TurboConfig(r=8),)), "r=8-degree=random"),
        (Setting("int8, turbovlm", (TurboConfig(r=8),), quantize="int8"), "int8-turbovlm-r=8"),
        (Setting("smaller", image_size=224), "smaller-224-pixels"),
        (Setting("smaller image, 224 pixels", image_size=224), "smaller-image-224-pixels"),
    ],
)
def test_the_name_of_a_file_says_the_settings(setting, name):
    assert name_with_settings(setting) == name


def test_long_settings_have_names_of_their_own():
    names = [name_with_settings(Setting("turbo", (TurboConfig(r=(20,) * 47 + (last,)),))) for last in (1, 2)]
    assert names[0] != names[1] and all(len(name) == 120 and name.startswith("turbo-r=-20-20-") for name in names)


def test_an_image_that_a_processor_refuses_is_named(tmp_path):
    def library(sample, size):
        return json.loads("{") if sample.id == "s1" else sample.id

    predictor = dataclasses.replace(Counting().predictor, prepare=library)
    with pytest.raises(DataError, match=r"s1 \(.*\): the model's processor does not take it: JSONDecodeError: "):
        predict_all(predictor, SAMPLES, Setting("own"), tmp_path / "a.jsonl", HEADER, batch=2)


def test_files_of_other_settings_are_refused_before_the_model_is_asked(tmp_path, encoder):
    counting = Counting()

    def predict(prepared):
        encoder(torch.zeros(1, 3, 64, 64))
        return counting.predict(prepared)

    predictor = Predictor(encoder, counting.prepare, predict)

    def study(r, folder=tmp_path):
        settings = [Setting("own"), Setting("turbovlm", (TurboConfig(r=r),))]
        return run_study("nlvr2", "m", predictor, Data("d", tuple(SAMPLES)), settings, folder)

    study(2)
    (tmp_path / "own.jsonl").unlink()
    (tmp_path / "turbovlm-r=2.jsonl").rename(tmp_path / "turbovlm-r=4.jsonl")
    counting.asked.clear()
    otherwise = r"turbovlm-r=4.jsonl: was made otherwise \(setting was {'TurboConfig': {'r': 2}} and is .*'r': 4}}\)"
    with pytest.raises(DataError, match=otherwise):
        study(4)
    assert not counting.asked
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file/a: predictions cannot be kept there"):
        study(2, tmp_path / "file" / "a")


def test_settings_that_cannot_be_had_are_refused_before_the_model_is_asked(tmp_path):
    counting = Counting()
    settings = [Setting("own"), Setting("turbovlm", (TurboConfig(r=2),))]
    with pytest.raises(UnsupportedModelError, match="no block that turbovlm can accelerate"):
        run_study("nlvr2", "m", counting.predictor, Data("d", tuple(SAMPLES)), settings, tmp_path)
    assert len(counting.asked) <= 1 and not list(tmp_path.iterdir())


def test_captions_that_are_all_empty_keep_no_share(tmp_path, encoder):
    """BLEU-4 is no mean over samples: what it keeps of nothing is nothing that can be told."""
    samples = tuple(dataclasses.replace(sample, answers=("a dog",)) for sample in SAMPLES)

    def predict(prepared):
        encoder(torch.zeros(1, 3, 64, 64))
        return [""] * len(prepared)

    predictor = Predictor(encoder, lambda sample, size: sample.id, predict)
    settings = [Setting("own"), Setting("turbovlm", (TurboConfig(r=2),))]
    study = run_study("captioning", "m", predictor, Data("d", samples, tokenized=True), settings, tmp_path)
    assert [metric.kept for metric in study.rows[1].metrics] == [None, None]


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("hello\nworld\n")
    with pytest.raises(DataError, match=r"a\.jsonl: is no file of predictions"):
        read_predictions(file, HEADER)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_named(tmp_path, workers):
    (tmp_path / "text.jpg").write_text("no image")
    bad = Sample("bad", (LazyImage.file(tmp_path / "text.jpg"),))
    file = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match=r"text\.jpg: does not decode"):
        predict_all(Counting().predictor, [*SAMPLES[:4], bad], Setting("own"), file, HEADER, batch=2, workers=workers)
    assert len(read_predictions(file, HEADER)) == 4


def test_workers_give_the_same(tmp_path):
    found = predict_all(Counting().predictor, SAMPLES, Setting("own"), tmp_path / "a", HEADER, batch=2, workers=2)
    assert found == list(range(7))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not copied")
def test_workers_where_python_would_pickle_what_they_get(tmp_path):
    """As of Python 3.14: images and processors cannot be pickled."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        found = predict_all(Counting().predictor, SAMPLES, Setting("own"), tmp_path / "a", HEADER, batch=2, workers=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert found == list(range(7))


def test_the_model_merges_within_and_not_after():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=64, patch_size=8, **size)).eval()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(pixels)[0]
        predictor = Predictor(model, lambda sample, size: sample, lambda prepared: prepared)
        with arranged(predictor, Setting("two", (TurboConfig(r=2),))):
            assert turbovlm.get_handle(model) is not None
            assert model(pixels)[0].shape[1] == plain.shape[1] - 4
        with arranged(dataclasses.replace(predictor, dense=True), Setting("two", (TurboConfig(r=2),))):
            assert model(pixels)[0].shape == plain.shape
        assert torch.equal(model(pixels)[0], plain)
