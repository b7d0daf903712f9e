"""`turbovlm reproduce`: what is declared agrees with what is printed; searches and traces; a user's models and data."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

from folders import blip_folder, clip_folder
from turbovlm.cli import main
from turbovlm.config import DenoiseConfig, TurboConfig
from turbovlm.ops import LayeredDegree
from turbovlm.patching import patches_on
from turbovlm_lab.evaluate.data import Data, Sample
from turbovlm_lab.evaluate.run import Predictor
from turbovlm_lab.evaluate.scoring import Score
from turbovlm_lab.evaluate.settings import MATCHED, OWN, SMALLER
from turbovlm_lab.reproduce.declared import PLUGINS, comparisons, encoder_share
from turbovlm_lab.reproduce.overview import overview
from turbovlm_lab.reproduce.published import printed_rows
from turbovlm_lab.reproduce.running import SEARCH, Source, largest_savings, named, settings_of
from turbovlm_lab.reproduce.sources import Sources
from turbovlm_lab.reproduce.studies import chosen, every_study
from turbovlm_lab.reproduce.tracing import concentration

pytest.importorskip("transformers")


def test_every_printed_row_stands_in_one_comparison():
    """But those of Table 11, which is a search; a pruned model's stand beside the whole model's too."""
    shown = [
        line.printed for study in comparisons() if not study.pruned for line in study.lines if line.printed is not None
    ]
    wanted = [row for row in printed_rows() if row.table != 11]
    assert sorted(shown, key=repr) == sorted(wanted, key=repr) and len(wanted) > 60


def test_table_7_has_the_models_own_scores():
    rows = [row for row in printed_rows() if row.model == "AugReg ViT-S/16"]
    assert [(row.plugin, row.metrics) for row in rows] == [
        ("none", (("top1", 81.4),)),
        ("tome", (("top1", 79.3),)),
        ("turbo", (("top1", 79.9),)),
    ]


def test_shares_are_those_of_the_printed_costs():
    """Where the printed cost is the encoder's: Tables 2 and 5."""
    checked = 0
    for study in comparisons():
        own = study.lines[0].printed
        for line in study.lines:
            if study.name in ("table2", "table5") and not study.pruned and line.config and line.printed:
                share = line.printed.gmacs / own.gmacs
                assert line.builtin.flops == pytest.approx(share, abs=0.012), line
                checked += 1
    assert checked == 18
    assert encoder_share(1, "BLIP-B", 35) == 0.61


def test_the_overview_has_a_column_for_every_task_that_was_run(tmp_path):
    def row(kept, same):
        return {
            "metrics": [{"name": "top-1", "kept": kept and dict(zip(("value", "low", "high"), kept))}],
            "same": same,
        }

    def entry(*lines):
        return {"numbers": {"lines": [{"line": name, "row": each} for name, each in lines]}}

    own, same = ("unmerged", row(None, None)), {"value": 0.9}
    entries = {
        "tasks/vqa": entry(own, ("turbovlm", row((0.99, 0.97, 1.01), same)), (SMALLER, row((0.8, 0.7, 0.9), None))),
        "table5/BLIP2/COCO": entry(own),
    }
    assert overview(entries, tmp_path) is None and not list(tmp_path.iterdir())
    entries["tasks/nlvr2"] = entry(own, ("turbovlm", row((1.02, 0.9, 1.1), same)))
    sheet = overview(entries, tmp_path)
    assert sheet.header == ("setting", "vqa: top-1 kept", "same answer", "nlvr2: top-1 kept", "same answer")
    assert sheet.rows == (
        ("turbovlm", "99.0% [97.0%, 101.0%]", "90.0%", "102.0% [90.0%, 110.0%]", "90.0%"),
        (SMALLER, "80.0% [70.0%, 90.0%]", "", "", ""),
    )
    assert Image.open(tmp_path / "overview.png").width > 500 and (tmp_path / "overview.svg").exists()


def test_pruned_models_are_comparisons_of_their_own(tmp_path):
    found = {study.key: study for study in comparisons() if study.pruned}
    assert list(found) == [
        *("table1/BLIP-B/NLVR2/UPop", "table2/BLIP-B/VQAv2/UPop", "table3/BLIP-B/COCO/UPop"),
        *("table5/BLIP-B/Flickr30k/UPop", "table5/BLIP-B/COCO/UPop"),
    ]
    own, turbo, *controls, smaller = found["table1/BLIP-B/NLVR2/UPop"].lines
    assert own.name == OWN and dict(own.printed.metrics)["dev"] == 80.3
    assert turbo.config.r == 35 and turbo.config.alpha == 180 and dict(turbo.printed.metrics)["dev"] == 79
    assert [line.name for line in controls] == ["turbovlm, r=35", "random, r=35", "uniform, r=35"]
    assert smaller.name == SMALLER
    by_costs = found["table3/BLIP-B/COCO/UPop"].lines[1]
    assert by_costs.config.r == 30 and dict(by_costs.printed.metrics)["cider"] == 126
    assert found["table5/BLIP-B/COCO/UPop"].lines[1].printed is None
    entry = {"model": "m", "data": "d"}
    for key, study in found.items():
        assert Sources(tmp_path, None, 4).named(study) is None
        assert Sources(tmp_path, {study.task: entry, study.name: entry}, 4).named(study) is None
        assert Sources(tmp_path, {study.task: entry, key: entry}, 4).named(study) == key


def test_lines_run_as_printed():
    found = {study.key: {line.name: line for line in study.lines} for study in comparisons()}
    turbo = found["table1/BLIP-B/NLVR2"]["turbo, r=35"]
    assert turbo.config.r == 35 and turbo.config.alpha == 180 and turbo.config.partition == "alternate"
    assert not found["table1/BLIP-B/NLVR2"]["UPop"].runs and "UPop" not in PLUGINS
    threshold = found["table10/BLIP-B/COCO"]["turbo min_tokens=130, r=65"]
    assert (threshold.config.r, threshold.config.min_tokens) == (65, 130)
    assert (threshold.builtin.r, threshold.builtin.min_tokens) == (29, 58)
    assert found["table6/SD1.5/ImageNet-1k-classes"]["turbo, 30%"].config == DenoiseConfig(0.7)
    begun = next(study for study in comparisons() if study.key == "table6/SD1.5/ImageNet-1k-classes/image-to-image")
    assert begun.strength == 0.6 and [line.printed.metrics[0] for line in begun.lines[:2]] == [
        ("fid", 30.04),
        ("fid", 30.69),
    ]
    fused = found["table9"]
    assert fused["S3, E = R(1 − αA), α=2"].config.alpha == 60 and fused["S2, E = R/A"].config.alpha is None
    assert fused["S4, E = R − β^|γ−l| αA, α=6, β=0.9, γ=5"].config.degree == LayeredDegree(180, 0.9, 5)
    assert "degree=LayeredDegree(alpha=180.0, beta=0.9, gamma=5.0)" in named(
        fused["S4, E = R − β^|γ−l| αA, α=6, β=0.9, γ=5"].config
    )
    for study in comparisons():
        assert study.lines[0].name == OWN and study.lines[0].config is None
        assert len({line.name for line in study.lines}) == len(study.lines)


def test_studies_are_named_by_table_figure_or_key():
    every = {study.key for study in every_study()}
    assert {study.name for study in every_study()} == {"tasks", *(f"table{n}" for n in range(1, 13)), "figure3",
                                                      "figure4", "figure5", "figure6"}  # fmt: skip
    assert {study.key for study in chosen(["all"])} == every
    assert {study.key for study in chosen(["tables", "figures", "tasks"])} == every
    assert [study.key for study in chosen(["table5/BLIP-B"])] == [
        "table5/BLIP-B/Flickr30k",
        "table5/BLIP-B/Flickr30k/UPop",
        "table5/BLIP-B/COCO",
        "table5/BLIP-B/COCO/UPop",
    ]
    assert [study.key for study in chosen(["figure4/retrieval", "figure4"])] == [
        "figure4/retrieval",
        "figure4/captioning",
    ]


class Toy:
    """Answers what share of the cost is left, which is worth what `worse` says."""

    def __init__(self, folder, worse=lambda config: 1.0):
        from turbovlm_lab.zoo import load_saliency_vit

        self.model, self.worse = load_saliency_vit().backbone, worse
        samples = tuple(Sample(f"{i}") for i in range(2))
        predictor = Predictor(self.model, lambda sample, size: size or 224, self.predict, range(14, 225, 14))
        self.source = Source("vqa", "toy", predictor, Data("d", samples), folder, True, self.score)

    @torch.inference_mode()
    def predict(self, prepared):
        share = next((patch.feature.config.flops for patch in patches_on(self.model)), None)
        self.model(pixel_values=torch.zeros(1, 3, prepared[0], prepared[0]))
        return [share] * len(prepared)

    def score(self, data, predictions):
        worth = tuple(self.worse(share) for share in predictions)
        return [Score("accuracy", sum(worth) / len(worth), worth, (0, 1))]


def test_lines_of_one_config_are_asked_once(tmp_path):
    study = next(study for study in comparisons() if study.key == "table8/BLIP-B/COCO")
    settings = settings_of(dataclasses.replace(study, task="vqa"), Toy(tmp_path).source)
    by_name = {name: setting.name for name, setting in settings.items()}
    assert by_name["unmerged"] == OWN and by_name["turbovlm, r=30*"] == "flops=0.67"
    assert by_name["redundancy (A2), r=30*"].startswith("flops=0.67, degree=redundancy, similarity=keys")
    assert settings[SMALLER].image_size in range(168, 197) and settings[SMALLER].name.endswith("pixels")
    other = next(study for study in comparisons() if study.key == "table3/BLIP-B/COCO")
    again = settings_of(other, Toy(tmp_path).source)
    assert again["redundancy, r=30*"].name == by_name["redundancy (A2), r=30*"]


def test_the_default_is_also_asked_at_the_smaller_images_cost(tmp_path):
    study = next(study for study in comparisons() if study.key == "tasks/vqa")
    source = Toy(tmp_path).source
    settings = settings_of(study, source)
    cost = source.size_costs[settings[SMALLER].image_size] / source.size_costs[224]
    assert settings[MATCHED].configs == (TurboConfig(flops=round(cost, 3)),) and cost != 0.6


@pytest.mark.slow
def test_the_largest_saving_is_found(tmp_path):
    """A score that falls below 95 % between 0.55 and 0.5 of the cost; one that is never below; one that always is."""
    for worse, expected in (
        (lambda share: 1.0 if share is None or share > 0.52 else 0.9, 0.55),
        (lambda share: 1.0, SEARCH[-1]),
        (lambda share: 1.0 if share is None else 0.5, None),
    ):
        folder = tmp_path / str(expected)
        found = largest_savings(Toy(folder, worse).source, ("turbovlm",), lambda done: None)["turbovlm"]
        assert (found is None) == (expected is None)
        assert found is None or found.ratio == pytest.approx(expected, abs=0.02)


def test_concentration_is_the_share_of_a_tenth():
    even = torch.full((2, 40), 1 / 40)
    assert concentration(even).tolist() == pytest.approx([0.1, 0.1])
    assert concentration(torch.eye(40)[:1]).tolist() == [1]


def test_configs_are_named_by_what_they_change():

    assert (
        named(TurboConfig(r=8)) == "r=8" and named(TurboConfig(keep=0.5, degree="random")) == "keep=0.5, degree=random"
    )


@pytest.fixture
def sources(tmp_path):
    """BLIP and CLIP in folders, and COCO's captions in Karpathy's layout."""
    (tmp_path / "coco").mkdir()
    entries = []
    for number in range(4):
        Image.new("RGB", (60, 40), (60 * number, 90, 0)).save(tmp_path / "coco" / f"{number}.jpg")
        said = [{"raw": "what is a dog"}, {"raw": f"a dog w{30 + number}"}]
        entries.append({"filepath": "", "filename": f"{number}.jpg", "split": "test", "sentences": said})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    data = {"data": [str(tmp_path / "dataset_coco.json")], "images": str(tmp_path / "coco"), "split": "test"}
    content = {
        "captioning": {"model": blip_folder(tmp_path, "ConditionalGeneration"), **data},
        "table5/BLIP-B/COCO": {"model": clip_folder(tmp_path), **data, "limit": 3},
    }
    file = tmp_path / "sources.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.slow
def test_a_users_models_and_data(tmp_path, sources, capsys):
    out = tmp_path / "out"
    document = tmp_path / "document.json"
    given = ["reproduce", "table5", "table10", "figure3", "--sources", str(sources), "--out", str(out)]
    assert main([*given, "--json", str(document)]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert max(len(line) for line in said.out.splitlines() if str(tmp_path) not in line) <= 80
    left_out = said.err.partition("has nothing for: ")[2].split("\n")[0].split(", ")
    assert left_out == [
        *("table5/BLIP2/Flickr30k", "table5/BLIP2/COCO"),
        *("table5/BLIP-B/Flickr30k", "table5/BLIP-B/Flickr30k/UPop", "table5/BLIP-B/COCO/UPop", "figure3"),
    ]
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["table5/BLIP-B/COCO", "table10/BLIP-B/COCO"]
    assert json.loads(document.read_text()) == {"report": str(out / "report.md"), "studies": results}
    lines = {line["line"]: line for line in results["table5/BLIP-B/COCO"]["numbers"]["lines"]}
    assert lines["turbo, r=30*"]["printed"]["metrics"][0] == ["i2t_r1", 78.8]
    assert lines["turbo, r=30*"]["row"]["ratio"] < 1 and lines["UPop"]["row"] is None
    report = (out / "report.md").read_text()
    assert "| turbo, r=30* | 36.8 | 78.8 | 94.7 | 61.3 | 84.2 | 96.2% |" in report and "3 samples" in report
    for name in ("table5-blip-b-coco", "table10-blip-b-coco"):
        assert Image.open(out / f"{name}.png").size[0] > 500 and (out / f"{name}.svg").stat().st_size > 1000
        assert f"({name}.png)" in report
    before = {path: path.read_bytes() for path in (out / "predictions").rglob("*.jsonl")}
    assert main(given) == 0 and before == {path: path.read_bytes() for path in before}
    again = json.loads((out / "results.json").read_text())
    assert all(again[key].pop("seconds") >= results[key].pop("seconds") > 0 for key in results)
    assert again == results
    capsys.readouterr()
    assert main(["reproduce", "table8", "--sources", str(sources), "--out", str(out)]) == 0
    first, last = list(results)
    found = list(json.loads((out / "results.json").read_text()))
    assert found == [first, "table8/BLIP-B/COCO", last], "in the paper's order"
    assert report.splitlines()[8] in (out / "report.md").read_text(), "what an earlier run found is kept"
    (out / "results.json").write_text("[]")
    assert main(given) == 2 and "is not of turbovlm reproduce" in capsys.readouterr().err


def test_a_users_data_are_checked_first(tmp_path, sources, capsys):
    (tmp_path / "coco" / "2.jpg").write_text("no image")
    given = ["reproduce", "table5", "table10", "--sources", str(sources), "--out", str(tmp_path / "out")]
    assert main(given) == 2
    err = capsys.readouterr().err
    broken = f"{tmp_path / 'coco' / '2.jpg'}: does not decode"
    said = [line for line in err.splitlines() if broken in line]
    assert [line.partition(":")[0] for line in said] == ["table5/BLIP-B/COCO", "captioning"]
    assert "nothing was run" in err and not (tmp_path / "out").exists()


WRONG = {
    "nothing": ([], "name what to reproduce"),
    "no models": (["all"], "give --builtin or --sources FILE"),
    "what there is not": (["table99", "--builtin"], "'table99': must be all, tables, figures, tasks, table1, "),
    "no file": (["all", "--sources", "none.json"], "none.json: there is no such file; --template"),
    "no images": (["all", "--builtin", "--images", "0"], "--images 0: must be an integer ≥ 1"),
    "no images, in the older spelling": (["all", "--builtin", "--pictures", "0"], "--images 0: must be an integer ≥ 1"),
    "quick and many": (["all", "--builtin", "--quick", "--images", "9"], "give --quick or --images"),
    "bf16 of built-in": (["all", "--builtin", "--dtype", "bfloat16"], "built-in models run in float32"),
    "a pruned model": (["table1/BLIP-B/NLVR2/UPop", "--builtin"], "pruned models come by --sources"),
    "workers": (["all", "--builtin", "--workers", "-1"], "--workers -1: must be an integer from 0 to"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_a_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, message = WRONG[case]
    assert main(["reproduce", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


WRONG_SOURCES = {
    "no JSON": ("{", "is no JSON"),
    "a list": ("[]", "must be an object with an entry per task or comparison"),
    "an unknown name": ('{"tabel5": {"model": "m", "data": "d"}}', "'tabel5' is no task or comparison"),
    "no data": ('{"vqa": {"model": "m"}}', "'vqa' must have model and data, and may have images, split"),
    "an unknown field": ('{"vqa": {"model": "m", "data": "d", "r": 3}}', "'vqa' must have model and data"),
    "another task": ('{"vqa": {"model": "m", "data": "d"}}', "has no entry for any of table3"),
}


@pytest.mark.parametrize("case", WRONG_SOURCES)
def test_what_is_wrong_with_sources(case, capsys, tmp_path):
    content, message = WRONG_SOURCES[case]
    (tmp_path / "s.json").write_text(content)
    assert main(["reproduce", "table3", "--sources", str(tmp_path / "s.json"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_template_to_begin_with(tmp_path, capsys):
    file = tmp_path / "s.json"
    assert main(["reproduce", "--template", str(file)]) == 0
    assert json.loads(file.read_text())["captioning"]["split"] == "test"
    assert main(["reproduce", "--template", str(file)]) == 2
    assert "it is not written over" in capsys.readouterr().err
    assert main(["reproduce", "table3", "--sources", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "dataset_coco.json: there is no such file" in capsys.readouterr().err


def test_list_names_every_study(capsys):
    assert main(["reproduce", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(study.key in out for study in every_study())
