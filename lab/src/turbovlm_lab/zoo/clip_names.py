"""Names as CLIP's text tower has embedded them, read from a folder: the text side of `turbovlm_lab.zoo.clip`.

The package with CLIP's image tower has no text tower, so texts come from whoever has embedded them with the same CLIP
ViT-B/16. In a folder, `NAME.npy` has vectors, `[names, 512]`, and `NAME.txt`, or the file whose
name ends in `_names.txt` and begins alike, has the names, one in each line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from turbovlm.errors import ConfigError
from turbovlm_lab.zoo.clip import LOGIT_SCALE, WIDTH


@dataclass(frozen=True, eq=False)
class ClipNames:
    """Names, and their vectors in the space of CLIP's images.

    Attributes:
        names: each once.
        vectors: of length 1, `[names, 512]`.
    """

    names: tuple[str, ...]
    vectors: Tensor

    def only(self, labels: Sequence[str]) -> ClipNames:
        """Those of some names, in their order.

        Raises:
            ConfigError: a label that has no embedding, or fewer than two.
        """
        places = {name.lower(): place for place, name in enumerate(self.names)}
        missing = [label for label in labels if label.strip().lower() not in places]
        if missing:
            raise ConfigError(
                f"labels: no embedding of {', '.join(missing)}; there are those of {len(self.names)} names: "
                f"{', '.join(self.names)}"
            )
        chosen = list(dict.fromkeys(places[label.strip().lower()] for label in labels))
        if len(chosen) < 2:
            raise ConfigError(f"labels={list(labels)}: give at least two different ones, to choose between")
        return ClipNames(tuple(self.names[place] for place in chosen), self.vectors[chosen])

    def probabilities(self, images: Tensor) -> Tensor:
        """How probable CLIP finds each name for each image, `[images, names]`.

        Args:
            images: the images' vectors of length 1, `[images, 512]`.
        """
        return (LOGIT_SCALE * images @ self.vectors.T).softmax(dim=-1)


def read_names(folder: str | Path, name: str | None = None) -> ClipNames:
    """The names that a folder has embeddings of.

    Args:
        folder: where the files are.
        name: of the file with vectors, without its ending, where the folder has several.

    Raises:
        ConfigError: no such folder or file, several that could be meant, vectors of another width, as many names as
            vectors are not there, or a name twice.
    """
    folder = Path(folder)
    files = {path.stem: path for path in sorted(folder.glob("*.npy"))} if folder.is_dir() else {}
    with_names = {stem: names for stem in files if (names := _names_beside(folder, stem)) is not None}
    found = with_names if name is None else {stem: path for stem, path in with_names.items() if stem == name}
    if not found:
        what = "a file *.npy of vectors" if name is None else f"{name}.npy"
        raise ConfigError(
            f"{folder}: has no {what} with the names beside it, in a .txt; it takes embeddings of names by CLIP "
            "ViT-B/16's text tower, [names, 512], which turbovlm does not have"
        )
    if len(found) > 1:
        raise ConfigError(f"{folder}: has several files of vectors, {', '.join(found)}: say which")
    stem, names_file = next(iter(found.items()))
    return _read(files[stem], names_file)


def _names_beside(folder: Path, stem: str) -> Path | None:
    own = folder / f"{stem}.txt"
    shared = [path for path in folder.glob("*_names.txt") if stem.startswith(path.stem.removesuffix("names"))]
    return own if own.is_file() else next(iter(shared), None)


def _read(vectors_file: Path, names_file: Path) -> ClipNames:
    import numpy as np

    names = [line.strip() for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        array = np.load(vectors_file, allow_pickle=False)
    except ValueError as error:
        raise ConfigError(f"{vectors_file}: cannot be read as an array: {error}") from None
    if array.ndim != 2 or array.shape[1] != WIDTH or array.dtype.kind != "f":
        raise ConfigError(
            f"{vectors_file}: an array {array.dtype} {list(array.shape)}; CLIP ViT-B/16's vectors are [names, {WIDTH}]"
        )
    if len(array) != len(names):
        raise ConfigError(f"{vectors_file}: {len(array)} vectors, and {names_file.name} has {len(names)} names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{names_file}: {twice!r} stands there twice")
    vectors = torch.from_numpy(array.astype("float32"))
    if not bool(vectors.isfinite().all()) or bool((vectors.norm(dim=1) == 0).any()):
        raise ConfigError(f"{vectors_file}: some vectors are zero, infinite or NaN")
    return ClipNames(tuple(names), F.normalize(vectors, dim=-1))
