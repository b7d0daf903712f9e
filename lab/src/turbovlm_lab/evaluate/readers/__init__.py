"""Data in the field's own file formats, told apart by what is in the files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from turbovlm.errors import ConfigError, DataError
from turbovlm_lab.evaluate.data import Data
from turbovlm_lab.evaluate.readers.captions import CAPTIONS
from turbovlm_lab.evaluate.readers.files import load
from turbovlm_lab.evaluate.readers.folders import read_classes, read_labels, read_masks, read_prompts
from turbovlm_lab.evaluate.readers.given import Format, given_by
from turbovlm_lab.evaluate.readers.hub import PREFIX, read_dataset
from turbovlm_lab.evaluate.readers.questions import QUESTIONS, STATEMENTS

ANNOTATED: dict[str, tuple[Format, ...]] = {
    "captioning": CAPTIONS,
    "retrieval": CAPTIONS,
    "vqa": QUESTIONS,
    "nlvr2": STATEMENTS,
}
FOLDERS = {
    "classification": "a folder with a folder of images per class, or a text file of names and class numbers",
    "saliency": "a folder with images in `images` and masks in `masks`",
    "text-to-image": "a text file with a prompt per line, and a folder of real images",
}


def read(
    task: str,
    given: str | Path | Sequence[str | Path],
    images: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Data:
    """What a task is to be judged on. Images are not read yet.

    Args:
        task: classification, retrieval, captioning, vqa, nlvr2, saliency or text-to-image.
        given: annotation files, a folder, or `datasets:ID`.
        images: the folder of the images that annotations name; for text-to-image, of real images.
        split: which part of the data, where one file, folder or data set has several.
        limit: that many samples, evenly spaced; all if None.

    Raises:
        ConfigError: no such task, or a limit below 1.
        DataError: data are missing, have another format, or are wrong; the message names file and line.
    """
    if task not in (*ANNOTATED, *FOLDERS):
        raise ConfigError(f"task={task!r}: must be one of {', '.join((*FOLDERS, *ANNOTATED))}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: must be an integer ≥ 1, or None for all samples")
    files = [given] if isinstance(given, str | Path) else list(given)
    if not files:
        raise DataError(f"{task} needs data: {formats_of(task)}")
    if str(files[0]).startswith(PREFIX):
        if len(files) > 1 or images is not None:
            raise DataError(f"{files[0]}: a data set has its annotations and images; give nothing beside it")
        data = read_dataset(task, str(files[0]), split)
    elif task in ANNOTATED:
        data = _annotated(task, [Path(file) for file in files], images, split)
    elif len(files) > 1:
        raise DataError(f"{task} needs {FOLDERS[task]}; {len(files)} were given")
    else:
        data = _from_folder(task, Path(files[0]), None if images is None else Path(images), split)
    return data if limit is None else limited(data, limit)


def limited(data: Data, limit: int) -> Data:
    """The same with at most so many samples, evenly spaced."""
    count = len(data.samples)
    if limit >= count:
        return data
    chosen = tuple(data.samples[i * count // limit] for i in range(limit))
    return dataclasses.replace(data, samples=chosen)


def formats_of(task: str) -> str:
    """What `read` takes for a task, in words."""
    own = FOLDERS.get(task) or "; ".join(f"{each.name} ({each.looks})" for each in ANNOTATED[task])
    return f"{own}; or datasets:ID"


def _annotated(task: str, paths: Sequence[Path], images: str | Path | None, split: str | None) -> Data:
    loaded = tuple(load(path) for path in paths)
    for each in ANNOTATED[task]:
        if each.matches(loaded):
            return each.read(given_by(loaded, None if images is None else Path(images), split))
    told = ", ".join(str(path) for path in paths)
    raise DataError(f"{told}: of no format known for {task}, which are {formats_of(task)}")


def _from_folder(task: str, path: Path, images: Path | None, split: str | None) -> Data:
    if task == "text-to-image" or path.is_file():
        if images is None:
            raise DataError(f"{path}: needs a folder of images beside it (images=…, or --images FOLDER)")
        if split is not None:
            raise DataError(f"split={split!r}: {path} has no splits; give the file of that split")
        if task == "saliency":
            raise DataError(f"{path}: saliency needs {FOLDERS[task]}")
        return read_prompts(path, images) if task == "text-to-image" else read_labels(path, images)
    if images is not None:
        raise DataError(f"images={str(images)!r}: the images are in {path}; leave it out")
    return read_classes(path, split) if task == "classification" else read_masks(path, split)
