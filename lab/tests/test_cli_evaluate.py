"""`turbovlm evaluate` as users run it: built in, on a model and data in folders, and on what is wrong."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from folders import blip_folder, llava_folder, stable_diffusion_folder
from turbovlm import Calibration, ReadConfig, TurboConfig
from turbovlm.cli import main
from turbovlm_lab.evaluate.builtin_data import DATA
from turbovlm_lab.evaluate.builtin_models import zoo_predictor
from turbovlm_lab.evaluate.run import Setting
from turbovlm_lab.evaluate.settings import encoder_macs

pytest.importorskip("transformers")


@pytest.fixture
def coco(tmp_path):
    """A model and data laid out as published ones are."""
    images = tmp_path / "coco" / "val2014"
    images.mkdir(parents=True)
    entries = []
    for number in range(5):
        name = f"COCO_val2014_{number:012d}.jpg"
        Image.new("RGB", (60, 40), (50 * number, 90, 0)).save(images / name)
        split = "test" if number < 4 else "val"
        said = [{"raw": "what is a dog"}, {"raw": f"a dog w{30 + number}"}]
        entries.append({"filepath": "val2014", "filename": name, "split": split, "sentences": said})
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return file, tmp_path / "coco"


def captioning(tmp_path, coco, *more):
    file, images = coco
    model = tmp_path / "blip"
    if not model.exists():
        blip_folder(tmp_path, "ConditionalGeneration")
    given = ["--model", model, "--data", file, "--images", images, "--r", 4, "--out", tmp_path / "out", *more]
    return main(["evaluate", "captioning", *map(str, given)])


def test_a_model_and_data_from_folders(tmp_path, coco, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code = captioning(tmp_path, coco, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png", "--batch", 3)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "CIDEr" in out and "BLEU-4" in out and "4 samples" in out
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    study = json.loads((tmp_path / "a.json").read_text())
    assert captioning(tmp_path, coco, "--json") == 0 and json.loads(capsys.readouterr().out) == study
    assert [row["setting"] for row in study["rows"]] == ["unmerged", "turbovlm"]
    assert study["rows"][1]["ratio"] < 0.9 and study["data"] == "dataset_coco.json"
    assert Image.open(tmp_path / "a.png").size[0] > 500
    lines = [json.loads(line) for line in (tmp_path / "out" / "turbovlm-r=4.jsonl").read_text().splitlines()]
    assert lines[0]["setting"] == {"TurboConfig": {"r": 4}} and len(lines) == 5


@pytest.mark.slow
def test_calibrated_settings_stand_beside_the_default(tmp_path, capsys):
    """Thresholds cost what they cost on average, and are asked one image at a time."""
    found = Calibration(TurboConfig((20,) * 12), 0.7, 0.01, 0.02, 0.8, 14, None, ((0.7, 0.01),))
    found.save(tmp_path / "numbers.json")
    TurboConfig((0,) * 12, thresholds=(-0.3,) * 12).save(tmp_path / "per-image.json")
    files = [str(tmp_path / name) for name in ("numbers.json", "per-image.json")]
    given = ["evaluate", "saliency", "--limit", "4", "--out", str(tmp_path / "out"), "--settings", *files]
    assert main(given) == 2
    assert "per-image has thresholds, which are for --batch 1" in capsys.readouterr().err
    assert main([*given, "--batch", "1", "--json", str(tmp_path / "a.json")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["setting"] for row in rows] == ["unmerged", "turbovlm", "numbers", "per-image"]
    predictor = zoo_predictor("saliency", "saliency")
    setting = Setting("", (TurboConfig.load(files[1]),))
    each = [encoder_macs(predictor, sample, setting) for sample in DATA["saliency"](4).samples]
    assert len(set(each)) > 1 and rows[3]["macs"] == round(sum(each) / 4)


def test_images_that_cannot_be_read(tmp_path, coco, capsys):
    images = coco[1]
    bad, gone = (images / "val2014" / f"COCO_val2014_{number:012d}.jpg" for number in (1, 3))
    bad.write_text("no image")
    gone.unlink()
    assert captioning(tmp_path, coco, "--check") == 2
    err = capsys.readouterr().err
    assert f"images[3]: its image val2014/{gone.name} is not in {images}" in err
    assert f"{bad.name}: {bad}: does not decode" in err
    assert "dataset_coco.json: what is listed above, 2, cannot be used" in err
    assert not (tmp_path / "out").exists()
    assert captioning(tmp_path, coco, "--skip-bad") == 0
    assert "2 samples" in capsys.readouterr().out


def test_check_needs_no_model(coco, capsys):
    file, images = coco
    assert main(["evaluate", "retrieval", "--data", str(file), "--images", str(images), "--check"]) == 0
    assert capsys.readouterr().out == "dataset_coco.json: 4 samples, all of which can be read\n"


def test_check_alone(tmp_path, coco, capsys):
    assert captioning(tmp_path, coco, "--check", "--split", "val") == 0
    assert capsys.readouterr().out == "dataset_coco.json: 1 samples, all of which can be read\n"


@pytest.mark.slow
def test_built_in_with_controls(tmp_path, capsys):
    """Also that what was kept is not made again."""
    given = ["evaluate", "saliency", "--limit", "4", "--controls", "random", "smaller", "--seeds", "2"]
    given += ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "a.json")]
    assert main(given) == 0
    first = json.loads((tmp_path / "a.json").read_text())
    names = ["unmerged", "turbovlm", "random, seed 0", "random, seed 1", "smaller"]
    assert [row["setting"] for row in first["rows"]] == names
    ratios = [row["ratio"] for row in first["rows"]]
    assert max(ratios[1:]) - min(ratios[1:]) < 0.08 and abs(ratios[1] - 0.6) < 0.03
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main(given) == 0 and json.loads((tmp_path / "a.json").read_text()) == first
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main([*given, "--keep", "0.5"]) == 0
    assert before == {path: path.read_bytes() for path in before}
    assert (tmp_path / "out" / "turbovlm-keep=0.5.jsonl").exists()
    capsys.readouterr()


def test_two_settings_share_what_is_unmerged(tmp_path, coco, monkeypatch, capsys):
    """In the default folder; the same command again asks the model nothing."""
    monkeypatch.chdir(tmp_path)
    file, images = coco
    given = ["evaluate", "captioning", "--model", blip_folder(tmp_path, "ConditionalGeneration"), "--data", file]
    given = [str(each) for each in (*given, "--images", images, "--split", "test")]
    assert main([*given, "--r", "4"]) == 0
    (folder,) = (tmp_path / "turbovlm-evaluate").iterdir()
    assert folder.name.endswith("-dataset_coco-split=test")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert sorted(path.name for path in before) == ["turbovlm-r=4.jsonl", "unmerged.jsonl"]
    assert main([*given, "--keep", "0.5"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "turbovlm-keep=0.5.jsonl",
        "turbovlm-r=4.jsonl",
        "unmerged.jsonl",
    ]
    assert before == {path: path.read_bytes() for path in before}
    asked = []
    monkeypatch.setattr("turbovlm_lab.evaluate.run.batches", lambda *args: asked.append(args) or iter(()))
    assert main([*given, "--keep", "0.5"]) == 0 and not asked
    capsys.readouterr()


@pytest.mark.parametrize(("kept", "said"), [(True, "predictions so far are kept in out, and"), (False, "nothing was")])
def test_ctrl_c_says_what_is_kept(kept, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def stopped(task, model, predictor, data, settings, folder, **_):
        if kept:
            folder.mkdir()
            (folder / "unmerged.jsonl").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("turbovlm_lab.evaluate.study.run_study", stopped)
    assert main(["evaluate", "saliency", "--limit", "2", "--out", "out"]) == 130
    err = capfd.readouterr().err
    assert err.startswith(f"turbovlm: interrupted; {said}") and err.count("\n") == 1


def test_a_model_that_is_refused_is_not_loaded(tmp_path, coco, monkeypatch, capsys):
    monkeypatch.setattr("turbovlm_lab.evaluate.asking.asked", lambda *args: 1 / 0)
    TurboConfig((1,) * 99).save(tmp_path / "deep.json")
    assert captioning(tmp_path, coco, "--settings", tmp_path / "deep.json") == 2
    assert "99" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--dtype", "float16"], ["--device", "cuda"], ["--prompt", "what is it"]])
def test_built_in_models_run_in_one_way(given, capsys):
    assert main(["evaluate", "vqa", *given]) == 2
    assert f"{' '.join(given)}: built-in models run in float32 on the CPU" in capsys.readouterr().err


def test_one_image_has_no_distribution(capsys):
    pytest.importorskip("diffusers")
    assert main(["evaluate", "text-to-image", "--limit", "1"]) == 2
    assert "at least 2 prompts and 2 real images are needed" in capsys.readouterr().err


def test_merging_in_the_tower_and_before_the_language_model(tmp_path, coco, capsys):
    """Both amounts make one setting, of a config each; settings that were saved alone stand beside it."""
    ReadConfig(0.25).save(tmp_path / "quarter.json")
    file, images = coco
    given = ["--model", llava_folder(tmp_path), "--data", file, "--images", images, "--r", 2, "--visual-keep", 0.5]
    given += ["--settings", tmp_path / "quarter.json", "--out", tmp_path / "out", "--json", tmp_path / "a.json"]
    assert main(["evaluate", "captioning", *map(str, given)]) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["setting"] for row in rows] == ["unmerged", "turbovlm", "quarter"] and rows[1]["ratio"] < 0.95
    header = json.loads((tmp_path / "out" / "turbovlm-r=2-visual_keep=0.5.jsonl").read_text().splitlines()[0])
    assert header["setting"] == {"TurboConfig": {"r": 2}, "ReadConfig": {"visual_keep": 0.5}}


def test_images_from_prompts(tmp_path, capsys):
    pytest.importorskip("diffusers")
    (tmp_path / "real").mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (50 * number, 90, 0)).save(tmp_path / "real" / f"{number}.png")
    (tmp_path / "prompts.txt").write_text("a dog\na cat\na hat\n")
    given = ["--model", stable_diffusion_folder(tmp_path), "--data", tmp_path / "prompts.txt", "--features", "vit"]
    given += ["--images", tmp_path / "real", "--steps", 2, "--keep", 0.5, "--pictures", tmp_path / "made"]
    given += ["--out", tmp_path / "out", "--json", tmp_path / "a.json", "--seed", 3]
    assert main(["evaluate", "text-to-image", *map(str, given)]) == 0
    unmerged, ours = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert unmerged["metrics"][0]["name"] == "Fréchet distance" and ours["ratio"] < 1 and ours["same"] is None
    assert ours["metrics"][0]["value"] != unmerged["metrics"][0]["value"]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [f"00000{seed}.png" for seed in (3, 4, 5)]
    assert "3 samples" in capsys.readouterr().out


WRONG = {
    "an unknown file": (["captioning", "--model", "m", "--data", "none.json"], "none.json: there is no such file"),
    "data without a model": (["vqa", "--data", "none.json"], "--data without --model"),
    "images without data": (["vqa", "--images", "x"], "--images says where --data are"),
    "steps of a question": (["vqa", "--steps", "3"], "--steps: only text-to-image has it"),
    "no batch": (["saliency", "--batch", "0"], "--batch 0: must be an integer ≥ 1"),
    "no share": (["saliency", "--limit", "2", "--flops", "2"], "flops=2.0: must be"),
    "workers": (["saliency", "--workers", "-1"], "--workers -1: must be an integer from 0 to"),
    "nowhere to write to": (["saliency", "--json", "none/a.json"], "--json none/a.json: there is no folder none"),
    "a plot": (["saliency", "--plot", "a.txt"], "--plot a.txt: must end in"),
    "an amount of another workflow": (
        ["text-to-image", "--limit", "1", "--r", "2"],
        "r=2: TurboConfig has it, which is for encoders: r, keep or flops",
    ),
    "no samples": (["saliency", "--limit", "0"], "limit=0: must be an integer ≥ 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, message = WRONG[case]
    assert main(["evaluate", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_help_names_tasks_and_formats(capsys):
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "--help"])
    out = " ".join(capsys.readouterr().out.split())  # as wide as the terminal
    assert left.value.code == 0 and "text-to-image" in out and "Karpathy's splits" in out and "--controls" in out
