"""Tables of images: which of their columns are images and names."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turbovlm.errors import DataError

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Columns:
    """Where a table has its images.

    Attributes:
        image: the column: bytes, or a struct with `bytes`; the only such column if None.
        name: the column of names; the struct's `path`, else file and row, if None.
        split: of a dataset.
    """

    image: str | None = None
    name: str | None = None
    split: str = "train"


def columns_of(source: str, schema: Any, columns: Columns) -> tuple[str, str | None]:
    """The columns of images and of names.

    Raises:
        DataError: there is none of that name, or none or several hold images.
    """
    import pyarrow

    def holds_images(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(kind.field(index).name == "bytes" for index in range(kind.num_fields))
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    for wanted in (columns.image, columns.name):
        if wanted is not None and wanted not in schema.names:
            raise DataError(f"{source}: has no column {wanted!r}; it has {', '.join(schema.names)}")
    if columns.image is not None:
        return columns.image, columns.name
    found = [each.name for each in schema if holds_images(each.type)]
    if len(found) != 1:
        what = f"{len(found)} columns of bytes ({', '.join(found)})" if found else "no column of bytes"
        raise DataError(f"{source}: has {what}; name the column of images; it has {', '.join(schema.names)}")
    return found[0], columns.name


def load_dataset(source: str, split: str) -> Any:
    """A split of a dataset.

    Raises:
        DataError: `datasets` is not installed or cannot load it.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{source}: there is no such folder or file; for a dataset of this id: pip install datasets")
    import datasets

    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the hub, the network and each format have their own kinds
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source}: there is no such folder or file, and datasets cannot load it: {said}") from error


def column_of(output: str, values: Sequence[Any]) -> pyarrow.Array:
    """Values of an output as a column, of one type whether there are values in it or none."""
    import pyarrow

    kinds = {"score": pyarrow.float32()} | dict.fromkeys(("label", "caption", "error"), pyarrow.string())
    return pyarrow.array(values, kinds.get(output, pyarrow.list_(pyarrow.float32())))
