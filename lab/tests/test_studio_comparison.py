"""The studio's comparison of methods, its image sets, and jobs that can be watched and stopped."""

from __future__ import annotations

import csv
import json
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from PIL import Image

from turbovlm.errors import ConfigError, DataError
from turbovlm.patching import patches_on
from turbovlm_lab.demo.result import METHODS, RANDOM, SMALLER, TOME, Settings
from turbovlm_lab.studio.compared import chart, table
from turbovlm_lab.studio.comparison import Comparison, compare, drawings, summary, to_csv, to_json, warnings
from turbovlm_lab.studio.encoders import ImageEncoder
from turbovlm_lab.studio.image_sets import MOST_IMAGES, ImageSet, built_in, read_files
from turbovlm_lab.studio.jobs import Job, Report, Stopped, in_words, stop_all
from turbovlm_lab.studio.subjects import IMAGE, Models, Subject
from turbovlm_lab.zoo import clip, saliency

QUICK = Settings(shares=(0.7, 0.5), batch=2, rounds=2, shown=2)


def clip_like() -> ImageEncoder:
    """CLIP's image tower with random weights: an embedding of each image, at any size."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = CLIPVisionConfig(**size, image_size=224, patch_size=16, projection_dim=clip.WIDTH)
    model = CLIPVisionModelWithProjection(config).eval()
    return ImageEncoder(model, 224, 16, clip.preprocess, clip.embed, lambda *_: {}, "a tower")


def tokens_of(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=pixels).last_hidden_state


def dense() -> ImageEncoder:
    """DINOv2 with random weights: every position's token, at any size."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"hidden_size": 32, "mlp_ratio": 2, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(**size, image_size=224, patch_size=14)).eval()
    how = (224, 14, saliency.preprocess, tokens_of, lambda *_: {}, "a tower")
    return ImageEncoder(model, *how, fixed={"dense": True})


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(clip_like(), "small", built_in(3), QUICK, METHODS, Report())


def test_every_method_is_measured_at_every_share(found) -> None:
    named = [(row.cost.method, row.cost.share) for row in found.rows]
    assert named == [("unmerged", None), *((method.key, share) for share in QUICK.shares for method in METHODS)]
    for row in found.rows[1:]:
        own = next(other for other in found.rows if other.cost.method == "turbo" and other.cost.share == row.cost.share)
        tolerance = 0.1 if row.cost.method == SMALLER.key else 0.01
        assert row.cost.macs == pytest.approx(own.cost.macs, abs=tolerance)
        assert row.cost.ms > 0
        assert 0 < row.kept.drift < 2
        assert row.kept.worst <= row.kept.cosine <= 1 + 1e-6
    assert found.rows[0].kept.drift == pytest.approx(0, abs=1e-5)


def test_files_have_what_was_measured(found) -> None:
    lines = list(csv.DictReader(to_csv(found).splitlines()))
    read = json.loads(to_json(found))
    assert [float(line["drift"]) for line in lines] == [row["drift"] for row in read["rows"]]
    assert read["images"] == list(found.names) == ["astronaut", "chelsea", "coffee"]
    assert read["settings"]["shares"] == list(QUICK.shares)


def test_what_is_said_names_every_share_and_what_must_be_known(found) -> None:
    assert len(summary(found)) == len(QUICK.shares)
    assert "Drift is measured on 3 images only." in warnings(found)
    assert chart(found).count("<svg") == 1
    assert table(found).count("<tr") == len(found.rows) + 1


def test_drawings_have_as_many_groups_as_tokens(found) -> None:
    for block in (0, found.depth - 1):
        drawn = drawings(found, 0.5, block, 1)
        assert [*drawn] == [method.key for method in METHODS]
        for key in ("turbo", "tome", "random"):
            tokens, image = drawn[key]
            (trace,) = [entry for entry in found.merged[key, 0.5].traces if entry.block == block]
            assert tokens == trace.source[1].unique().numel()
            assert image.size == (224, 224)
    assert drawings(found, 0.5, 3, 0)["turbo"][1].tobytes() != drawings(found, 0.5, 0, 0)["turbo"][1].tobytes()


def test_methods_can_be_left_out_and_the_model_is_left_alone() -> None:
    loaded = clip_like()
    made = compare(loaded, "small", built_in(2), Settings((0.6,), 2, 1, shown=1), (TOME,), Report())
    assert [row.cost.method for row in made.rows] == ["unmerged", "turbo", "tome"]
    assert not list(patches_on(loaded.model))


def test_tokens_of_a_smaller_image_are_compared_position_by_position() -> None:
    made = compare(dense(), "small", built_in(2), Settings((0.5,), 2, 1, shown=1), (RANDOM, SMALLER), Report())
    drift = {row.cost.method: row.kept.drift for row in made.rows}
    assert 0 < drift["turbo"] < 1
    assert 0 < drift["smaller"] < 1
    assert drift["unmerged"] == pytest.approx(0, abs=1e-5)


def test_an_encoder_of_one_size_is_compared_without_smaller_images() -> None:
    loaded = dense()
    loaded.encode = lambda model, pixels: tokens_of(model, pixels).flatten(1)
    made = compare(loaded, "small", built_in(2), Settings((0.5,), 2, 1, shown=1), METHODS, Report())
    assert "smaller" not in {row.cost.method for row in made.rows}
    assert any(said.startswith("Smaller images are left out") for said in warnings(made))


@pytest.mark.parametrize(("count", "shares", "said"), [(1, (0.5,), "at least two"), (3, (), "at least one share")])
def test_too_little_to_compare(count, shares, said) -> None:
    with pytest.raises(ConfigError, match=said):
        compare(clip_like(), "small", built_in(count), Settings(shares), METHODS, Report())


def test_a_comparison_stops_when_it_is_asked_to() -> None:
    report = Report()
    report.stop()
    with pytest.raises(Stopped):
        compare(clip_like(), "small", built_in(2), QUICK, METHODS, report)


def test_files_that_are_no_images_are_named_and_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    Image.new("RGB", (3000, 20), "blue").save(tmp_path / "b.jpg")
    (tmp_path / "c.png").write_text("text")
    files, read = sorted(tmp_path.iterdir()), []
    pictures = read_files(files, lambda: read.append(1))
    assert pictures.names == ("a.png", "b.jpg")
    assert max(pictures.images[1].image.size) == 1024
    assert [said.partition(" is")[0] for said in pictures.left_out] == ["left out: c.png:"]
    assert len(read) == 3
    with pytest.raises(DataError, match=f"at most {MOST_IMAGES}"):
        read_files([files[0]] * (MOST_IMAGES + 1))
    assert read_files([]) == ImageSet(())


def test_a_path_that_was_not_uploaded_is_not_read(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from turbovlm_lab.studio import calibrating, comparing

    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    shop = Models([Subject("small", "small", "", IMAGE, clip_like, encodes=True)])
    mine = [str(tmp_path / "a.png")] * 2
    with pytest.raises(DataError, match="not uploaded here"):
        comparing._prepare(shop, "small", "upload", 2, mine, [], [0.5], 2)
    with pytest.raises(DataError, match="not uploaded here"):
        calibrating._prepare(shop, "small", "upload", mine, "", "flops", 0.6, 1, False, False, 1)


def test_a_job_waits_for_its_turn_tells_how_far_it_is_and_stops() -> None:
    turn, going = threading.RLock(), threading.Event()

    def work(report: Report) -> None:
        report.begin("counting", 1000)
        for _ in range(1000):
            report.advance()
            going.set()
            time.sleep(0.01)

    with turn:
        job = Job(work, turn)
        assert not job.wait(0.3)
        assert job.report.progress.stage == "waiting for another run to end"
    assert going.wait(5)
    assert not job.wait(0.3)
    progress = job.report.progress
    assert (progress.stage, progress.total) == ("counting", 1000)
    assert 0 < progress.done < 1000
    assert progress.left is None or progress.left > 0
    job.stop()
    assert job.wait(5)
    with pytest.raises(Stopped):
        job.result()
    assert turn.acquire(timeout=1)


def test_a_job_gives_its_result_or_its_error() -> None:
    assert Job(lambda report: 3).result() == 3
    with pytest.raises(ZeroDivisionError):
        Job(lambda report: 1 // 0).result()


def test_a_job_that_waits_can_be_stopped() -> None:
    turn = threading.RLock()
    with turn:
        job = Job(lambda report: 1, turn)
        job.stop()
        assert job.wait(5)
    with pytest.raises(Stopped):
        job.result()


def test_all_jobs_end_with_the_studio() -> None:
    def work(report: Report) -> None:
        while True:
            report.check()
            time.sleep(0.01)

    jobs = [Job(work), Job(work)]
    stop_all(5)
    assert all(job.wait(0) for job in jobs)


def test_durations_in_words() -> None:
    assert [in_words(seconds) for seconds in (0.4, 59, 61, 120, 610)] == ["0 s", "59 s", "1 min 1 s", "2 min", "10 min"]
