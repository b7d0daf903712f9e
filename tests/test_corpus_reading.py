"""Sources of images cut into shards, and read: every image once, in order, and a reason for what does not read."""

from __future__ import annotations

import gzip
import io

import pytest
from PIL import Image

from corpora import drawn, in_folder, in_parquet, in_tar
from turbovlm.corpus.reading import read_batches, read_records
from turbovlm.corpus.shards import find_shards
from turbovlm.corpus.tables import Columns
from turbovlm.errors import ConfigError, DataError
from turbovlm.loading.images import decode


def all_records(source, size=None, columns=Columns()):  # noqa: B008
    shards = find_shards(str(source), size, columns)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    return [record for shard in shards for record in read_records(shard, columns)]


def test_a_folder_and_the_folders_in_it(tmp_path):
    folder = in_folder(tmp_path / "photos", 20)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes(b"no image")
    records = all_records(folder, 7)
    names = [f"{i:04d}.jpg" for i in range(20) if i % 3] + [f"sub/{i:04d}.jpg" for i in range(0, 20, 3)]
    assert [record.name for record in records] == names
    assert all(record.content == drawn(int(record.name[-8:-4])) for record in records)
    assert [len(shard.files) for shard in find_shards(str(folder), 7)] == [7, 7, 6]
    pattern = all_records(f"{folder}/00*[0-4].jpg")
    assert [record.name for record in pattern] == [name for name in names if "/" not in name and name[3] in "01234"]
    (alone,) = all_records(folder / "0001.jpg")
    assert (alone.name, alone.content) == ("0001.jpg", drawn(1))


def test_tar_files(tmp_path):
    in_tar(tmp_path / "a.tar", range(5))
    in_tar(tmp_path / "b.tar", range(5, 9))
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(in_tar(tmp_path / "c", range(9, 12)).read_bytes()))
    (tmp_path / "c").unlink()
    records = all_records(tmp_path)
    files = ["a.tar"] * 5 + ["b.tar"] * 4 + ["c.tar.gz"] * 3
    assert [record.name for record in records] == [f"{file}/{i:04d}.jpg" for i, file in enumerate(files)]
    assert [record.content for record in records] == [drawn(i) for i in range(12)]
    assert find_shards(str(tmp_path))[0].images is None


@pytest.mark.parametrize("damage", ["cut in a member", "cut between members", "a header overwritten"])
def test_a_damaged_tar_says_how_far_it_was_read(tmp_path, damage):
    path = in_tar(tmp_path / "a.tar", range(6))
    content = bytearray(path.read_bytes())
    header = content.index(b"0003.jpg")
    if damage == "cut in a member":
        content = content[: header + 600]
    elif damage == "cut between members":
        content = content[:header]
    else:
        content[header : header + 512] = b"x" * 512
    path.write_bytes(content)
    *good, last = all_records(path)
    assert [record.content for record in good] == [drawn(i) for i in range(3)]
    assert last.content is None and last.name == "a.tar" and "behind its first 3 images" in last.error


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar")
    (record,) = all_records(tmp_path)
    assert record.name == "a.tar" and "behind its first 0 images" in record.error


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path, struct):
    in_parquet(tmp_path / "a.parquet", range(20), 8, struct)
    in_parquet(tmp_path / "b.parquet", range(20, 24), 8, struct)
    records = all_records(tmp_path, 10)
    assert [record.content for record in records] == [drawn(i) for i in range(24)]
    wanted = [f"{i:04d}.jpg" if struct else f"{'ab'[i // 20]}.parquet#{i % 20}" for i in range(24)]
    assert [record.name for record in records] == wanted
    shards = find_shards(str(tmp_path), 16)
    assert [(shard.start, shard.stop, shard.images) for shard in shards] == [(0, 2, 16), (2, 3, 4), (0, 1, 4)]
    named = all_records(tmp_path, columns=Columns("image", "title"))
    assert named[3].name == "drawing 0003.jpg"


def test_damaged_parquet(tmp_path):
    path = in_parquet(tmp_path / "a.parquet", range(24), 8)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + b"\0" * 2000 + whole[2200:])
    records = all_records(path, 10)
    bad = [record for record in records if record.content is None]
    assert len(bad) == 1 and bad[0].error.startswith("8 rows from 0 on cannot be read")
    assert [record.content for record in records[1:]] == [drawn(i) for i in range(8, 24)]
    path.write_bytes(whole[:-100])
    (record,) = all_records(path)
    assert record.content is None and "cannot be read" in record.error


def test_columns_that_are_not_there(tmp_path):
    path = str(in_parquet(tmp_path / "a.parquet", range(3)))
    with pytest.raises(DataError, match="no column 'picture'; it has image, title, views"):
        find_shards(path, columns=Columns("picture"))
    with pytest.raises(DataError, match="no column 'file'"):
        find_shards(path, columns=Columns(name="file"))


def test_a_dataset_by_its_id(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    in_parquet(tmp_path / "a.parquet", range(10))
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path), split="train"
    )
    table = table.cast_column("image", datasets.Image())
    monkeypatch.setattr(
        datasets, "load_dataset", lambda source, split: {("owner/drawings", "train"): table}[source, split]
    )
    records = all_records("owner/drawings", 4)
    assert [record.content for record in records] == [drawn(i) for i in range(10)]
    assert [record.name for record in records][::9] == ["owner/drawings#0", "owner/drawings#9"]
    assert len(find_shards("owner/drawings", 4)) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/nothing", "there is no such folder"),
        ("{}/empty", "holds no images"),
        ("{}/notes.txt", "is no image, tar or Parquet file"),
        ("{}/*.webp", "there is no such folder or file"),
        ("{}/mixed", "holds files and tar"),
        ("nothing://there", "nothing"),
    ],
)
def test_nothing_to_read(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    in_folder(tmp_path / "mixed", 2)
    in_tar(tmp_path / "mixed" / "a.tar", range(2))
    with pytest.raises(ValueError, match=message):
        find_shards(source.format(tmp_path))


def test_sizes_of_shards():
    with pytest.raises(ConfigError, match="shard_size=0"):
        find_shards(".", 0)


def test_batches_of_images_of_several_sizes(tmp_path):
    folder = in_folder(tmp_path / "photos", 10, bad=(4,))
    (shard,) = find_shards(str(folder))
    batches = list(read_batches(shard, 4, lambda image: {"pixel_values": torch_like(image)}))
    assert [batch.last for batch in batches] == [False, False, True]
    assert [batch.number for batch in batches] == [0, 1, 2]
    names = [name for batch in batches for name in batch.names]
    assert names == list(shard.files)
    for batch in batches:
        seen = []
        for places, inputs in batch.groups:
            for place, pixels in zip(places, inputs["pixel_values"]):
                height, width = pixels.shape[1:]
                assert batch.sizes[place] == (width, height)
                seen.append(place)
        missing = [place for place, error in enumerate(batch.errors) if error]
        assert sorted(seen + missing) == list(range(len(batch.names)))
        assert [batch.names[place] for place in missing] in ([], ["0004.jpg"])


def torch_like(image):
    import numpy as np

    return np.asarray(image).transpose(2, 0, 1)[None]


def encoded(image, kind, **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return io.BytesIO(out.getvalue())


def test_images_of_all_kinds():
    red = Image.new("RGB", (6, 4), "red")
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    assert decode(encoded(red, "JPEG", exif=turned)).size == (4, 6)
    assert decode(encoded(red.convert("L"), "PNG")).mode == "RGB"
    assert decode(encoded(red.convert("RGBA"), "WEBP")).mode == "RGB"
    frames = encoded(red, "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4), "blue")])
    assert decode(frames).getpixel((0, 0))[0] > 200


@pytest.mark.parametrize("content", [b"", b"no image", drawn(0)[:200]])
def test_what_does_not_decode(content, monkeypatch):
    with pytest.raises(DataError, match="does not decode"):
        decode(io.BytesIO(content))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="exceeds limit"):
        decode(io.BytesIO(drawn(1)))
