"""A corpus embedded on Ray Data: the rows of the engine in one process, whoever is killed: `make test-engines`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from corpora import drawn, in_folder, in_tar, save_clip
from turbovlm.corpus import Job, embed
from turbovlm.corpus import folder as folders
from turbovlm.engines import ray as engine
from turbovlm.engines.ray import ImageEmbedder, check_resources, on_ray
from turbovlm.errors import ConfigError, DataError, TurboError
from turbovlm.loading import ModelSpec
from turbovlm.loading.images import decode

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed: make test-engines sets up an environment with it", allow_module_level=True)

import ray
import ray.data

STORE = 80 * 2**20
"""Bytes, about the fewest that Ray takes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return in_folder(tmp_path_factory.mktemp("corpus") / "photos", 40, bad=(7, 12))


@pytest.fixture(scope="module")
def whole(model, photos, tmp_path_factory):
    """What the engine in one process writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    embed(photos, out, job_of(model), shard_size=9)
    return parts(out)


@pytest.fixture(scope="module")
def cluster():
    """Three cores by name, for two actors and one task that reads, whatever the machine has."""
    ray.init("local", num_cpus=3, object_store_memory=STORE, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def job_of(model, batch=4):
    return Job(ModelSpec(model), (), {"r": 8}, batch)


def parts(out: Path):
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*"))}


def processes(named: bytes, where: str = "cmdline"):
    """Processes in whose command line, or environment, this stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if named in (path / where).read_bytes():
                found.append(int(path.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.mark.parametrize("actors", [1, 2])
def test_rows_are_those_of_one_process(cluster, model, photos, whole, tmp_path, actors):
    """And a caller's cluster, loggers and context are as they were."""
    before = [(each, each.level, list(each.filters)) for each in logging.getLogger("ray.data").handlers]
    context = ray.data.DataContext.get_current().copy()
    summary = embed(photos, tmp_path / "out", job_of(model), shard_size=9, engine=on_ray(actors))
    assert (summary.counts.images, summary.counts.errors) == (40, 2)
    assert parts(tmp_path / "out") == whole
    assert ray.is_initialized()
    assert before == [(each, each.level, list(each.filters)) for each in logging.getLogger("ray.data").handlers]
    after = ray.data.DataContext.get_current()
    for name in ("target_max_block_size", "enable_progress_bars", "print_on_execution_start"):
        assert getattr(after, name) == getattr(context, name)


def test_an_actor_that_is_killed_loses_and_doubles_nothing(cluster, model, photos, whole, tmp_path):
    killed = []

    def killing(*asked):
        for number, rows in enumerate(on_ray(2)(*asked)):
            if number == 1:
                killed.append(processes(b"ray::MapWorker")[0])
                os.kill(killed[0], signal.SIGKILL)
            yield rows

    embed(photos, tmp_path / "out", job_of(model, batch=1), shard_size=9, engine=killing)
    assert killed
    alone = tmp_path / "alone"
    embed(photos, alone, job_of(model, batch=1), shard_size=9)
    assert parts(tmp_path / "out") == parts(alone)


def test_a_tar_that_breaks_off_is_counted(cluster, model, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    in_tar(shards / "a.tar", range(10))
    in_tar(shards / "b.tar", range(10, 20))
    (shards / "b.tar").write_bytes((shards / "b.tar").read_bytes()[:6000])
    summary = embed(shards, tmp_path / "out", job_of(model), engine=on_ray(1))
    embed(shards, tmp_path / "alone", job_of(model))
    assert summary.counts.errors == 1
    assert summary.counts.examples[0].startswith("b.tar: cannot be read behind its first")
    assert parts(tmp_path / "out") == parts(tmp_path / "alone")


def test_reading_waits_for_actors(cluster, tmp_path, monkeypatch):
    """Twice the object store in prepared images, which are read faster than embedded, pass through it unspilled."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": 10, "eos_token_id": 1, "bos_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config={**size, "patch_size": 32})).save_pretrained(
        tmp_path / "model"
    )
    CLIPImageProcessor().save_pretrained(tmp_path / "model")
    job = Job(ModelSpec(str(tmp_path / "model")), (), {"r": 4}, 8)

    class Slow(engine._Actor):
        def __call__(self, row):
            time.sleep(0.2)
            return super().__call__(row)

    monkeypatch.setattr(engine, "_Actor", Slow)
    in_folder(tmp_path / "photos", 1)
    for index in range(280):
        shutil.copy(tmp_path / "photos/sub/0000.jpg", tmp_path / f"photos/{index:04d}.jpg")
    summary = embed(tmp_path / "photos", tmp_path / "out", job, shard_size=70, engine=on_ray(1))
    assert summary.counts.images == 281
    assert 2 * STORE < 281 * 3 * 224 * 224 * 4
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert not [path for path in session.glob("ray_spilled_objects*/*") if path.is_file()]


def test_what_a_worker_raises_arrives_as_it_was(cluster, model, photos, tmp_path):
    weightless = tmp_path / "weightless"
    shutil.copytree(model, weightless)
    (weightless / "model.safetensors").unlink()
    with pytest.raises(TurboError, match=r"weightless: transformers could not load it.*no file named"):
        embed(photos, tmp_path / "out", job_of(str(weightless)), shard_size=9, engine=on_ray(1))
    assert not parts(tmp_path / "out")


def test_a_pipeline_of_ones_own(cluster, model):
    contents = [drawn(index) for index in range(8)]
    contents[3] = b"no image"
    made = ray.data.from_items([{"row": row, "image": content} for row, content in enumerate(contents)]).map_batches(
        ImageEmbedder,
        fn_constructor_kwargs={"model": model, "r": 8},
        batch_size=3,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    rows = sorted(made.take_all(), key=lambda row: row["row"])
    embedder = ImageEmbedder(model, r=8)
    assert [row["row"] for row in rows if row["error"]] == [3]
    assert rows[3]["projected"] is None
    assert rows[3]["error"].startswith("does not decode")
    for row, content in zip(rows, contents):
        if row["error"] is None:
            pixels = np.asarray(decode(io.BytesIO(content)))  # as Ray's read_images gives them
            own = embedder({"image": pixels[None]})
            np.testing.assert_allclose(row["projected"], own["projected"].to_pylist()[0], atol=1e-5)


def test_a_pipeline_of_ones_own_names_its_column(model):
    embedder = ImageEmbedder(model, image="picture")
    with pytest.raises(DataError, match="image='picture': there is no such column; there are image"):
        embedder({"image": [drawn(0)]})
    with pytest.raises(DataError, match=r"column 'picture': must hold files' bytes or pixels in uint8, has float32"):
        embedder({"picture": [np.zeros((4, 4, 3), np.float32)]})


@pytest.mark.parametrize(
    "asked, message",
    [
        ((8, 1, 0), "concurrency=8 of 1 core each: Ray has 8 cores and 0 GPUs on 2 nodes, .* at most concurrency=7"),
        ((2, 4, 0), "concurrency=2 of 4 cores each: .* at most concurrency=1"),
        ((1, 5, 0), "concurrency=1 of 5 cores each: .* take fewer cores for each, or start Ray with more"),
        ((1, 1, 1), "concurrency=1 of 1 core each and a GPU: .* 0 GPUs .* at most concurrency=0"),
    ],
)
def test_actors_that_do_not_fit_are_refused(asked, message):
    with pytest.raises(ConfigError, match=message):
        check_resources([{"CPU": 4.0}, {"CPU": 4.0}], *asked)


def test_actors_that_fit_are_taken():
    check_resources([{"CPU": 4.0}, {"CPU": 4.0}], 7, 1, 0)
    check_resources([{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0}], 2, 2, 1)
    with pytest.raises(ConfigError, match="at most concurrency=1"):
        check_resources([{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0}], 2, 3, 1)


def test_too_many_actors_are_refused_before_any_starts(cluster, model, photos, tmp_path):
    with pytest.raises(ConfigError, match="concurrency=3 of 1 core each: Ray has 3 cores"):
        embed(photos, tmp_path / "out", job_of(model), engine=on_ray(3))
    with pytest.raises(ConfigError, match="and a GPU: Ray has 3 cores and 0 GPUs"):
        next(iter(on_ray(1)(Job(ModelSpec(model, "cuda")), [], engine.Columns())))
    with pytest.raises(ConfigError, match="device='cuda:1': Ray gives each actor the next GPU"):
        next(iter(on_ray(1)(Job(ModelSpec(model, "cuda:1")), [], engine.Columns())))


def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    def refuse(**_):
        raise ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:1")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(TurboError, match=r"RAY_ADDRESS=127\.0\.0\.1:1: Failed to connect .* unset it"):
        next(iter(on_ray()(Job(ModelSpec("any")), [], engine.Columns())))


@pytest.mark.parametrize("release", ["2.59.1", "3.0.0"])
def test_releases_that_were_not_tried_are_refused(monkeypatch, release):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release)
    with pytest.raises(TurboError, match=f"ray {release} is installed; the engine ray takes 2.60 to 2.x"):
        on_ray()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on(model, photos, tmp_path, how):
    """Killed, or by Ctrl-C: no process stays, and the same command makes the rest."""
    out, mark = tmp_path / "out", f"TURBOVLM_MARK={uuid.uuid4()}"
    corpus = tmp_path / "photos"
    shutil.copytree(photos, corpus)
    for index in range(40, 240):
        shutil.copy(photos / "0001.jpg", corpus / f"{index:04d}.jpg")
    command = [sys.executable, "-W", "ignore", "-m", "turbovlm", "embed", str(corpus), "--model", model, "--r", "8"]
    command += ["--out", str(out), "--shard-size", "5", "--batch", "2", "--engine", "ray"]
    name, value = mark.split("=")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
    environment["RAY_ADDRESS"] = "local"
    run = subprocess.Popen(
        command, env={**environment, name: value}, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: parts(out) or run.poll() is not None, 90)
        if how == signal.SIGINT:
            os.killpg(run.pid, how)  # as a terminal does
        else:
            os.kill(run.pid, how)
        said = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert 0 < len(parts(out)) < 48
    if how == signal.SIGINT:
        assert run.returncode == 130
        assert "the same command goes on" in said
        assert "Traceback" not in said
    # agents of a Ray whose driver was killed ended after 30 s to 100 s, all else at once
    wait_for(lambda: not processes(mark.encode(), "environ"), 200)
    summary = embed(corpus, out, job_of(model, batch=2), shard_size=5)
    assert 0 < summary.found < 48
    embed(corpus, tmp_path / "alone", job_of(model, batch=2), shard_size=5)
    assert parts(out) == parts(tmp_path / "alone")
    assert not list(out.glob(f"{folders.UNFINISHED}*"))


def wait_for(happened, seconds):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "took too long"
        time.sleep(0.02)
