"""How the tokens of a denoiser lie: frames, rows and columns, as what it is given tells.

`Denoiser.grid` is one of these, or any other function of the same arguments that can be pickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from turbovlm.errors import ConfigError, UnsupportedModelError
from turbovlm.ops.tracing import is_readable

Grid = tuple[int, int, int]
"""Frames, rows and columns, of which an image has one frame."""
GridReader = Callable[[Any, Mapping[str, Any], "tuple[int, int] | None"], "Grid | None"]
"""`(holder, given, otherwise)`: of a module that has blocks, what it is given by name, and `DenoiseConfig.grid`; None
where that says nothing."""


@dataclass(frozen=True)
class OfLatent:
    """By the shape of the latent, the first argument, in patches.

    Args:
        axes: what its axes are: `b`atch, `c`hannels, `f`rames, `h`eight and `w`idth; one more than there are here is of
            frames, in front of the height.
        patch: the field of the config that says how large a patch is: a number or two, for rows and columns, or three;
            None for patches of one.
        frames: the field of the config for the frames of a patch, where that is another.
    """

    axes: str = "bchw"
    patch: str | None = "patch_size"
    frames: str | None = None

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: tuple[int, int] | None) -> Grid:
        latent: Tensor = next(iter(given.values()))
        axes = self.axes if latent.ndim == len(self.axes) else self.axes.replace("h", "fh")
        sizes = dict(zip(axes, latent.shape))
        size: Any = None if self.patch is None else holder.config.get(self.patch)
        patch = tuple(size) if isinstance(size, tuple | list) else (int(size or 1), int(size or 1))
        patch = (1, *patch) if len(patch) == 2 else patch
        if self.frames is not None:
            patch = (int(holder.config.get(self.frames) or 1), *patch[1:])
        return sizes.get("f", 1) // patch[0], sizes["h"] // patch[1], sizes["w"] // patch[2]


@dataclass(frozen=True)
class OfList:
    """By the shape of latents `[channels, frames, height, width]`, the first argument, a list of one for each image.

    Args:
        patch, frames: arguments that say how many rows and columns, and frames, a patch has.
        sizes: what these are where they are not given.
    """

    patch: str
    frames: str
    sizes: tuple[int, int]

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: tuple[int, int] | None) -> Grid:
        """Raises `UnsupportedModelError` where they are not of one size, or there are several for one image."""
        latents: Any = next(iter(given.values()))
        shapes = [each.shape for each in latents if isinstance(each, Tensor)]
        if len(shapes) < len(latents) or len(set(shapes)) > 1:
            raise UnsupportedModelError(
                f"a {type(holder).__name__} was given images of several sizes, or several in one sequence: turbovlm "
                "knows how the tokens of one image lie, and of others as large"
            )
        patch, frames = int(given.get(self.patch, self.sizes[0])), int(given.get(self.frames, self.sizes[1]))
        return shapes[0][1] // frames, shapes[0][2] // patch, shapes[0][3] // patch


@dataclass(frozen=True)
class OfPositions:
    """By an argument that says where each token stands, `[tokens, axes]`, or the same for every image of a batch.

    The text's may be in front of the image's.

    Args:
        name: of the argument.
        row, column: which axes they are; others are the same for all tokens of one image.
    """

    name: str
    row: int = 1
    column: int = 2

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: tuple[int, int] | None) -> Grid | None:
        """Where Python may not look at positions, `otherwise`, or a square.

        Raises:
            UnsupportedModelError: they are not those of one image.
            ConfigError: there are not as many as `otherwise` says.
        """
        positions, tokens = given.get(self.name), next(iter(given.values())).shape[1]
        if positions is None:
            return None
        if not is_readable(positions):
            rows, columns = otherwise or square(tokens)
            if rows * columns != tokens:
                raise ConfigError(f"grid={otherwise}: the image has {tokens} tokens; give its rows and columns")
            return 1, rows, columns
        flat = (positions[0] if positions.ndim == 3 else positions)[-tokens:]
        spans = (flat.amax(dim=0) - flat.amin(dim=0) + 1).long().tolist()
        rows, columns = spans.pop(self.row), spans.pop(self.column - 1)
        if rows * columns != tokens or any(span != 1 for span in spans):
            raise UnsupportedModelError(
                f"{self.name} place {tokens} tokens on {rows}×{columns} positions: not one image, row by row, so "
                "turbovlm does not know how they lie"
            )
        return 1, rows, columns


@dataclass(frozen=True)
class OfShapes:
    """By an argument that lists frames, rows and columns of each image of a sequence, for the first of a batch.

    Args:
        name: of the argument: a list of tuples, or of lists of them.
    """

    name: str

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: tuple[int, int] | None) -> Grid | None:
        """Raises `UnsupportedModelError` where a sequence has several images."""
        shapes: Any = given.get(self.name)
        if shapes is None:
            return None
        if isinstance(shapes[0], list):
            shapes = shapes[0]
            if len(shapes) != 1:
                raise UnsupportedModelError(
                    f"{self.name}={shapes}: the tokens of {len(shapes)} images are in one sequence, and turbovlm knows "
                    "how those of one lie"
                )
        frames, rows, columns = shapes[0]
        return int(frames), int(rows), int(columns)


@dataclass(frozen=True)
class OfNumbers:
    """By three arguments that are numbers: of frames, rows and columns; the first argument is tokens."""

    frames: str
    rows: str
    columns: str

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: tuple[int, int] | None) -> Grid | None:
        """Raises `UnsupportedModelError` where there are other tokens beside them, or a number is missing."""
        found = [given.get(name) for name in (self.frames, self.rows, self.columns)]
        frames, rows, columns = (0 if number is None else int(number) for number in found)
        tokens, known = next(iter(given.values())).shape[1], frames * rows * columns
        if tokens != known:
            raise UnsupportedModelError(
                f"{self.frames}, {self.rows} and {self.columns} are {found}, which makes {known} tokens, and {tokens} "
                "are given: turbovlm does not know how the others lie"
            )
        return frames, rows, columns


def square(tokens: int) -> tuple[int, int]:
    """Rows and columns of as many tokens, where nothing else tells.

    Raises:
        ConfigError: they are no square.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConfigError(f"{tokens} tokens are no square: give grid=(rows, columns)")
    return side, side
