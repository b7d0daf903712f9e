"""How the tokens of a denoiser lie: frames, rows and columns of each image, as what it is given tells.

`Denoiser.grid` is one of these, or any other function of the same arguments that can be pickled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from turbovlm.checks import brief
from turbovlm.errors import ConfigError, StateError, UnsupportedModelError
from turbovlm.ops.tracing import constant_in_graphs, is_captured, is_exporting, is_readable

Grid = tuple[int, int, int]
"""Frames, rows and columns, of which an image has one frame."""
Grids = tuple[Grid, ...]
"""The images of a sequence, one behind the other: most have one, edited images have references beside them."""
Sides = tuple[tuple[int, int], ...]
"""Rows and columns of each image of a sequence."""
GridReader = Callable[[Any, Mapping[str, Any], "Sides | None"], "Grids | Unread | None"]
"""`(holder, given, otherwise)`: of a module that has blocks, what it is given by name, and `DenoiseConfig.sides`; None
where that says nothing."""


@dataclass(frozen=True)
class OfLatent:
    """By the shape of the latent, the first argument, in patches.

    Args:
        axes: what its axes are: `b`atch, `c`hannels, `f`rames, `h`eight and `w`idth; one more than there are here is of
            frames, in front of the height.
        patch: the field of the config that says how large a patch is: a number or two, for rows and columns, or three;
            None for patches of one, which are also those of a holder without that field, or without a config.
        frames: the field of the config for the frames of a patch, where that is another.
    """

    axes: str = "bchw"
    patch: str | None = "patch_size"
    frames: str | None = None

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: Sides | None) -> Grids:
        latent: Tensor = next(iter(given.values()))
        axes = self.axes if latent.ndim == len(self.axes) else self.axes.replace("h", "fh")
        sizes = dict(zip(axes, latent.shape))
        config: Any = getattr(holder, "config", {})
        size: Any = None if self.patch is None else config.get(self.patch)
        patch = tuple(size) if isinstance(size, tuple | list) else (int(size or 1), int(size or 1))
        patch = (1, *patch) if len(patch) == 2 else patch
        if self.frames is not None:
            patch = (int(config.get(self.frames) or 1), *patch[1:])
        return ((sizes.get("f", 1) // patch[0], sizes["h"] // patch[1], sizes["w"] // patch[2]),)


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

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: Sides | None) -> Grids:
        """Raises `UnsupportedModelError` where they are not of one size, or lists, of several for one sequence."""
        latents: Any = next(iter(given.values()))
        shapes = [each.shape for each in latents if isinstance(each, Tensor)]
        if len(shapes) < len(latents):
            raise UnsupportedModelError(
                f"a {type(holder).__name__} was given lists of images, for sequences of images, text and padding in "
                "turn: turbovlm knows how those lie that have one image each"
            )
        if len(set(shapes)) > 1:
            raise UnsupportedModelError(
                f"a {type(holder).__name__} was given images of several sizes: turbovlm merges a batch of images of "
                "one size; give the others in batches of their own"
            )
        patch, frames = int(given.get(self.patch, self.sizes[0])), int(given.get(self.frames, self.sizes[1]))
        return ((shapes[0][1] // frames, shapes[0][2] // patch, shapes[0][3] // patch),)


@dataclass(frozen=True)
class OfPositions:
    """By an argument that says where each token stands, `[tokens, axes]`, or the same for every image of a batch.

    The text's may be in front of the images'.

    Args:
        name: of the argument.
        row, column: which axes they are; others are the same for all tokens of one image.
    """

    name: str
    row: int = 1
    column: int = 2

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: Sides | None) -> Grids | Unread | None:
        """Where Python may not look at positions, `otherwise`; without it they are left to an operator in what is
        compiled, and elsewhere the tokens are taken for a square.

        Raises:
            UnsupportedModelError: they are not those of images, row by row.
            ConfigError: there are not as many as `otherwise` says.
            StateError: a CUDA graph is captured, and no forward has read them before.
        """
        positions, tokens = given.get(self.name), next(iter(given.values())).shape[1]
        if positions is None:
            return None
        if otherwise is None and torch.compiler.is_compiling() and not is_exporting():
            return Unread(positions, self, tokens)
        if otherwise is None and is_captured(positions):
            if (known := known_of(positions, (self, tokens))) is None:
                raise StateError(
                    f"{self.name} cannot be looked at while a CUDA graph is captured: run a forward with the same "
                    "tensor before, or give grid=(rows, columns) to turbovlm.apply"
                )
            return known
        if not is_readable(positions):
            sides = otherwise or (square(tokens),)
            if sum(rows * columns for rows, columns in sides) != tokens:
                raise ConfigError(
                    f"grid={sides[0] if len(sides) == 1 else sides}: the image has {tokens} tokens; give its rows and "
                    "columns, or those of each image"
                )
            return tuple((1, rows, columns) for rows, columns in sides)
        return self.read(positions, tokens)

    def read(self, positions: Tensor, tokens: int) -> Grids:
        """The images whose tokens are the last `tokens` that have positions."""
        return read_once(positions, (self, tokens), lambda: self._read(positions, tokens))

    def _read(self, positions: Tensor, tokens: int) -> Grids:
        flat = (positions[0] if positions.ndim == 3 else positions)[-tokens:].cpu()
        others = [axis for axis in range(flat.shape[1]) if axis not in (self.row, self.column)]
        zeros = flat.new_zeros(tokens, 1)
        return grids_at(self.name, torch.cat((flat[:, others], zeros, flat[:, [self.row, self.column]]), dim=1))


@dataclass(frozen=True)
class Unread:
    """How tokens lie, where Python may not look at what tells it: an operator will, in `turbovlm.diffusion.rank`.

    Attributes:
        positions: the argument that tells; how: its reader.
        tokens: of all images.
    """

    positions: Tensor
    how: OfPositions
    tokens: int


@dataclass(frozen=True)
class OfShapes:
    """By an argument that lists frames, rows and columns of each image of a sequence, for the first of a batch.

    Args:
        name: of the argument: a list of tuples, the images of a batch, or of lists of them, the images of sequences.
        last: whether the last image alone has its tokens together, behind a text that the others are in.
    """

    name: str
    last: bool = False

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: Sides | None) -> Grids | None:
        """Raises `UnsupportedModelError` where the sequences of a batch have images of other sizes."""
        shapes: Any = given.get(self.name)
        if shapes is None:
            return None
        if any(each != shapes[0] for each in shapes):
            raise UnsupportedModelError(
                f"{self.name}={brief(shapes)}: the sequences of a batch have images of several sizes; give those of "
                "other sizes in batches of their own"
            )
        images = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
        images = images[-1:] if self.last else images
        return tuple((int(frames), int(rows), int(columns)) for frames, rows, columns in images)


@dataclass(frozen=True)
class OfNumbers:
    """By three arguments that are numbers: of frames, rows and columns; the first argument is tokens.

    Args:
        frames, rows, columns: names of the arguments.
        places: the argument that says where each token stands, `[batch, 3, tokens]`, or from where to where,
            `[batch, 3, tokens, 2]`; it tells of other images in the sequence, which the numbers are not of.
    """

    frames: str
    rows: str
    columns: str
    places: str

    def __call__(self, holder: Any, given: Mapping[str, Any], otherwise: Sides | None) -> Grids | None:
        """Raises `UnsupportedModelError` where other tokens beside them are not those of images, or are not known."""
        found = [given.get(name) for name in (self.frames, self.rows, self.columns)]
        frames, rows, columns = (0 if number is None else int(number) for number in found)
        tokens, known = next(iter(given.values())).shape[1], frames * rows * columns
        if tokens == known:
            return ((frames, rows, columns),)
        places = given.get(self.places)
        if places is None or not is_readable(places):
            raise UnsupportedModelError(
                f"{self.frames}, {self.rows} and {self.columns} are {found}, which makes {known} tokens, and {tokens} "
                f"are given: turbovlm does not know how the others lie where {self.places} is None, or is not to be "
                "looked at, as in a compiled denoiser"
            )
        starts = places[0] if places.ndim == 3 else places[0, ..., 0]
        return read_once(places, self, lambda: grids_at(self.places, starts.T))


def read_once(positions: Tensor, how: Hashable, read: Callable[[], Grids]) -> Grids:
    """What `read` finds in `positions`, of which pipelines give every step the same tensor.

    Looking at a GPU's tensor waits for all that was launched before.

    Args:
        how: what else it depends on.
    """
    if positions.is_inference():  # has no version, by which a change in place is seen
        return read()
    found = known_of(positions, how)
    if found is None:
        found = read()
        _READ[positions] = (positions._version, how), found
    return found


def known_of(positions: Tensor, how: Hashable) -> Grids | None:
    """What `read_once` has found in the same tensor, if it has and nobody has changed it."""
    known = None if positions.is_inference() else _READ.get(positions)
    return None if known is None or known[0] != (positions._version, how) else known[1]


_READ: MutableMapping[Tensor, tuple[Hashable, Grids]] = WeakIdKeyDictionary()


def grids_at(name: str, positions: Tensor) -> Grids:
    """The images whose tokens stand at `positions`, `[tokens, axes]`: the last three axes are frames, rows, columns.

    The tokens of an image lie frame by frame, each row by row, and have all other axes alike. Another image begins
    where a token stands in front of the one before it, or differs in another axis.

    Args:
        name: of the argument that they are from.

    Raises:
        UnsupportedModelError: an image is not full, or two tokens in a row stand at one place.
    """
    found = positions.cpu()
    other, step = found[:, :-3], found[1:, -3:] - found[:-1, -3:]
    frame, row, column = step.sign().unbind(dim=1)
    behind, alike = 9 * frame + 3 * row + column, (other[1:] == other[:-1]).all(dim=1)
    twice = ((behind == 0) & alike).nonzero().flatten()
    if len(twice):
        raise UnsupportedModelError(
            f"{name} place tokens {int(twice[0])} and {int(twice[0]) + 1} of {len(found)} at one place, so turbovlm "
            "does not know how they lie; where they are in half precision, which lacks whole numbers from 256 on in "
            "bfloat16, give them in float32"
        )
    starts = [0, *(1 + (~((behind > 0) & alike)).nonzero().flatten()).tolist(), len(found)]
    grids = []
    for start, end in itertools.pairwise(starts):
        image = found[start:end, -3:]
        columns = _until_it_changes(image[:, :2])
        rows = _until_it_changes(image[:, :1]) // columns
        frames = len(image) // (rows * columns) if rows else 0
        if frames * rows * columns != len(image) or not _is_full(image.reshape(frames, rows, columns, 3)):
            raise UnsupportedModelError(
                f"{name} place tokens {start} to {end - 1} of {len(found)} where they fill no image row by row, so "
                "turbovlm does not know how they lie"
            )
        grids.append((frames, rows, columns))
    return tuple(grids)


def _until_it_changes(values: Tensor) -> int:
    """How many entries at the front of `values`, `[entries, axes]`, are like the first."""
    same = (values == values[0]).all(dim=1)
    return len(values) if bool(same.all()) else int(same.int().argmin())


def _is_full(image: Tensor) -> bool:
    """Whether each axis of `image`, `[frames, rows, columns, 3]`, says the same wherever the other two are."""
    frames, rows, columns = image.unbind(dim=-1)
    along = frames[:, :1, :1], rows[:1, :, :1], columns[:1, :1, :]
    return all(bool((axis == first).all()) for axis, first in zip((frames, rows, columns), along))


def count_gone(images: Sequence[Grid], share: float) -> int:
    """How many tokens of those images are merged; every 2×2 cell, also one that is cut off, keeps a token."""
    tokens = sum(map(math.prod, images))
    cells = sum(frames * -(-rows // 2) * -(-columns // 2) for frames, rows, columns in images)
    gone, most = share_gone(tokens, share), tokens - cells
    return most if gone > most else gone


def share_gone(tokens: int, share: float) -> int:
    """How many of `tokens` tokens are merged, as far as a share of them is kept."""
    up, down = _fraction(share)  # whole numbers and a branch: of what is rounded, graphs make symbols that cost minutes
    return tokens - (2 * up * tokens + down) // (2 * down)


@constant_in_graphs
def _fraction(share: float) -> tuple[int, int]:
    """Numerator and denominator: `0.7` is 7 and 10."""
    return Fraction(share).limit_denominator(10_000).as_integer_ratio()


def square(tokens: int) -> tuple[int, int]:
    """Rows and columns of as many tokens, where nothing else tells.

    Raises:
        ConfigError: they are no square.
    """
    side = math.floor(math.sqrt(tokens))  # exact for squares; compilers know no `isqrt`
    if side * side != tokens:
        raise ConfigError(
            f"{tokens} tokens are no square: give grid=(rows, columns), or, of several images in one sequence, those "
            "of each, grid=((rows, columns), …)"
        )
    return side, side
