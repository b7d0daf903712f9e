"""Captions of pictures, for captioning and for retrieval."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence

from turbovlm.errors import DataError
from turbovlm.evaluate.data import Data, Sample
from turbovlm.evaluate.readers.files import Annotations, Record, unique
from turbovlm.evaluate.readers.given import Format, Given, collected, one_file, picture_of

TEST = "test"


def read_coco(given: Given) -> Data:
    """COCO's own: `images` with `id` and `file_name`; `annotations` with `image_id` and `caption`."""
    given.without_split()
    whole = given.files[0].whole
    assert whole is not None
    images: dict[object, Record] = {}
    for image in whole.records("images"):
        unique(images, image["id"], image, image.where, "the image id")
    captions: dict[object, list[str]] = {key: [] for key in images}
    left_out: list[str] = []
    for annotation in whole.records("annotations"):
        if annotation["image_id"] in captions:
            captions[annotation["image_id"]].append(annotation.text("caption"))
        else:
            left_out.append(f"{annotation.where}: is of image {annotation['image_id']!r}, which is not in 'images'")
    samples = (_sample(given, r, str(key), r.text("file_name"), captions[key]) for key, r in images.items())
    return collected(given, [*left_out, *samples])


def read_karpathy(given: Given) -> Data:
    """`dataset_coco.json`, `dataset_flickr30k.json`: `images` with `filename`, `split` and `sentences`."""
    whole = given.files[0].whole
    assert whole is not None

    def samples() -> Iterator[Sample | str]:
        for image in _of_split(given, whole.records("images")):
            folder = f"{image['filepath']}/" if "filepath" in image else ""
            file = image.text("filename")
            yield _sample(given, image, file, folder + file, image.texts("sentences", "raw"))

    return collected(given, samples())


def read_flickr_table(given: Given) -> Data:
    """`flickr_annotations_30k.csv`: `filename`, `split`, and `raw` with a list of captions."""

    def samples() -> Iterator[Sample | str]:
        for row in _of_split(given, given.files[0].listed):
            file = row.text("filename")
            yield _sample(given, row, file, file, _list_in(row, "raw"))

    return collected(given, samples())


def read_flickr_results(given: Given) -> Data:
    """`results.csv`, a row per caption: `image_name| comment_number| comment`."""
    given.without_split()
    return _grouped(given, [(row, row.text("image_name"), row.text("comment")) for row in given.files[0].listed])


def read_flickr_token(given: Given) -> Data:
    """`results_20130124.token`, a line per caption: `picture.jpg#0`, a tab, the caption."""
    given.without_split()
    rows = given.files[0].listed
    return _grouped(given, [(row, row.text("name").rpartition("#")[0], row.text("caption")) for row in rows])


def read_blip(given: Given) -> Data:
    """BLIP's: a list of entries with `image` and `caption`, which is a text or a list of them."""
    given.without_split()

    def samples() -> Iterator[Sample | str]:
        for entry in given.files[0].listed:
            image = entry.text("image")
            yield _sample(given, entry, image, image, entry.texts("caption"))

    return collected(given, samples())


def _sample(given: Given, record: Record, key: str, name: str, captions: Sequence[str]) -> Sample | str:
    if not captions:
        return f"{record.where}: {name} has no caption"
    picture = picture_of(given, record.where, name)
    return picture if isinstance(picture, str) else Sample(key, (picture,), answers=tuple(captions))


def _grouped(given: Given, rows: Sequence[tuple[Record, str, str]]) -> Data:
    """A sample of all the captions that are one picture's."""
    captions: dict[str, list[str]] = {}
    first: dict[str, Record] = {}
    for row, name, caption in rows:
        captions.setdefault(name, []).append(caption)
        first.setdefault(name, row)
    return collected(given, (_sample(given, first[name], name, name, said) for name, said in captions.items()))


def _of_split(given: Given, records: Sequence[Record]) -> list[Record]:
    """Those of the split that was asked for; of the test split, if none was."""
    wanted, there = given.split or TEST, {record.text("split") for record in records}
    if wanted not in there:
        raise DataError(f"split={wanted!r}: {given.name} has {', '.join(sorted(there))}")
    return [record for record in records if record["split"] == wanted]


def _list_in(row: Record, name: str) -> tuple[str, ...]:
    """A list that is written into a cell, as JSON or as Python has it."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return Record(row.where, {name: parse(row.text(name))}).texts(name)
        except (ValueError, SyntaxError):
            continue
    raise DataError(f"{row.where}: {name!r} must be a list of texts; it is {row[name]!r}")


def _is_token(files: Sequence[Annotations]) -> bool:
    return len(files) == 1 and files[0].path.suffix == ".token"


CAPTIONS = (
    Format("COCO captions", "JSON with 'images' and 'annotations'", one_file("images", "annotations"), read_coco),
    Format(
        "Karpathy's splits",
        "JSON with 'images' that have 'sentences' and a 'split'",
        lambda files: one_file("images")(files) and not files[0].has("annotations"),
        read_karpathy,
    ),
    Format("BLIP's captions", "JSON list with 'image' and 'caption'", one_file("image", "caption"), read_blip),
    Format("Flickr30k's table", "CSV with 'filename', 'raw', 'split'", one_file("filename", "raw"), read_flickr_table),
    Format(
        "Flickr30k's results",
        "CSV with 'image_name', 'comment'",
        one_file("image_name", "comment"),
        read_flickr_results,
    ),
    Format("Flickr30k's captions", "a .token file", _is_token, read_flickr_token),
)
