"""The scripts in examples/, run as a user runs them, on small models saved to a folder with their processors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from folders import blip_folder, clip_folder, llava_folder

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("common", "caption", "vqa", "retrieval", "chat"):
        sys.modules.pop(name, None)


@pytest.fixture
def photos(tmp_path):
    from sklearn.datasets import load_sample_image

    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("china.jpg", "flower.jpg"):
        Image.fromarray(load_sample_image(name)).resize((160, 120)).save(folder / name)
    return folder


def run(name, *argv):
    __import__(name)
    sys.modules[name].main([str(part) for part in argv])


def said(capsys):
    """What was printed without and with turbovlm, a list of lines each."""
    out = capsys.readouterr().out
    without, _, within = out.partition("\nwith turbovlm")
    assert re.match(r"without turbovlm: \d+\.\d\d s\n", without) and re.match(r" \(.*\): \d+\.\d\d s\n", within)
    return without.splitlines()[1:], within.splitlines()[1:]


def test_captions(tmp_path, photos, capsys):
    folder = blip_folder(tmp_path, "ConditionalGeneration")
    run("caption", photos, "--model", folder, "--r", 0, "--words", 6, "--repeat", 1)
    without, within = said(capsys)
    assert without == within and [line.split(":")[0].strip() for line in without] == [
        str(photos / "china.jpg"),
        str(photos / "flower.jpg"),
    ]
    run("caption", photos / "china.jpg", "--model", folder, "--r", 6, "--words", 6, "--repeat", 1)
    assert [len(lines) for lines in said(capsys)] == [1, 1]


def test_a_question(tmp_path, photos, capsys):
    folder = blip_folder(tmp_path, "QuestionAnswering")
    run("vqa", photos / "flower.jpg", "what is a flower", "--model", folder, "--r", 4, "--repeat", 1)
    without, within = said(capsys)
    assert len(without) == len(within) == 1


@pytest.mark.parametrize("make", [clip_folder, lambda path: blip_folder(path, "ImageTextRetrieval")])
def test_a_ranking(make, tmp_path, photos, capsys):
    folder = make(tmp_path)
    run("retrieval", photos, "a temple", "--model", folder, "--r", 4, "--repeat", 1)
    for lines in said(capsys):
        scores = [float(line.split()[0]) for line in lines]
        assert len(scores) == 2 and scores == sorted(scores, reverse=True)
        assert {line.split()[1] for line in lines} == {str(photos / "china.jpg"), str(photos / "flower.jpg")}


@pytest.mark.parametrize("keep", ["1.0", "0.25", "9"])
def test_a_chat(keep, tmp_path, photos, capsys, monkeypatch):
    folder, read = llava_folder(tmp_path), []
    forward = transformers.LlamaModel.forward

    def counted(self, *args, **kwargs):
        read.append(kwargs["inputs_embeds"].shape[1] if kwargs.get("inputs_embeds") is not None else 1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", counted)
    run(
        "chat",
        photos,
        "--model",
        folder,
        "--visual-keep",
        keep,
        "--words",
        4,
        "--repeat",
        1,
        "--question",
        "what is a dog",
    )
    without, within = said(capsys)
    tokens = {"1.0": 36, "0.25": 9, "9": 9}[keep]
    assert max(read) == 2 * 36 + 8 and max(read) - 2 * (36 - tokens) in read
    assert keep != "1.0" or without == within


def test_every_script_explains_itself(capsys):
    for name in ("caption", "vqa", "retrieval", "chat"):
        with pytest.raises(SystemExit) as stop:
            run(name, "--help")
        out = capsys.readouterr().out
        assert stop.value.code == 0 and f"python examples/{name}.py" in out and "--visual-keep" in out


def test_what_is_wrong_is_said_in_a_line(tmp_path, photos, capsys):
    folder = blip_folder(tmp_path, "ConditionalGeneration")
    wrong = {
        "there is no such file or folder": (tmp_path / "no.jpg", "--model", folder),
        "no image (": (tmp_path / "blip", "--model", folder),
        "no image: ": (tmp_path / "blip" / "config.json", "--model", folder),
        "--model /no/such: ": (photos, "--model", "/no/such"),
        "r=-1: the number of tokens": (photos, "--model", folder, "--r", "-1"),
        "visual_keep=1.5: must be a share": (photos, "--model", folder, "--visual-keep", "1.5"),
        "'half' is neither a share such as 0.5 nor a count": (photos, "--visual-keep", "half"),
    }
    for message, argv in wrong.items():
        with pytest.raises(SystemExit) as stop:
            run("caption", *argv)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and message in error, error


def test_in_half_precision(tmp_path, photos, capsys):
    folder = blip_folder(tmp_path, "ConditionalGeneration")
    run("caption", photos, "--model", folder, "--dtype", "bfloat16", "--words", 4, "--repeat", 1)
    assert len(said(capsys)[1]) == 2
    assert torch.get_default_dtype() == torch.float32
