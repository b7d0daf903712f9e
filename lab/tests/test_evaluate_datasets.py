"""Data sets of the library `datasets`, with the columns that published ones have."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from turbovlm.errors import DataError
from turbovlm_lab.evaluate.check import check
from turbovlm_lab.evaluate.readers import read

datasets = pytest.importorskip("datasets")


def dataset(folder, **columns):
    features = {
        name: datasets.Image() if isinstance(values[0], Image.Image) else None for name, values in columns.items()
    }
    made = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        made = made.cast_column(name, feature) if feature else made
    folder.mkdir()
    made.to_parquet(folder / "test.parquet")
    return f"datasets:{folder}"


@pytest.fixture
def two():
    return [Image.new("RGB", (8, 6), (i, 0, 0)) for i in (0, 200)]


def test_dataset_of_captions(tmp_path, two):
    data = read("retrieval", dataset(tmp_path / "d", image=two, caption=[["A cat", "Cat"], ["A dog"]]))
    assert [(s.id, s.answers) for s in data.samples] == [("0", ("A cat", "Cat")), ("1", ("A dog",))]
    assert data.samples[1].images[0].open().getpixel((0, 0)) == (200, 0, 0)


def test_dataset_of_questions_and_statements(tmp_path, two):
    asked = dataset(
        tmp_path / "q", image=two, question=["Is it?", "What?"], answers=[[{"answer": "yes"}] * 3, [{"answer": "no"}]]
    )
    assert [s.answers for s in read("vqa", asked).samples] == [("yes", "yes", "yes"), ("no",)]
    said = dataset(
        tmp_path / "s", left_image=two, right_image=two[::-1], sentence=["One.", "Two."], label=["True", "False"]
    )
    data = read("nlvr2", said)
    assert [s.answers for s in data.samples] == [("True",), ("False",)]
    assert [p.open().getpixel((0, 0))[0] for p in data.samples[0].images] == [0, 200]


def test_dataset_of_classes_masks_and_prompts(tmp_path, two):
    for name in ("cat/a.png", "dog/b.png"):
        path = tmp_path / "folder" / "test" / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(path)
    data = read("classification", f"datasets:{tmp_path / 'folder'}")
    assert data.classes == ("cat", "dog") and [s.answers for s in data.samples] == [("cat",), ("dog",)]
    masks = read("saliency", dataset(tmp_path / "m", image=two, mask=two))
    assert masks.samples[1].mask.open("L").size == (8, 6)
    prompts = read("text-to-image", dataset(tmp_path / "p", image=two, prompt=["a cat", "a dog"]))
    assert [s.text for s in prompts.samples] == ["a cat", "a dog"] and len(prompts.real) == 2


def test_dataset_errors(tmp_path, two):
    spec = dataset(tmp_path / "d", image=two, words=["A cat", "A dog"])
    with pytest.raises(DataError, match=r"has no column of this task's \(caption, .*\); it has image, words"):
        read("captioning", spec)
    with pytest.raises(DataError, match=r"split='val': .* has test"):
        read("captioning", spec, split="val")
    with pytest.raises(DataError, match="could not be read from this folder"):
        (tmp_path / "empty").mkdir()
        read("captioning", f"datasets:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match="give nothing beside it"):
        read("captioning", spec, tmp_path)


def test_captions_as_evaluations_on_the_hub_have_them(tmp_path, two):
    """COCO's and NoCaps' at lmms-lab."""
    for number, column in enumerate(("answer", "annotations_captions", "sentences")):
        data = read("captioning", dataset(tmp_path / f"{number}", image=two, **{column: [["A cat", "Cat"], ["A dog"]]}))
        assert [s.answers for s in data.samples] == [("A cat", "Cat"), ("A dog",)]


def test_splits_in_a_column(tmp_path):
    """Flickr30k's: all images are of the split "test"; which are of Karpathy's test split a column says."""
    images = [Image.new("RGB", (8, 6), (i, 0, 0)) for i in (0, 100, 200)]
    words, parts = [["A"], ["B"], ["C"]], ["train", "test", "val"]
    spec = dataset(tmp_path / "d", image=images, caption=words, split=parts)
    data = read("retrieval", spec)
    assert [s.answers for s in data.samples] == [("B",)] and data.name.endswith("d, test")
    assert data.samples[0].images[0].open().getpixel((0, 0)) == (100, 0, 0)
    assert [s.answers for s in read("retrieval", spec, split="val").samples] == [("C",)]
    with pytest.raises(DataError, match=r"split='dev': .* has test, train, val"):
        read("retrieval", spec, split="dev")


def test_answers_in_columns(tmp_path, two):
    """A sequence of records, as `datasets` stores it."""
    said = {"answer": ["yes", "", "no"], "answer_id": [1, 2, 3]}
    data = read("vqa", dataset(tmp_path / "q", image=two, question=["Is it?", "What?"], answers=[said, said]))
    assert data.samples[1].answers == ("yes", "", "no")


def test_rows_that_are_wrong_are_listed(tmp_path, two):
    spec = dataset(tmp_path / "q", image=two, question=["Is it?", None], answers=[["yes"], ["no"]])
    data = read("vqa", spec)
    assert [s.id for s in data.samples] == ["0"]
    assert data.left_out == ("row 1: 'question' is None; it must be a text",)


def test_labels_that_are_none(tmp_path, two):
    """The test split of ImageNet has -1 for all."""
    made = datasets.Dataset.from_dict({"image": two, "label": [-1, -1]})
    made = made.cast(datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])))
    (tmp_path / "d").mkdir()
    made.to_parquet(tmp_path / "d" / "test.parquet")
    with pytest.raises(DataError, match=r"row 0: 'label' is -1, no class; does this split have labels"):
        read("classification", f"datasets:{tmp_path / 'd'}")


def test_images_that_are_none_or_bytes(tmp_path, two):
    buffer = io.BytesIO()
    two[1].save(buffer, "PNG")
    given = [{"bytes": buffer.getvalue(), "path": "a.png"}, None]
    spec = dataset(tmp_path / "d", image=given, caption=["A cat", "A dog"])
    good, bad = check(read("captioning", spec))
    assert [s.images[0].open().getpixel((0, 0))[0] for s in good.samples] == [200]
    assert bad == ["1: row 1, image: does not decode (it is empty)"]
    _, bad = check(read("captioning", dataset(tmp_path / "n", image=["a.png", "b.png"], caption=["A cat", "A dog"])))
    assert bad[0] == "0: row 0, image: does not decode (it is 'a.png', no image)"
