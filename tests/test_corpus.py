"""A corpus embedded: what is written equals the model's own output, and nothing is lost or doubled by a stop."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image

import turbovlm
from corpora import in_folder, in_tar, save_captioner, save_classifier, save_clip, save_dino
from turbovlm.cli import embed as cli_embed
from turbovlm.cli import main
from turbovlm.corpus import Job, embed
from turbovlm.corpus import folder as folders
from turbovlm.corpus.embed import local
from turbovlm.corpus.job import OUTPUTS
from turbovlm.errors import ConfigError, DataError, StateError, UnsupportedModelError
from turbovlm.loading import ModelSpec

SAVE = {"clip": save_clip, "classifier": save_classifier, "dino": save_dino, "captioner": save_captioner}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVE.items()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return in_folder(tmp_path_factory.mktemp("corpus") / "photos", 30, bad=(7, 12))


def job_of(model, *outputs, batch=8, **settings):
    texts = {name: settings.pop(name) for name in ("labels", "prompt", "max_new_tokens") if name in settings}
    return Job(ModelSpec(model), outputs, settings, batch, **texts)


def expected(model, photos, names, read, **settings):
    """What the library gives of one image at a time."""
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(model).architectures[0])
    whole = kind.from_pretrained(model).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(model)
    if settings:
        turbovlm.apply(whole, **settings)
    found = []
    with torch.no_grad():
        for name in names:
            pixels = processor(Image.open(photos / name).convert("RGB"), return_tensors="pt").pixel_values
            found.append(read(whole, pixels)[0].numpy())
    return np.stack(found)


READ = {
    ("clip", "projected"): lambda model, pixels: model.get_image_features(pixels).pooler_output,
    ("clip", "pooled"): lambda model, pixels: model.vision_model(pixels).pooler_output,
    ("clip", "cls"): lambda model, pixels: model.vision_model(pixels).last_hidden_state[:, 0],
    ("dino", "pooled"): lambda model, pixels: model(pixels).pooler_output,
    ("dino", "cls"): lambda model, pixels: model(pixels).last_hidden_state[:, 0],
    ("classifier", "cls"): lambda model, pixels: model.vit(pixels).last_hidden_state[:, 0],
}


@pytest.mark.parametrize("settings", [{}, {"r": 4}])
@pytest.mark.parametrize("model", ["clip", "dino", "classifier"])
def test_rows_are_what_the_model_gives(models, photos, tmp_path, model, settings):
    outputs = tuple(output for name, output in READ if name == model)
    summary = embed(photos, tmp_path / "out", job_of(models[model], *outputs, **settings), shard_size=11)
    table = pd.read_parquet(tmp_path / "out")
    assert sorted(table.name) == sorted(str(path.relative_to(photos)) for path in photos.rglob("*.jpg"))
    assert (summary.counts.images, summary.counts.errors, summary.shards, summary.made) == (30, 2, 3, 30)
    bad = table[table.error.notna()]
    assert set(bad.name) == {"0007.jpg", "sub/0012.jpg"} and bad[outputs[0]].isna().all()
    good = table[table.error.isna()]
    for name, row in zip(good.name, good.itertuples()):
        assert Image.open(photos / name).size == (row.width, row.height)
    for output in outputs:
        wanted = expected(models[model], photos, good.name, READ[model, output], **settings)
        assert np.abs(np.stack(good[output]) - wanted).max() < 1e-5


def test_merging_changes_the_rows(models, photos, tmp_path):
    for name, settings in (("whole", {}), ("merged", {"r": 8})):
        embed(photos, tmp_path / name, job_of(models["clip"], **settings))
    whole, merged = (np.stack(pd.read_parquet(tmp_path / name).projected.dropna()) for name in ("whole", "merged"))
    assert np.abs(whole - merged).max() > 1e-4


def test_labels(models, photos, tmp_path):
    embed(photos, tmp_path / "own", job_of(models["classifier"], "label"))
    table = pd.read_parquet(tmp_path / "own").dropna(subset="label")
    logits = expected(models["classifier"], photos, table.name, lambda model, pixels: model(pixels).logits)
    assert list(table.label) == [("cat", "dog", "house")[place] for place in logits.argmax(1)]
    assert np.allclose(table.score, torch.tensor(logits).softmax(1).amax(1), atol=1e-5)

    labels = ("a photo of a cat", "a red dog", "blue")
    embed(photos, tmp_path / "given", job_of(models["clip"], "label", "projected", labels=labels))
    table = pd.read_parquet(tmp_path / "given").dropna(subset="label")
    model = transformers.CLIPModel.from_pretrained(models["clip"]).eval()
    processor = transformers.AutoProcessor.from_pretrained(models["clip"])
    for name, label, score in zip(table.name, table.label, table.score):
        image = Image.open(photos / name).convert("RGB")
        inputs = processor(images=image, text=list(labels), padding=True, return_tensors="pt")
        with torch.no_grad():
            shares = model(**inputs).logits_per_image.softmax(-1)[0]
        assert label == labels[shares.argmax()] and abs(score - float(shares.max())) < 1e-5


def test_captions(models, photos, tmp_path):
    embed(photos, tmp_path / "out", job_of(models["captioner"], "caption", max_new_tokens=5, r=2))
    table = pd.read_parquet(tmp_path / "out").dropna(subset="caption")
    model = transformers.BlipForConditionalGeneration.from_pretrained(models["captioner"]).eval()
    turbovlm.apply(model, r=2)
    processor = transformers.AutoProcessor.from_pretrained(models["captioner"])
    for name, caption in list(zip(table.name, table.caption))[:3]:
        pixels = processor(images=Image.open(photos / name).convert("RGB"), return_tensors="pt")
        wanted = processor.batch_decode(model.generate(**pixels, max_new_tokens=5), skip_special_tokens=True)
        assert caption == wanted[0].strip()
    assert table.caption.str.len().max() > 0


def test_models_of_timm(photos, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    small = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=5).eval()
    monkeypatch.setattr(timm, "create_model", lambda *args, **settings: copy.deepcopy(small))
    monkeypatch.setattr("turbovlm.corpus.embedder.load_outline", lambda spec: None)
    small.pretrained_cfg["input_size"] = (3, 32, 32)
    embed(photos, tmp_path / "out", job_of("timm:vit_tiny_patch16_224", "pooled", "cls", "label", r=2))
    table = pd.read_parquet(tmp_path / "out").dropna(subset="cls")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(small), is_training=False)
    turbovlm.apply(small, r=2)
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(photos / name).convert("RGB")) for name in table.name])
        wanted = small(pixels).argmax(1)
    assert list(table.label) == [str(place) for place in wanted.tolist()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_that_read_change_nothing(models, photos, tmp_path, workers):
    job = job_of(models["clip"], r=4)
    embed(photos, tmp_path / "alone", job, shard_size=8)
    embed(photos, tmp_path / "more", job, shard_size=8, engine=local(workers))
    assert contents(tmp_path / "alone") == contents(tmp_path / "more")


def test_a_stopped_run_goes_on(models, photos, tmp_path):
    job = job_of(models["clip"], r=4)
    embed(photos, tmp_path / "whole", job, shard_size=4)

    def stopping(job, shards, columns):
        for number, rows in enumerate(local(0)(job, shards, columns)):
            if number == 2:
                raise KeyboardInterrupt
            yield rows

    for already in range(0, 8, 2):
        if already < 6:
            with pytest.raises(KeyboardInterrupt):
                embed(photos, tmp_path / "out", job, shard_size=4, engine=stopping)
            assert len(contents(tmp_path / "out")) == already + 2
        else:
            summary = embed(photos, tmp_path / "out", job, shard_size=4, engine=stopping)
            assert (summary.found, summary.made, summary.counts.images) == (6, 6, 30)
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")
    again = embed(photos, tmp_path / "out", job, shard_size=4, engine=stopping)
    assert (again.found, again.made, again.counts.images, again.counts.errors) == (8, 0, 30, 2)


def test_killed_runs_go_on(models, tmp_path):
    photos, out = in_folder(tmp_path / "photos", 60), tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-m", "turbovlm", "embed", str(photos), "--model", models["clip"]]
    command += ["--r", "4", "--shard-size", "4", "--batch", "2", "--workers", "1", "--out"]
    killed = 0
    for wanted in (1, 6):
        running = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while running.poll() is None and len(contents(out)) < wanted:
            time.sleep(0.005)
        killed += running.poll() is None
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert killed
    embed(photos, tmp_path / "whole", job_of(models["clip"], batch=2, r=4), shard_size=4)
    assert main([*command[5:], str(out)]) == 0
    assert contents(tmp_path / "whole") == contents(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 5}, "settings is .* there and .* here"),
        ({"batch": 4}, "batch is 8 there and 4 here"),
        ({"outputs": ("cls",)}, r'outputs is \[\] there and \["cls"\] here'),
    ],
)
def test_a_folder_of_another_run(models, photos, tmp_path, change, message):
    embed(photos, tmp_path / "out", job_of(models["clip"], r=4), shard_size=8)
    before = contents(tmp_path / "out")
    outputs = change.pop("outputs", ())
    with pytest.raises(DataError, match=message):
        embed(photos, tmp_path / "out", job_of(models["clip"], *outputs, **{"r": 4, **change}), shard_size=8)
    with pytest.raises(DataError, match="the source differs: 4 shards there and 2 here"):
        embed(photos, tmp_path / "out", job_of(models["clip"], r=4), shard_size=15)
    assert contents(tmp_path / "out") == before


def test_a_source_that_changed(models, tmp_path):
    photos = in_folder(tmp_path / "photos", 12)
    embed(photos, tmp_path / "out", job_of(models["clip"]), shard_size=4)
    shutil.copy(photos / "0001.jpg", photos / "0002.jpg")
    with pytest.raises(DataError, match=r"files have changed, first at 0001.jpg … 0005.jpg"):
        embed(photos, tmp_path / "out", job_of(models["clip"]), shard_size=4)


def test_folders_that_are_none_of_a_run(models, photos, tmp_path):
    (tmp_path / "thesis.tex").write_text("of years")
    with pytest.raises(DataError, match=r"holds thesis.tex and is not the folder of a run"):
        embed(photos, tmp_path, job_of(models["clip"]))
    with pytest.raises(DataError, match="is a file"):
        embed(photos, tmp_path / "thesis.tex", job_of(models["clip"]))
    with pytest.raises(DataError, match="lies in the source"):
        embed(photos, photos / "embeddings", job_of(models["clip"]))
    assert not (photos / "embeddings").exists()


def test_the_command_knows_all_outputs():
    assert cli_embed.OUTPUTS == OUTPUTS


def test_two_runs_at_once(models, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    job = job_of(models["clip"])

    def meanwhile(*args):
        with pytest.raises(StateError, match="another run is writing to it"):
            embed(photos, tmp_path / "out", job)
        return local(0)(*args)

    assert embed(photos, tmp_path / "out", job, engine=meanwhile).counts.images == 30


def test_a_full_disk_leaves_whole_parts_and_the_run_goes_on(models, photos, tmp_path, monkeypatch, capsys):
    import pyarrow.parquet

    write, written = pyarrow.parquet.write_table, []

    def filling(table, path, **how):
        write(table, path, **how)
        written.append(path)
        if len(written) == 3:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "of pyarrow's, which names no file")

    command = ["embed", str(photos), "--model", models["clip"], "--shard-size", "8", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(pyarrow.parquet, "write_table", filling)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'out' / 'part-000002.parquet'}: No space left on device; parts that are done stay" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".parquet") == [
        "part-000000.parquet",
        "part-000001.parquet",
    ]
    monkeypatch.setattr(pyarrow.parquet, "write_table", write)
    assert main(command) == 0
    assert "30 images in 4 parts" in capsys.readouterr().out
    assert len(pd.read_parquet(tmp_path / "out")) == 30


def test_a_disk_that_is_too_small(models, photos, tmp_path, capsys):
    """A file system of 16 kB, for some of the four parts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    command = ["embed", str(photos), "--model", models["clip"], "--shard-size", "8", "--out", str(disk / "out")]
    try:
        assert main(command) == 2
        assert "No space left on device; parts that are done stay" in capsys.readouterr().err
        there = contents(disk / "out")
        assert 0 < len(there) < 4
        assert not list((disk / "out").glob(f"{folders.UNFINISHED}*"))
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert main(command) == 0
        assert contents(disk / "out").items() > there.items()
        embed(photos, tmp_path / "whole", job_of(models["clip"], batch=32), shard_size=8)
        assert contents(disk / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_corrupt_tar_is_counted(models, tmp_path, capsys):
    in_tar(tmp_path / "a.tar", range(6))
    whole = in_tar(tmp_path / "b.tar", range(6)).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) // 2])
    assert main(["embed", str(tmp_path / "*.tar"), "--model", models["clip"], "--out", str(tmp_path / "out")]) == 0
    said, remarks = capsys.readouterr()
    assert "1 could not be read" in said and "b.tar: cannot be read behind its first" in said
    assert "the model as it is; --r, --keep or --flops make it faster" in remarks


def test_nothing_that_can_be_read(models, tmp_path):
    photos = in_folder(tmp_path / "photos", 3, bad=(0, 1, 2))
    with pytest.raises(DataError, match="none of 3 images could be read"):
        embed(photos, tmp_path / "out", job_of(models["clip"]))


@pytest.mark.parametrize(
    ("model", "job", "message"),
    [
        ("clip", {"outputs": ("logits",)}, "'logits' is none of projected, pooled, cls"),
        ("clip", {"outputs": ("cls", "cls")}, "names one twice"),
        ("clip", {"outputs": ("label",)}, "has no label; it has projected, pooled, cls; give labels"),
        ("clip", {"outputs": ("caption",)}, "generates no text"),
        ("dino", {"outputs": ("projected",)}, "has no projected; it has pooled, cls"),
        ("dino", {"outputs": ("label",), "labels": ("a", "b")}, "has no label"),
        ("classifier", {"outputs": ("pooled",)}, "has no pooled; it has cls, label"),
        ("clip", {"labels": ("a", "b")}, "nothing chooses from them"),
        ("clip", {"outputs": ("label",), "labels": ("a",)}, "two or more"),
        ("clip", {"prompt": "what?"}, "nobody reads it"),
        ("clip", {"batch": 0}, "batch=0"),
        ("clip", {"r": -1}, "r=-1"),
        ("clip", {"keep": 2.0}, "keep"),
    ],
)
def test_bad_jobs_are_refused_before_anything_is_written(models, photos, tmp_path, model, job, message):
    outputs = job.pop("outputs", ())
    with pytest.raises(ConfigError, match=message):
        embed(photos, tmp_path / "out", job_of(models[model], *outputs, **job))
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_accelerated(photos, tmp_path):
    transformers.ResNetModel(transformers.ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8)).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(UnsupportedModelError):
        embed(photos, tmp_path / "out", job_of(str(tmp_path / "model"), r=4))
    assert not (tmp_path / "out").exists()


def test_a_part_is_whole_or_not_there(tmp_path):
    with pytest.raises(OSError, match="gone"), folders._whole(tmp_path / "part") as path:
        path.write_text("half")
        raise OSError("gone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "4", "--keep", "0.5"], "not allowed with"),
        (["--concurrency", "2"], "--concurrency: is of --engine ray"),
        (["--workers", "-1"], "--workers -1"),
        (["--visual-keep", "0.5"], "add --outputs caption"),
        (["--max-new-tokens", "5"], "add --outputs caption"),
        (["--outputs", "label", "--labels", "nothing.txt"], "--labels nothing.txt"),
        (["--shard-size", "0"], "--shard-size 0"),
        (["--settings", "nothing.json"], "nothing.json"),
        (["--engine", "ray", "--workers", "2"], "--workers"),
    ],
)
def test_bad_options(models, photos, tmp_path, capsys, options, message):
    try:
        code = main(["embed", str(photos), "--model", models["clip"], "--out", str(tmp_path / "out"), *options])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_of_a_file(models, photos, tmp_path):
    turbovlm.TurboConfig(r=4, alpha=20.0).save(tmp_path / "turbo.json")
    command = ["embed", str(photos), "--model", models["clip"], "--out"]
    assert main([*command, str(tmp_path / "file"), "--settings", str(tmp_path / "turbo.json")]) == 0
    embed(photos, tmp_path / "keywords", job_of(models["clip"], r=4, alpha=20.0, batch=32))
    assert contents(tmp_path / "file") == contents(tmp_path / "keywords")
