"""Questions about a picture, and statements about two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from turbovlm.errors import DataError
from turbovlm.evaluate.data import Data, Sample
from turbovlm.evaluate.readers.files import Annotations, Record, unique
from turbovlm.evaluate.readers.given import Format, Given, collected, one_file, picture_of


def read_vqa(given: Given) -> Data:
    """VQAv2's and OK-VQA's two files: `questions`, and `annotations` with ten answers each."""
    given.without_split()
    asked, answered = sorted(given.files, key=lambda each: each.has("annotations"))
    answers: dict[object, Record] = {}
    for annotation in _whole(answered).records("annotations"):
        unique(answers, annotation["question_id"], annotation, annotation.where, "the question id")
    subset = _whole(asked).content.get("data_subtype", "val2014")

    def samples() -> Iterator[Sample | str]:
        questions: dict[object, Record] = {}
        for question in _whole(asked).records("questions"):
            key = question["question_id"]
            unique(questions, key, question, question.where, "the question id")
            if key not in answers:
                yield f"{question.where}: question {key!r} has no answers in {answered.path}"
                continue
            said = answers[key].texts("answers", "answer")
            names = coco_names(question, subset)
            yield _sample(given, question, str(key), names, question.text("question"), said)
        for key, annotation in answers.items():
            if key not in questions:
                yield f"{annotation.where}: answers question {key!r}, which is not in {asked.path}"

    return collected(given, samples())


def coco_names(record: Record, subset: str) -> tuple[str, ...]:
    """What COCO calls the picture of an `image_id`, by the years of its releases."""
    number = record["image_id"]
    if not isinstance(number, int) or isinstance(number, bool):
        raise DataError(f"{record.where}: 'image_id' is {number!r}; it must be a whole number")
    old = f"COCO_{subset}_{number:012d}.jpg"
    return f"{subset}/{old}", f"{number:012d}.jpg", f"{number}.jpg"


def read_gqa(given: Given) -> Data:
    """GQA's: an object from question ids to `imageId`, `question` and `answer`."""
    given.without_split()
    file = given.files[0]

    def samples() -> Iterator[Sample | str]:
        for key, content in _whole(file).content.items():
            entry = Record(f"{file.path}, {key}", content if isinstance(content, dict) else {})
            names = (f"{entry.text('imageId')}.jpg",)
            yield _sample(given, entry, key, names, entry.text("question"), entry.texts("answer"))

    return collected(given, samples())


def read_listed(given: Given) -> Data:
    """VizWiz's and BLIP's: a list of entries with `image`, `question`, and `answers` or `answer`."""
    given.without_split()

    def samples() -> Iterator[Sample | str]:
        for number, entry in enumerate(given.files[0].listed):
            image = entry.text("image")
            key = str(entry["question_id"]) if "question_id" in entry else f"{image}#{number}"
            said = entry.texts("answers", "answer") if "answers" in entry else entry.texts("answer")
            yield _sample(given, entry, key, (image,), entry.text("question"), said)

    return collected(given, samples())


def read_nlvr2(given: Given) -> Data:
    """NLVR2's own JSON lines: `identifier`, `sentence` and `label`."""
    given.without_split()

    def samples() -> Iterator[Sample | str]:
        for entry in given.files[0].listed:
            key = entry.text("identifier")
            pair = key.rpartition("-")[0]
            folder = f"{entry['directory']}/" if "directory" in entry else ""
            yield _pair(given, entry, key, [f"{folder}{pair}-img{side}.png" for side in (0, 1)])

    return collected(given, samples())


def read_blip_nlvr2(given: Given) -> Data:
    """BLIP's: a list of entries with two `images`, `sentence` and `label`."""
    given.without_split()

    def samples() -> Iterator[Sample | str]:
        for number, entry in enumerate(given.files[0].listed):
            images = entry.texts("images")
            if len(images) != 2:
                raise DataError(f"{entry.where}: has {len(images)} pictures; a statement is about two")
            yield _pair(given, entry, f"{number}", list(images))

    return collected(given, samples())


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
    picture = picture_of(given, record.where, *names)
    return picture if isinstance(picture, str) else Sample(key, (picture,), question, answers)


def _pair(given: Given, entry: Record, key: str, names: Sequence[str]) -> Sample | str:
    left, right = (picture_of(given, entry.where, name) for name in names)
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
