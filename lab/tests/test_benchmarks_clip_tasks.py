"""The tasks that real CLIP is asked: their truth, their intervals, equal cost, and that nothing is measured twice."""

from __future__ import annotations

import gzip
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import clip_asked
import clip_tasks
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from turbovlm.errors import TurboError
from turbovlm_lab.evaluate.data import LazyImage
from turbovlm_lab.zoo import clip
from turbovlm_lab.zoo.clip_names import ClipNames

FETCH = Path(__file__).parents[2] / "studies" / "clip" / "fetch.py"


def module_of(path):
    """Not by name: several studies have a module of one name."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def units(*rows):
    found = np.array(rows, dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_settings_cost_alike():
    """On a tower of CLIP's shape; only the smaller image cannot have just any cost."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**clip.CONFIG, attn_implementation="sdpa")).eval()
    settings = clip_tasks.settings_of(model, 0.6)
    assert tuple(settings) == clip_tasks.SETTINGS
    runs = {name: clip_tasks.planned(model, name, setting) for name, setting in settings.items()}
    assert runs["unmerged"].macs == 1 and set(runs["unmerged"].tokens) == {197}
    assert set(runs["smaller image"].tokens) == {122} and runs["smaller image"].macs == pytest.approx(0.61, abs=0.01)
    for name in ("turbovlm", "ToMe", "paper (α=180)", "random"):
        assert runs[name].macs == pytest.approx(0.6, abs=0.01)
    assert runs["ToMe"].tokens == runs["paper (α=180)"].tokens != runs["unmerged"].tokens
    assert len({run.recipe for run in runs.values()}) == len(runs)


def test_a_row_is_known_while_its_setting_means_the_same():
    setting = clip_tasks.Setting({"flops": 0.6}, is_drawn=True)
    run = clip_tasks.Run("turbovlm", setting, "as it was", (197,), 0.6)
    row = {"recipe": "as it was", "seeds": 3, "limit": 9, "macs": 0.6}
    assert clip_tasks.is_known(row, run, 3, 9) and clip_tasks.is_known(row, run, 2, 9)
    assert not clip_tasks.is_known(row, run, 8, 9) and not clip_tasks.is_known(None, run, 1, 9)
    assert not clip_tasks.is_known(row, run, 3, 10)
    assert not clip_tasks.is_known({**row, "recipe": "other"}, run, 3, 9)
    fixed = clip_tasks.Run("ToMe", clip_tasks.Setting({"r": 12}), "as it was", (197,), 0.6)
    assert clip_tasks.is_known({**row, "seeds": 1}, fixed, 8, 9)


def test_scores_are_compared_image_by_image():
    whole = clip_asked.outcome(np.array(list("abcd")), list("abcc"))
    first = clip_asked.outcome(np.array(list("abdd")), list("abcc"))
    second = clip_asked.outcome(np.array(list("abcc")), list("abcc"))
    row = clip_tasks.compared([first, second], whole)
    assert row["same"][0] == 0.75 > row["same"][1] and row["by seed"] == [0.5, 1.0] and row["score"] == 0.75
    assert row["difference"][0] == 0 and row["difference"][1] < 0 < row["difference"][2]
    assert clip_tasks.compared([whole], whole)["difference"] == [0, 0, 0]
    unknown = clip_asked.outcome(np.array(list("ab")), None)
    assert clip_tasks.compared([unknown], unknown) == {"same": [1, 1, 1]}


def test_the_interval_of_pairs_draws_both_kinds():
    """Where values depend on one kind alone it is that kind's; it is the wider, the fewer samples there are."""
    values = np.random.default_rng(0).normal(size=50)
    rows, columns = (clip_tasks.over_pairs(np.broadcast_to(v, (50, 50))) for v in (values[:, None], values[None]))
    error = values.std() / 50**0.5
    for found in (rows, columns):
        assert found.value == pytest.approx(values.mean())
        assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    both = clip_tasks.over_pairs(values[:, None] + values[None])
    assert both.high - both.low == pytest.approx(2 * 1.96 * 2**0.5 * error, rel=0.05)


def test_names_are_the_nearest():
    names = ClipNames(("cat", "dog"), torch.eye(2))
    vectors = {"stamps": units((2, 1), (1, 2), (3, 1))}
    asked = clip_asked.Asked(vectors, vectors, {"stamps": ["cat", "cat", "cat"]}, names)
    (found,) = clip_asked.zero_shot("stamps", asked).values()
    assert found.answers.tolist() == [["cat", "dog", "cat"]] and found.scores.tolist() == [1, 0, 1]


def test_crops_are_looked_for_in_both_indices():
    """A setting that swaps two axes finds everything in an index of its own and only the rest in the other's."""
    whole, own = {"photographs": np.eye(4)}, {"photographs": np.eye(4)[[1, 0, 2, 3]]}
    found = clip_asked.retrieved(
        clip_asked.Asked(own | {"crops": own["photographs"]}, whole, {"photographs": None, "crops": None})
    )
    assert found["R@1, unmerged index"].scores.tolist() == [0, 0, 1, 1]
    assert found["R@1, index of its own"].scores.tolist() == [1, 1, 1, 1]


def test_everything_is_asked_of_a_classifier_that_was_not_taught_it():
    """One that knows by heart is wrong wherever labels have nothing to do with images."""
    chance = np.random.default_rng(0)
    images, labels = chance.normal(size=(40, 8)), np.array(["bag", "coat"] * 20)
    seen = []

    def by_heart(count):
        seen.append(count)
        return KNeighborsClassifier(1)

    answers, chances = clip_asked.cross_predicted(by_heart, images, images, labels)
    assert seen == [32] * clip_asked.FOLDS and 0.2 < (answers == labels).mean() < 0.8
    assert (np.array(["bag", "coat"])[chances.argmax(axis=1)] == answers).all()
    other, _ = clip_asked.cross_predicted(by_heart, images, images, labels, seed=1)
    assert (other != answers).any()


def test_small_faults_are_scored_on_their_own(monkeypatch):
    """Local faults that look nominal when asked are missed, and ranked by chance, while the rest is right."""
    monkeypatch.setattr(clip_asked, "STRENGTHS", (10,))
    chance = np.random.default_rng(0)
    labels = ["nominal", "local", "global"] * 20
    clear = {"nominal": (9, 0, 0), "local": (0, 9, 0), "global": (0, 0, 9)}
    blurred = {**clear, "local": clear["nominal"]}

    def drawn(table):
        return {"textiles": units(*(np.array(table[label]) + chance.normal(size=3) for label in labels))}

    whole, own = drawn(clear), drawn(blurred)
    found = clip_asked.learned_textiles(clip_asked.Asked(own, whole, {"textiles": labels}))
    scores = {name: outcome.scores.mean() for name, outcome in found.items()}
    assert scores["faultless ones passed, drop-in"] == 1 and scores["small faults found, drop-in"] == 0
    assert scores["accuracy, drop-in"] == pytest.approx(2 / 3)
    truth, areas = np.array(labels), []
    for draw in range(clip_asked.DRAWS):
        _, chances = clip_asked.cross_predicted(clip_asked.probe, whole["textiles"], own["textiles"], labels, draw)
        chosen = truth != "global"
        areas.append(roc_auc_score(truth[chosen] == "local", -chances[chosen, 2]))
    assert scores["AUC of small faults, drop-in"] == pytest.approx(np.mean(areas))
    clean = clip_asked.learned_textiles(clip_asked.Asked(whole, whole, {"textiles": labels}))
    assert {name: outcome.scores.mean() for name, outcome in clean.items()} == dict.fromkeys(scores, 1)


def test_a_drop_in_probe_is_taught_by_the_unmerged_model():
    whole = {"clothes": units(*[(1, 0), (0, 1)] * 20)}
    own = {"clothes": whole["clothes"][:, ::-1]}
    found = clip_asked.learned_clothes(clip_asked.Asked(own, whole, {"clothes": ["bag", "coat"] * 20}))
    assert {name: outcome.scores.mean() for name, outcome in found.items()} == {
        "linear probe, drop-in": 0,
        "linear probe, refitted": 1,
        "k-NN, drop-in": 0,
        "k-NN, refitted": 1,
    }


def test_crops_lie_in_the_photograph_and_are_the_same_again():
    ramp = Image.fromarray((np.add.outer(np.arange(100), np.arange(100))).astype(np.uint8))
    photo = LazyImage("ramp", lambda: ramp)
    crops = [clip_asked.a_crop(photo, seed) for seed in range(20)]
    assert all(50 <= crop.width == crop.height <= 80 for crop in crops)
    assert len({crop.getpixel((0, 0)) for crop in crops}) > 5
    assert all(np.asarray(crop).min() == np.asarray(crop)[0, 0].min() for crop in crops)
    assert clip_asked.a_crop(photo, 3).tobytes() == crops[3].tobytes()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A tower of two blocks, its forwards counted, and noise as photographs."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**clip.CONFIG | size, attn_implementation="sdpa")).eval()
    chance = np.random.default_rng(0)
    noise = [Image.fromarray(chance.integers(0, 255, (60, 60, 3), dtype=np.uint8)) for _ in range(4)]
    pictures = clip_asked.Pictures([LazyImage(str(n), image.copy) for n, image in enumerate(noise)])
    monkeypatch.setattr(clip_tasks, "EMBEDDINGS", tmp_path / "embeddings")
    monkeypatch.setattr(clip_tasks, "images_of", lambda name: pictures)
    monkeypatch.setattr(clip, "load_clip", lambda: model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_what_is_in_the_file_is_not_measured_again(tiny, tmp_path, monkeypatch):
    arguments = ["clip_tasks.py", "--tasks", "retrieval", "--out", str(tmp_path), "--seeds", "2"]

    def forwards(*more):
        tiny.clear()
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        clip_tasks.main()
        return len(tiny)

    assert forwards("--settings", "unmerged", "turbovlm", "random") == 2 * (1 + 1 + 2)
    assert forwards("--settings", "unmerged", "turbovlm", "random") == 0
    assert forwards("--settings", "smaller image") == 2
    assert forwards("--settings", "random", "--seeds", "3") == 2
    assert forwards("--settings", "random", "--seeds", "3", "--again") == 2 * 3
    assert forwards("--settings", "unmerged", "--limit", "3") == 2
    report = (tmp_path / "clip_tasks.md").read_text()
    assert "| task | unmerged | turbovlm | random | smaller image |" in report
    assert (tmp_path / "clip_tasks.png").stat().st_size > 1000
    with pytest.raises(SystemExit):  # no --names
        forwards("--tasks", "stamps")
    with pytest.raises(SystemExit):
        forwards("--flops", "0.5")


def test_clothes_are_read_by_turns(tmp_path):
    fetch = module_of(FETCH)
    numbers = np.repeat(np.arange(10, dtype=np.uint8), 3)
    images = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None, None], (30, 28, 28))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + numbers.tobytes()))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
    found = fetch.load_fashion("train", 2, tmp_path)
    assert [label for label, _ in found] == 2 * list(fetch.KINDS)
    assert [image.open("L").getpixel((0, 0)) for _, image in found] == [*range(0, 30, 3), *range(1, 30, 3)]
    with pytest.raises(TurboError, match="per_kind=4: train has as few as 3"):
        fetch.load_fashion("train", 4, tmp_path)
    with pytest.raises(TurboError, match=r"python studies/clip/fetch\.py"):
        fetch.load_fashion("t10k", 1, tmp_path)


def test_textiles_are_read_by_turns(tmp_path):
    fetch = module_of(FETCH)
    for fault in fetch.FAULTS:
        (tmp_path / fault).mkdir()
        for number in range(8):
            Image.new("L", (8, 8)).save(tmp_path / fault / f"{number}.jpg")
    found = fetch.load_textile(4, tmp_path)
    assert [label for label, _ in found] == 4 * list(fetch.FAULTS)
    assert all(Path(image.name).parent.name == label for label, image in found)
    assert len({image.name for _, image in found}) == 12
    with pytest.raises(TurboError, match="per_kind=9: nominal has 8 images"):
        fetch.load_textile(9, tmp_path)


def test_fetching_says_what_failed(tmp_path, monkeypatch):
    fetch = module_of(FETCH)
    with pytest.raises(TurboError, match="no-such-command is not installed"):
        fetch.command(["no-such-command"], tmp_path, "")
    with pytest.raises(TurboError, match="failed: away; try again"):
        fetch.command(["sh", "-c", "echo away >&2; exit 3"], tmp_path, "try again")
    empty = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: empty)
    with pytest.raises(TurboError, match="one file was expected"):
        fetch.fetch_fashion()
