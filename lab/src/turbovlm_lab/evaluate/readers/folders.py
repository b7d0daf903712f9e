"""Folders of images: a folder per class, images beside their masks, and prompts with real images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from turbovlm.errors import DataError
from turbovlm.loading.images import IMAGE_SUFFIXES
from turbovlm_lab.evaluate.data import Data, LazyImage, Sample
from turbovlm_lab.evaluate.readers.files import lines_of, listed_images, read_text, unique

IMAGE_FOLDERS = ("images", "image", "imgs", "DUTS-TE-Image", "DUTS-TR-Image")
MASK_FOLDERS = ("masks", "mask", "ground_truth_mask", "gt", "GT", "DUTS-TE-Mask", "DUTS-TR-Mask")


def read_classes(folder: Path, split: str | None = None) -> Data:
    """ImageNet's: a folder per class, `folder[/split]/class/image`; classes in the order of their names.

    Raises:
        DataError: there is no such folder or split, it has no folders, or one of them no image.
    """
    root = _existing(folder, split)
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    if not classes:
        raise DataError(f"{root}: has no folders; there must be one for each class, with its images")
    samples = []
    for each in classes:
        images = sorted(path for path in each.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise DataError(_no_images(each, among=[path.name for path in classes]))
        samples += [_named(root, path, (each.name,)) for path in images]
    return Data(_title(folder, split), tuple(samples), tuple(each.name for each in classes))


def read_labels(file: Path, images: Path) -> Data:
    """ImageNet's validation set in one folder: a line per image, its name and the number of its class.

    Raises:
        DataError: a line that is not this.
    """
    samples: list[Sample] = []
    left_out = []
    numbers: set[int] = set()
    lines: dict[str, int] = {}
    for line, text in enumerate(lines_of(read_text(file)), 1):
        if not text.strip():
            continue
        name, _, number = text.strip().rpartition(" ")
        if not name or not number.isdecimal():
            raise DataError(f"{file}, line {line}: must be an image's name and the number of its class; it is {text!r}")
        unique(lines, name, line, f"{file}, line {line}", "the image")
        numbers.add(int(number))
        if (images / name).is_file():
            samples.append(Sample(name, (LazyImage.file(images / name),), answers=(number,)))
        else:
            left_out.append(f"{file}, line {line}: its image {name} is not in {images}")
    if not samples:
        raise DataError(f"{file}: none of its images is in {images}")
    classes = tuple(str(number) for number in range(max(numbers) + 1))
    return Data(file.name, tuple(samples), classes, tuple(left_out))


def read_masks(folder: Path, split: str | None = None) -> Data:
    """DUTS', ECSSD's, and their like: a folder of images and one of masks, whose files have the same names.

    Raises:
        DataError: there are no such folders in it.
    """
    root = _existing(folder, split)
    images, masks = _inner(root, IMAGE_FOLDERS, "images"), _inner(root, MASK_FOLDERS, "masks")
    of_name = {path.stem: path for path in listed_images(masks)}
    samples, left_out = [], []
    for path in listed_images(images):
        mask = of_name.pop(path.stem, None)
        if mask is None:
            left_out.append(f"{path}: has no mask in {masks}")
        else:
            samples.append(Sample(path.name, (LazyImage.file(path),), mask=LazyImage.file(mask)))
    left_out += [f"{path}: has no image in {images}" for path in of_name.values()]
    if not samples:
        raise DataError(f"{root}: no image in {images.name} has a mask of its name in {masks.name}")
    return Data(_title(folder, split), tuple(samples), left_out=tuple(left_out))


def read_prompts(file: Path, images: Path) -> Data:
    """A prompt per line, and a folder of real images to compare with, of which those made are to be like.

    Raises:
        DataError: there is no prompt or no image.
    """
    prompts = [(line, text.strip()) for line, text in enumerate(lines_of(read_text(file)), 1) if text.strip()]
    if not prompts:
        raise DataError(f"{file}: has no prompt")
    _existing(images, None)
    real = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not real:
        raise DataError(f"{images}: has no image to compare with")
    samples = tuple(Sample(f"line {line}", text=text) for line, text in prompts)
    return Data(file.name, samples, real=tuple(LazyImage.file(path) for path in real))


def _existing(folder: Path, split: str | None) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'there is no such folder'}")
    if split is None:
        return folder
    if not (folder / split).is_dir():
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())[:8]) or "none"
        raise DataError(f"split={split!r}: {folder} has no such folder; its folders are {there}")
    return folder / split


def _no_images(folder: Path, among: list[str]) -> str:
    splits = {"train", "val", "test", "validation"} & set(among)
    hint = f"; give one of its splits ({', '.join(sorted(splits))})" if splits else ""
    return f"{folder}: has no images ({', '.join(sorted(IMAGE_SUFFIXES))}){hint}"


def _named(root: Path, path: Path, answers: tuple[str, ...]) -> Sample:
    return Sample(path.relative_to(root).as_posix(), (LazyImage.file(path),), answers=answers)


def _inner(root: Path, names: tuple[str, ...], what: str) -> Path:
    for path in sorted(_folders(root)):
        if path.name in names:
            return path
    raise DataError(f"{root}: has no folder of {what}; it is called one of {', '.join(names)}")


def _folders(root: Path) -> Iterator[Path]:
    return (path for path in root.iterdir() if path.is_dir())


def _title(folder: Path, split: str | None) -> str:
    return f"{folder.name}, {split}" if split else folder.name
