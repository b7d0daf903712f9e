"""Captions of images, for captioning and for retrieval."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence

from turbovlm.errors import DataError
from turbovlm_lab.evaluate.data import Data, Sample
from turbovlm_lab.evaluate.readers.files import Annotations, Record, unique
from turbovlm_lab.evaluate.readers.given import Format, Given, collected, each, image_of, one_file, refused

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

    def take(annotation: Record) -> None:
        key = annotation["image_id"]
        if key not in captions:
            raise DataError(f"{annotation.where}: is of image {key!r}, which is not in 'images'")
        captions[key].append(annotation.text("caption"))

    def sample(_: int, image: Record) -> Sample | str:
        return _sample(given, image, str(image["id"]), image.text("file_name"), captions[image["id"]])

    return collected(given, [*refused(whole.records("annotations"), take), *each(images.values(), sample)])


def read_karpathy(given: Given) -> Data:
    """`dataset_coco.json`, `dataset_flickr30k.json`: `images` with `filename`, `split` and `sentences`."""
    whole = given.files[0].whole
    assert whole is not None

    def sample(_: int, image: Record) -> Sample | str:
        folder = f"{image['filepath']}/" if "filepath" in image else ""
        file = image.text("filename")
        return _sample(given, image, file, folder + file, image.texts("sentences", "raw"))

    return collected(given, each(_of_split(given, whole.records("images")), sample))


def read_flickr_table(given: Given) -> Data:
    """`flickr_annotations_30k.csv`: `filename`, `split`, and `raw` with a list of captions."""

    def sample(_: int, row: Record) -> Sample | str:
        file = row.text("filename")
        return _sample(given, row, file, file, _list_in(row, "raw"))

    return collected(given, each(_of_split(given, given.files[0].listed), sample))


def read_flickr_results(given: Given) -> Data:
    """`results.csv`, a row per caption: `image_name| comment_number| comment`."""
    return _grouped(given, lambda row: (row.text("image_name"), (row.text("comment"),)))


def read_flickr_token(given: Given) -> Data:
    """`results_20130124.token`, a line per caption: `image.jpg#0`, a tab, the caption."""
    return _grouped(given, lambda row: (row.text("name").rpartition("#")[0], (row.text("caption"),)))


def read_blip(given: Given) -> Data:
    """BLIP's: a list of entries with `image` and `caption`, which is a text or a list of them."""
    return _grouped(given, lambda entry: (entry.text("image"), entry.texts("caption")))


def _sample(given: Given, record: Record, key: str, name: str, captions: Sequence[str]) -> Sample | str:
    if not captions:
        return f"{record.where}: {name} has no caption"
    image = image_of(given, record.where, name)
    return image if isinstance(image, str) else Sample(key, (image,), answers=tuple(captions))


def _grouped(given: Given, read: Callable[[Record], tuple[str, tuple[str, ...]]]) -> Data:
    """A sample of all the captions that are one image's; `read` gives an entry's image and captions."""
    given.without_split()
    captions: dict[str, list[str]] = {}
    first: dict[str, Record] = {}

    def take(entry: Record) -> None:
        name, said = read(entry)
        captions.setdefault(name, []).extend(said)
        first.setdefault(name, entry)

    left_out = refused(given.files[0].listed, take)
    samples = (_sample(given, first[name], name, name, said) for name, said in captions.items())
    return collected(given, [*left_out, *samples])


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
