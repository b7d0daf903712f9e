"""Readers of the field's file formats, on tiny files laid out as the published ones are."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from turbovlm.errors import ConfigError, DataError
from turbovlm_lab.evaluate.check import check
from turbovlm_lab.evaluate.data import Data, LazyImage, Sample
from turbovlm_lab.evaluate.readers import formats_of, read


def image(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (colour, 0, 0)).save(path)


def written(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def shown(data):
    """Ids, names of the images, texts and answers."""
    return [(s.id, [p.name.rsplit("/", 1)[-1] for p in s.images], s.text, s.answers) for s in data.samples]


COCO = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}, {"id": 11, "file_name": "c.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "A dog."},
        {"id": 2, "image_id": 7, "caption": "A cat. "},
        {"id": 3, "image_id": 7, "caption": "One cat"},
        {"id": 4, "image_id": 99, "caption": "Nobody's"},
    ],
}


@pytest.fixture
def images(tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        image(tmp_path / "images" / f"{name}.jpg", number)
    return tmp_path / "images"


@pytest.mark.parametrize("task", ["captioning", "retrieval"])
def test_coco_captions(task, tmp_path, images):
    data = read(task, written(tmp_path / "captions_val2017.json", COCO), images)
    assert shown(data) == [("7", ["a.jpg"], "", ("A cat.", "One cat")), ("9", ["b.jpg"], "", ("A dog.",))]
    assert data.name == "captions_val2017.json" and len(data.left_out) == 2
    assert "annotations[3]: is of image 99" in data.left_out[0]
    assert "images[2]: c.jpg has no caption" in data.left_out[1]
    assert data.samples[0].images[0].open().size == (8, 6)


KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "val2014", "filename": "a.jpg", "split": "test", "sentences": [{"raw": "A cat"}, {"raw": "Cat"}]},
        {"filepath": "val2014", "filename": "b.jpg", "split": "val", "sentences": [{"raw": "A dog"}]},
    ],
}


def test_karpathy_splits(tmp_path, images):
    file = written(tmp_path / "dataset_coco.json", KARPATHY)
    assert shown(read("retrieval", file, images)) == [("a.jpg", ["a.jpg"], "", ("A cat", "Cat"))]
    assert shown(read("captioning", file, images, "val")) == [("b.jpg", ["b.jpg"], "", ("A dog",))]
    with pytest.raises(DataError, match=r"split='train': dataset_coco.json has test, val"):
        read("captioning", file, images, "train")
    image(tmp_path / "all" / "val2014" / "a.jpg")
    assert "val2014" in read("captioning", file, tmp_path / "all").samples[0].images[0].name


@pytest.mark.parametrize("lines", [False, True])
def test_blip_captions(lines, tmp_path, images):
    entries = [{"image": "val2014/a.jpg", "caption": ["A cat", "Cat"]}, {"image": "val2014/b.jpg", "caption": "A dog"}]
    text = "\n".join(json.dumps(entry) for entry in entries) if lines else json.dumps(entries)
    data = read("captioning", written(tmp_path / "coco_karpathy_test.json", text), images)
    assert [s.answers for s in data.samples] == [("A cat", "Cat"), ("A dog",)]


def test_flickr_results_with_its_broken_row(tmp_path, images):
    text = 'image_name| comment_number| comment\na.jpg| 0| A "big" cat .\na.jpg| 1| Cat, sitting\nb.jpg| 4   A dog\n'
    data = read("retrieval", written(tmp_path / "results.csv", text), images)
    assert shown(data) == [("a.jpg", ["a.jpg"], "", ('A "big" cat .', "Cat, sitting"))]
    assert data.left_out == (f"{tmp_path / 'results.csv'}, line 4: has 2 fields, and the header has 3",)


def test_flickr_token(tmp_path, images):
    text = "a.jpg#0\tA cat .\na.jpg#1\tCat\nb.jpg#0\tA dog\nz.jpg#0\tNobody\n"
    data = read("captioning", written(tmp_path / "results_20130124.token", text), images)
    assert [s.answers for s in data.samples] == [("A cat .", "Cat"), ("A dog",)]
    assert "line 4: its image z.jpg is not in" in data.left_out[0]


def test_flickr_table(tmp_path, images):
    rows = [
        "raw,sentids,split,filename,img_id",
        '"[""A cat"", ""It\'s a cat""]","[0, 1]",test,a.jpg,0',
        "\"['A dog']\",[2],train,b.jpg,1",
    ]
    file = written(tmp_path / "flickr_annotations_30k.csv", "\n".join(rows))
    assert shown(read("retrieval", file, images)) == [("a.jpg", ["a.jpg"], "", ("A cat", "It's a cat"))]
    assert read("retrieval", file, images, "train").samples[0].answers == ("A dog",)


def vqa_files(tmp_path, answers=(5, 6)):
    questions = [
        {"image_id": 42, "question_id": 5, "question": "What?"},
        {"image_id": 42, "question_id": 6, "question": "How?"},
    ]
    annotations = [
        {"question_id": q, "image_id": 42, "answers": [{"answer": "cat", "answer_id": i} for i in range(10)]}
        for q in answers
    ]
    asked = written(tmp_path / "questions.json", {"data_subtype": "val2014", "questions": questions})
    return asked, written(tmp_path / "annotations.json", {"annotations": annotations})


@pytest.mark.parametrize(
    "name", ["COCO_val2014_000000000042.jpg", "val2014/COCO_val2014_000000000042.jpg", "000000000042.jpg"]
)
def test_vqa(name, tmp_path):
    image(tmp_path / "images" / name)
    files = vqa_files(tmp_path)
    for order in (files, files[::-1]):
        data = read("vqa", order, tmp_path / "images")
        assert [(s.id, s.text, s.answers) for s in data.samples] == [
            ("5", "What?", ("cat",) * 10),
            ("6", "How?", ("cat",) * 10),
        ]


def test_vqa_questions_and_answers_that_do_not_meet(tmp_path):
    image(tmp_path / "images" / "000000000042.jpg")
    data = read("vqa", vqa_files(tmp_path, answers=(5, 8)), tmp_path / "images")
    assert [s.id for s in data.samples] == ["5"]
    assert "question 6 has no answers" in data.left_out[0] and "answers question 8" in data.left_out[1]


def test_gqa(tmp_path):
    image(tmp_path / "images" / "n161313.jpg")
    file = written(
        tmp_path / "testdev.json", {"201307251": {"imageId": "n161313", "question": "Is it?", "answer": "no"}}
    )
    assert shown(read("vqa", file, tmp_path / "images")) == [("201307251", ["n161313.jpg"], "Is it?", ("no",))]


def test_vizwiz_and_blip_questions(tmp_path, images):
    vizwiz = [
        {
            "image": "a.jpg",
            "question": "What?",
            "answers": [{"answer": "a can", "answer_confidence": "yes"}] * 10,
            "answerable": 1,
        }
    ]
    data = read("vqa", written(tmp_path / "val.json", vizwiz), images)
    assert shown(data) == [("a.jpg#0", ["a.jpg"], "What?", ("a can",) * 10)]
    blip = [{"question_id": 3, "image": "val2014/b.jpg", "question": "Who?", "answer": ["me", "you"], "dataset": "vqa"}]
    assert shown(read("vqa", written(tmp_path / "vqa_val.json", blip), images)) == [
        ("3", ["b.jpg"], "Who?", ("me", "you"))
    ]


def test_nlvr2(tmp_path):
    for side in (0, 1):
        image(tmp_path / "images" / f"dev-850-0-img{side}.png")
    lines = [
        {"identifier": "dev-850-0-0", "sentence": "Two dogs.", "label": "True", "left_url": "x"},
        {"identifier": "dev-850-0-1", "sentence": "No dogs.", "label": "False"},
        {"identifier": "dev-851-0-0", "sentence": "Gone.", "label": "False"},
    ]
    data = read("nlvr2", written(tmp_path / "dev.json", "\n".join(map(json.dumps, lines))), tmp_path / "images")
    pair = ["dev-850-0-img0.png", "dev-850-0-img1.png"]
    assert shown(data) == [("dev-850-0-0", pair, "Two dogs.", ("True",)), ("dev-850-0-1", pair, "No dogs.", ("False",))]
    assert "dev.json, line 3: its image dev-851-0-img0.png is not in" in data.left_out[0]
    blip = [{"sentence": "Two dogs.", "label": "False", "images": [f"dev/{name}" for name in pair]}]
    data = read("nlvr2", written(tmp_path / "nlvr_dev.json", blip), tmp_path / "images")
    assert shown(data) == [("0", pair, "Two dogs.", ("False",))]


def test_class_folders(tmp_path):
    for number, name in enumerate(("n02/x.JPEG", "n01/y.jpeg", "n01/deep/z.png")):
        image(tmp_path / "imagenet" / "val" / name, number)
    data = read("classification", tmp_path / "imagenet", split="val")
    assert data.classes == ("n01", "n02") and data.name == "imagenet, val"
    assert [(s.id, s.answers) for s in data.samples] == [
        ("n01/deep/z.png", ("n01",)),
        ("n01/y.jpeg", ("n01",)),
        ("n02/x.JPEG", ("n02",)),
    ]
    assert read("classification", str(tmp_path / "imagenet" / "val")).classes == ("n01", "n02")
    with pytest.raises(DataError, match=r"split='test': .* has no such folder; its folders are val"):
        read("classification", tmp_path / "imagenet", split="test")


def test_labels_in_a_file(tmp_path, images):
    file = written(tmp_path / "val.txt", "a.jpg 2\nb.jpg 0\nz.jpg 1\n")
    data = read("classification", file, images)
    assert data.classes == ("0", "1", "2") and [s.answers for s in data.samples] == [("2",), ("0",)]
    assert data.left_out == (f"{file}, line 3: its image z.jpg is not in {images}",)
    with pytest.raises(DataError, match=r"val.txt, line 2: must be an image's name and the number of its class"):
        read("classification", written(tmp_path / "val.txt", "a.jpg 2\nb.jpg\n"), images)


def test_masks(tmp_path):
    for name in ("DUTS-TE-Image/a.jpg", "DUTS-TE-Image/b.jpg", "DUTS-TE-Mask/a.png", "DUTS-TE-Mask/c.png"):
        image(tmp_path / name)
    data = read("saliency", tmp_path)
    assert shown(data) == [("a.jpg", ["a.jpg"], "", ())] and data.samples[0].mask.open("L").mode == "L"
    assert [reason.split(":")[1].split(" in ")[0] for reason in data.left_out] == [" has no mask", " has no image"]


def test_prompts(tmp_path, images):
    data = read("text-to-image", written(tmp_path / "prompts.txt", "a cat\n\na dog\n"), images)
    assert shown(data) == [("line 1", [], "a cat", ()), ("line 3", [], "a dog", ())] and len(data.real) == 3


def test_limit_is_evenly_spaced(tmp_path):
    for number in range(10):
        image(tmp_path / "d" / f"c{number // 5}" / f"{number}.png")
    data = read("classification", tmp_path / "d", limit=4)
    assert [s.id for s in data.samples] == ["c0/0.png", "c0/2.png", "c1/5.png", "c1/7.png"]
    assert len(read("classification", tmp_path / "d", limit=99).samples) == 10
    with pytest.raises(ConfigError, match="limit=0"):
        read("classification", tmp_path / "d", limit=0)


WRONG = {
    "nothing there": (None, "there is no such file"),
    "empty": ("", "is empty"),
    "no JSON": ('{"images": [\n{"id": 1,}\n]}', r"data.json, line 2: is not JSON"),
    "no JSON in a line": ('{"image": "a.jpg", "caption": "x"}\n{"image"\n', r"data.json, line 2: is not JSON"),
    "a line that is no object": ('{"image": "a.jpg", "caption": "x"}\n[1]\n', r"data.json, line 2: must be an object"),
    "another format": ({"photos": []}, "of no format known for captioning, which are COCO captions"),
    "a list of numbers": ([1, 2], r"data.json\[0\]: must be an object; it is 1"),
    "a field is missing": (
        {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]},
        r"images\[0\]: has no 'file_name'; it has 'id'",
    ),
    "no images": ({"images": [], "annotations": []}, "images: must be a list of objects, and not empty"),
    "twice": ({**COCO, "images": [COCO["images"][0]] * 2}, r"images\[1\]: the image id 7 is there twice"),
    "a caption that is none": ([{"image": "a.jpg", "caption": 3}], r"caption\[0\]: 'caption' is 3; it must be a text"),
    "no caption": ([{"image": "a.jpg", "caption": []}], r"'caption' is empty"),
    "no image at all": (
        [{"image": "z.jpg", "caption": "x"}],
        "nothing to evaluate on; .* left out: .*z.jpg is not in",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case, tmp_path, images):
    content, message = WRONG[case]
    if content is not None:
        written(tmp_path / "data.json", content)
    with pytest.raises(DataError, match=message):
        read("captioning", tmp_path / "data.json", images)


def test_wrong_folders(tmp_path, images):
    file = written(tmp_path / "captions.json", COCO)
    with pytest.raises(DataError, match="say which folder they are in"):
        read("captioning", file)
    with pytest.raises(DataError, match="there is no such folder"):
        read("captioning", file, tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no splits within it"):
        read("captioning", file, images, "val")
    with pytest.raises(DataError, match="has no folders; there must be one for each class"):
        read("classification", images)
    with pytest.raises(DataError, match=r"val: has no images .*; give one of its splits \(val\)"):
        (tmp_path / "imagenet" / "val").mkdir(parents=True)
        read("classification", tmp_path / "imagenet")
    with pytest.raises(DataError, match="has no folder of images; it is called one of images"):
        read("saliency", tmp_path / "imagenet")
    with pytest.raises(DataError, match="the images are in"):
        read("classification", tmp_path, images)
    with pytest.raises(ConfigError, match="task='segmentation': must be one of classification"):
        read("segmentation", tmp_path)
    assert "datasets:ID" in formats_of("vqa")


def test_entries_that_are_wrong_are_listed_and_the_others_read(tmp_path, images):
    """One empty caption among 25,000 must not keep all others from being used."""
    coco = {**COCO, "annotations": [*COCO["annotations"][:3], {"id": 5, "image_id": 11, "caption": " "}, {"id": 6}]}
    data = read("captioning", written(tmp_path / "captions.json", coco), images)
    assert len(data.samples) == 2 and [reason.partition(": ")[0].rpartition(", ")[2] for reason in data.left_out] == [
        "annotations[3]",
        "annotations[4]",
        "images[2]",
    ]
    blip = [
        {"image": "a.jpg", "question": "What?", "answer": "cat"},
        {"image": "b.jpg", "question": None, "answer": "x"},
    ]
    data = read("vqa", written(tmp_path / "vqa.json", blip), images)
    assert len(data.samples) == 1 and "[1]: 'question' is None; it must be a text" in data.left_out[0]
    nlvr = [{"images": ["a.jpg", "b.jpg"], "sentence": "Two.", "label": label} for label in ("True", "maybe")]
    data = read("nlvr2", written(tmp_path / "nlvr.json", nlvr), images)
    assert len(data.samples) == 1 and "[1]: 'label' is 'maybe'" in data.left_out[0]


def test_blips_captions_one_per_entry(tmp_path, images):
    """Its files of training and of Flickr30k: the entries of one image are one sample."""
    entries = [
        {"image": f"{name}.jpg", "caption": words} for name, words in (("a", "A cat"), ("b", "A dog"), ("a", "Cat"))
    ]
    data = read("retrieval", written(tmp_path / "flickr30k_train.json", entries), images)
    assert [(s.id, s.answers) for s in data.samples] == [("a.jpg", ("A cat", "Cat")), ("b.jpg", ("A dog",))]


def test_people_who_said_nothing(tmp_path, images):
    """Their answers count among the ten."""
    vizwiz = [{"image": "a.jpg", "question": "What?", "answers": [{"answer": "can"}, {"answer": ""}]}]
    assert read("vqa", written(tmp_path / "val.json", vizwiz), images).samples[0].answers == ("can", "")


@pytest.mark.parametrize("folder", ["dev", "3", "dev/3"])
def test_nlvr2_in_its_folders(folder, tmp_path):
    for side in (0, 1):
        image(tmp_path / "images" / folder / f"dev-850-0-img{side}.png")
    line = {"identifier": "dev-850-0-0", "sentence": "Two dogs.", "label": "True"}
    line |= {"directory": 3} if "3" in folder else {}
    assert len(read("nlvr2", written(tmp_path / "dev.json", line), tmp_path / "images").samples) == 1


def test_ends_of_lines_within_captions(tmp_path, images):
    """Python takes more characters for ends of lines than files of lines do."""
    entries = [{"image": "a.jpg", "caption": "A\u2028cat"}, {"image": "b.jpg", "caption": "A\x85dog"}]
    lines = "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    assert len(read("captioning", written(tmp_path / "a.jsonl", lines), images).samples) == 2
    token = "a.jpg#0\tA\u2028cat\na.jpg#1\tCat\x0bagain\nz.jpg#0\tNobody\n"
    data = read("captioning", written(tmp_path / "a.token", token), images)
    assert data.samples[0].answers == ("A\u2028cat", "Cat\x0bagain") and "line 3: its image z.jpg" in data.left_out[0]
    prompts = read("text-to-image", written(tmp_path / "prompts.txt", "a\x85cat\r\na dog"), images)
    assert [s.text for s in prompts.samples] == ["a\x85cat", "a dog"]


def test_labels_of_an_image_that_is_there_twice(tmp_path, images):
    with pytest.raises(DataError, match=r"val.txt, line 3: the image 'a.jpg' is there twice"):
        read("classification", written(tmp_path / "val.txt", "a.jpg 2\nb.jpg 0\na.jpg 2\n"), images)


def test_masks_of_nothing_are_found_before_the_model_is_asked(tmp_path):
    for name, grey in (("a", 0), ("b", 255), ("c", 127)):
        image(tmp_path / "images" / f"{name}.jpg")
        mask = Image.new("L", (8, 6), grey)
        mask.putpixel((1, 1), 200 if name == "c" else grey)
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{name}.png")
    good, bad = check(read("saliency", tmp_path))
    assert [s.id for s in good.samples] == ["c.jpg"]
    assert [reason.rpartition(": ")[2] for reason in bad] == ["the mask is empty", "the mask is everywhere"]


def test_images_of_several_questions_are_decoded_once(tmp_path):
    """VQAv2 asks five questions about each, GQA thirty."""
    opened = []
    shared = LazyImage("p", lambda: opened.append(1) or Image.new("RGB", (4, 4)))
    good, bad = check(Data("d", tuple(Sample(f"{i}", (shared,)) for i in range(30))))
    assert len(good.samples) == 30 and not bad and len(opened) == 1


def test_whatever_a_decoder_raises_is_an_image_that_does_not_decode(tmp_path, images, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    _, bad = check(read("captioning", written(tmp_path / "captions.json", COCO), images))
    assert "a.jpg: does not decode (Image size (48 pixels) exceeds limit of 20 pixels" in bad[2]


def test_labels_of_statements_are_truth_values(tmp_path, images):
    entry = {"sentence": "x", "label": "maybe", "images": ["a.jpg", "b.jpg"]}
    with pytest.raises(DataError, match=r"\[0\]: 'label' is 'maybe'; it must be True or False"):
        read("nlvr2", written(tmp_path / "n.json", [entry]), images)
    with pytest.raises(DataError, match="has 1 images; a statement is about two"):
        read("nlvr2", written(tmp_path / "n.json", [{**entry, "images": ["a.jpg"]}]), images)
