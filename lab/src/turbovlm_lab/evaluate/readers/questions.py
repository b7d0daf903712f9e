"""Questions about an image, and statements about two."""

from __future__ import annotations

from collections.abc import Sequence

from turbovlm.errors import DataError
from turbovlm_lab.evaluate.data import Data, Sample
from turbovlm_lab.evaluate.readers.files import Annotations, Record, unique
from turbovlm_lab.evaluate.readers.given import Format, Given, collected, each, image_of, one_file


def read_vqa(given: Given) -> Data:
    """VQAv2's and OK-VQA's two files: `questions`, and `annotations` with ten answers each."""
    given.without_split()
    asked, answered = sorted(given.files, key=lambda each: each.has("annotations"))
    answers: dict[object, Record] = {}
    for annotation in _whole(answered).records("annotations"):
        unique(answers, annotation["question_id"], annotation, annotation.where, "the question id")
    questions: dict[object, Record] = {}
    for question in _whole(asked).records("questions"):
        unique(questions, question["question_id"], question, question.where, "the question id")
    subset = _whole(asked).content.get("data_subtype", "val2014")

    def sample(_: int, question: Record) -> Sample | str:
        key = question["question_id"]
        if key not in answers:
            return f"{question.where}: question {key!r} has no answers in {answered.path}"
        said = answers[key].texts("answers", "answer", blank=True)
        return _sample(given, question, str(key), coco_names(question, subset), question.text("question"), said)

    unasked = [
        f"{annotation.where}: answers question {key!r}, which is not in {asked.path}"
        for key, annotation in answers.items()
        if key not in questions
    ]
    return collected(given, [*each(questions.values(), sample), *unasked])


def coco_names(record: Record, subset: str) -> tuple[str, ...]:
    """What COCO calls the image of an `image_id`, by the years of its releases."""
    number = record["image_id"]
    if not isinstance(number, int) or isinstance(number, bool):
        raise DataError(f"{record.where}: 'image_id' is {number!r}; it must be a whole number")
    old = f"COCO_{subset}_{number:012d}.jpg"
    return f"{subset}/{old}", f"{number:012d}.jpg", f"{number}.jpg"


def read_gqa(given: Given) -> Data:
    """GQA's: an object from question ids to `imageId`, `question` and `answer`."""
    given.without_split()
    path, content = given.files[0].path, _whole(given.files[0]).content
    entries = [Record(f"{path}, {key}", held if isinstance(held, dict) else {}) for key, held in content.items()]
    keys = list(content)

    def sample(number: int, entry: Record) -> Sample | str:
        names = (f"{entry.text('imageId')}.jpg",)
        return _sample(given, entry, keys[number], names, entry.text("question"), entry.texts("answer"))

    return collected(given, each(entries, sample))


def read_listed(given: Given) -> Data:
    """VizWiz's and BLIP's: a list of entries with `image`, `question`, and `answers` or `answer`."""
    given.without_split()

    def sample(number: int, entry: Record) -> Sample | str:
        image = entry.text("image")
        key = str(entry["question_id"]) if "question_id" in entry else f"{image}#{number}"
        said = entry.texts("answers" if "answers" in entry else "answer", "answer", blank=True)
        return _sample(given, entry, key, (image,), entry.text("question"), said)

    return collected(given, each(given.files[0].listed, sample))


def read_nlvr2(given: Given) -> Data:
    """NLVR2's own JSON lines: `identifier`, `sentence` and `label`.

    Images are in a folder, in one named after the split (dev, test1), or as those of training are, in its numbered
    directories.
    """
    given.without_split()

    def sample(_: int, entry: Record) -> Sample | str:
        key = entry.text("identifier")
        pair, split = key.rpartition("-")[0], key.partition("-")[0]
        folder = f"{entry['directory']}/" if "directory" in entry else ""
        names = [f"{folder}{pair}-img{side}.png" for side in (0, 1)]
        return _pair(given, entry, key, [(name, f"{split}/{name}") for name in names])

    return collected(given, each(given.files[0].listed, sample))


def read_blip_nlvr2(given: Given) -> Data:
    """BLIP's: a list of entries with two `images`, `sentence` and `label`."""
    given.without_split()

    def sample(number: int, entry: Record) -> Sample | str:
        images = entry.texts("images")
        if len(images) != 2:
            raise DataError(f"{entry.where}: has {len(images)} images; a statement is about two")
        return _pair(given, entry, f"{number}", [(image,) for image in images])

    return collected(given, each(given.files[0].listed, sample))


def truth(record: Record, name: str = "label") -> str:
    """`"True"` or `"False"`, however it is written."""
    written = str(record[name]).strip().lower()
    known = {"true": "True", "1": "True", "false": "False", "0": "False"}
    if written not in known:
        raise DataError(f"{record.where}: {name!r} is {record[name]!r}; it must be True or False")
    return known[written]


def _sample(
    given: Given, record: Record, key: str, names: Sequence[str], question: str, answers: tuple[str, ...]
) -> Sample | str:
    image = image_of(given, record.where, *names)
    return image if isinstance(image, str) else Sample(key, (image,), question, answers)


def _pair(given: Given, entry: Record, key: str, names: Sequence[Sequence[str]]) -> Sample | str:
    left, right = (image_of(given, entry.where, *some) for some in names)
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else str(right)
    return Sample(key, (left, right), entry.text("sentence"), (truth(entry),))


def _whole(file: Annotations) -> Record:
    assert file.whole is not None
    return file.whole


def _is_vqa(files: Sequence[Annotations]) -> bool:
    fields = ("questions", "annotations")
    return len(files) == 2 and all(any(file.whole and file.has(field) for file in files) for field in fields)


def _is_gqa(files: Sequence[Annotations]) -> bool:
    if len(files) != 1 or files[0].whole is None:
        return False
    first = next(iter(files[0].whole.content.values()), None)
    return isinstance(first, dict) and "imageId" in first


QUESTIONS = (
    Format("VQAv2, OK-VQA", "two JSON files, with 'questions' and with 'annotations'", _is_vqa, read_vqa),
    Format("GQA", "JSON from question ids to objects with 'imageId'", _is_gqa, read_gqa),
    Format("VizWiz, BLIP's VQA", "JSON list with 'image' and 'question'", one_file("image", "question"), read_listed),
)
STATEMENTS = (
    Format("NLVR2", "JSON lines with 'identifier' and 'sentence'", one_file("identifier", "sentence"), read_nlvr2),
    Format("BLIP's NLVR2", "JSON list with 'images' and 'sentence'", one_file("images", "sentence"), read_blip_nlvr2),
)
