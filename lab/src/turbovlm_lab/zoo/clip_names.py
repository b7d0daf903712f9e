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


def read_names(source: str | Path) -> ClipNames:
    """The names that a folder has embeddings of.

    Args:
        source: a folder with one file of vectors, or a file of vectors.

    Raises:
        ConfigError: no such folder or file, several that could be meant, vectors of another width, as many names as
            vectors are not there, or a name twice.
    """
    source = Path(source)
    files = sorted(source.glob("*.npy")) if source.is_dir() else [source] if source.is_file() else []
    found = [(path, names) for path in files if (names := _names_beside(path)) is not None]
    if not found:
        raise ConfigError(
            f"{source}: no file *.npy of vectors with the names beside it, in a .txt: it takes embeddings of names by "
            "CLIP ViT-B/16's text tower, [names, 512], which turbovlm does not have"
        )
    if len(found) > 1:
        raise ConfigError(f"{source}: several files of vectors: give {' or '.join(str(path) for path, _ in found)}")
    return _read(*found[0])


def _names_beside(vectors: Path) -> Path | None:
    own = vectors.with_suffix(".txt")
    shared = sorted(vectors.parent.glob("*_names.txt"))
    alike = [path for path in shared if vectors.stem.startswith(path.stem.removesuffix("names"))]
    return own if own.is_file() else next(iter(alike), None)


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
