"""Which tokens of the images of a sequence go, and where: each image is compared by itself, and all are ranked at once.

In a compiled denoiser the numbers of tokens are symbols, as soon as it has met a second size. Laid open, what is here
has them in branches and loops, which are true of one size alone, and a graph would be compiled for every size. So
compilers are given operators that they do not look into: a denoiser keeps to the graphs that it has without merging.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from turbovlm.checks import brief
from turbovlm.diffusion.grids import OfPositions, Unread, count_gone
from turbovlm.errors import StateError
from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.merging import mutual_redundancy
from turbovlm.ops.partition import Partition, index_count, partition_tokens, positions
from turbovlm.ops.plain import Chosen
from turbovlm.ops.tracing import is_exporting
from turbovlm.ops.whole import Rules

BAND = 4096
"""Larger images are cut into bands of about as many tokens, from top to bottom, and merged within them: to compare all
tokens with all would cost their square. A video's bands have two frames at least, so that what stands still can
merge."""

Image = tuple[int, int, int, bool]
"""Frames, rows and columns of an image, and whether it merges."""


def compare(features: Tensor, images: Sequence[Image], path: ModuleType) -> tuple[Tensor, Tensor]:
    """R of the candidates of the images that merge, each among its own destinations, and its argument.

    Args:
        features: `[batch, tokens, width]`.
        images: those of the sequence, in its order; at least one merges.
        path: from `path_for`.

    Returns:
        R in float32 or better, and the index among the destinations of all images, int64, `[batch, candidates]` each.
    """
    if torch.compiler.is_compiling() and not is_exporting():
        compared: tuple[Tensor, Tensor] = compare_operator(features, _flat(images))
        return compared
    found, first = [], 0
    for partition in _partitions(features, images):
        redundancy, nearest = mutual_redundancy(features, partition, path=path)
        found.append((redundancy, nearest + first if first else nearest))
        first += index_count(partition.destinations)
    if len(found) == 1:
        return found[0]
    redundancy, nearest = (torch.cat(each, dim=1) for each in zip(*found))
    return redundancy, nearest


def choose(
    features: Tensor,
    redundancy: Tensor,
    nearest: Tensor,
    semantic: Tensor | None,
    images: Sequence[Image],
    gone: int,
    path: ModuleType,
    block: int,
    rules: Rules,
) -> Chosen:
    """The `gone` tokens of highest degree, and the destination of each: places in the sequence.

    Args:
        features, images, path: as in `compare`; redundancy, nearest: what it gave.
        semantic: A of every token, `[batch, tokens]`; None where the degree does not need it.
        block: index of the group of blocks, from 0.
        rules: degree, alpha and seed.

    Returns:
        `[batch, gone]` each, int64.
    """
    if torch.compiler.is_compiling() and not is_exporting() and isinstance(rules.degree, str):
        chosen: Chosen = choose_operator(
            *(features, redundancy, nearest, semantic, _flat(images), gone, block), *rules[:3]
        )
        return chosen
    partition = _joined(list(_partitions(features, images)), features.device)
    _, degree, pair = path.rank(
        *(redundancy, nearest, semantic, partition, block),
        degree=rules.degree,
        alpha=rules.alpha,
        seed=rules.seed,
        padding=None,
        r=gone,
    )
    found: Chosen = path.choose(degree, nearest, partition, gone) if pair is None else pair
    return found


def choose_unread(
    features: Tensor,
    lie: Unread,
    semantic: Tensor | None,
    least: int,
    share: float,
    gone: int,
    path: ModuleType,
    block: int,
    rules: Rules,
) -> Chosen:
    """`compare` and `choose`, of images whose positions only an operator may look at.

    Args:
        features: as in `compare`; the rest as in `choose`.
        lie: where their tokens stand.
        least: tokens below which an image is left whole.
        share: of the tokens that is kept.

    Raises:
        StateError: with that share another number of tokens go, as of images that are left whole; when it runs.
    """
    how = [lie.how.name, lie.how.row, lie.how.column, lie.tokens, least, share, gone, block]
    if isinstance(rules.degree, str):
        found: Chosen = choose_at_positions(features, lie.positions, semantic, *how, *rules[:3])
        return found
    raise StateError(
        f"degree={brief(rules.degree)}: a function cannot be compiled where positions say how tokens lie; give "
        "grid=(rows, columns) to turbovlm.apply"
    )


# CUDA graphs cannot repeat a look at values; releases of PyTorch without the tag fail in CUDA where one is captured
_NOT_IN_CUDA_GRAPHS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


@torch.library.custom_op("turbovlm::choose_at_positions", mutates_args=(), **_NOT_IN_CUDA_GRAPHS)
def choose_at_positions(
    features: Tensor,
    positions: Tensor,
    semantic: Tensor | None,
    name: str,
    row: int,
    column: int,
    tokens: int,
    least: int,
    share: float,
    gone: int,
    block: int,
    degree: str,
    alpha: float | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """`choose_unread`, of what operators take; it looks at the positions."""
    grids = OfPositions(name, row, column).read(positions, tokens)
    images = [(*grid, math.prod(grid) >= least) for grid in grids]
    expected = count_gone([grid for grid in grids if math.prod(grid) >= least], share)
    if gone != expected:
        raise StateError(
            f"{name} say that {grids} are frames, rows and columns of each image, of which {expected} tokens go, and "
            f"{gone} in what was compiled: give grid=, the rows and columns of each image, to turbovlm.apply"
        )
    path, rules = path_for(features), Rules(degree, alpha, seed, "spatial", "merge")
    found = compare(features, images, path)
    src, dst = choose(features, *found, semantic, images, gone, path, block, rules)
    return src.clone(), dst.clone()


@choose_at_positions.register_fake
def _(features: Tensor, positions: Tensor, semantic: Tensor | None, *how: Any) -> tuple[Tensor, Tensor]:
    src = features.new_empty(len(features), how[6], dtype=torch.int64)
    return src, torch.empty_like(src)


@torch.library.custom_op("turbovlm::compare_on_grids", mutates_args=())
def compare_operator(features: Tensor, images: list[int]) -> tuple[Tensor, Tensor]:
    """`compare`, of images laid open."""
    return compare(features, _images(images), path_for(features))


@compare_operator.register_fake
def _(features: Tensor, images: list[int]) -> tuple[Tensor, Tensor]:
    count = sum(
        frames * (rows * columns - (rows + 1) // 2 * ((columns + 1) // 2))
        for frames, rows, columns, merges in _images(images)
        if merges
    )
    redundancy = features.new_empty(len(features), count, dtype=precise_dtype(features))
    return redundancy, torch.empty_like(redundancy, dtype=torch.int64)


@torch.library.custom_op("turbovlm::choose_on_grids", mutates_args=())
def choose_operator(
    features: Tensor,
    redundancy: Tensor,
    nearest: Tensor,
    semantic: Tensor | None,
    images: list[int],
    gone: int,
    block: int,
    degree: str,
    alpha: float | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """`choose`, of images laid open."""
    rules = Rules(degree, alpha, seed, "spatial", "merge")
    src, dst = choose(features, redundancy, nearest, semantic, _images(images), gone, path_for(features), block, rules)
    return src.clone(), dst.clone()  # an operator's results are no views


@choose_operator.register_fake
def _(
    features: Tensor,
    redundancy: Tensor,
    nearest: Tensor,
    semantic: Tensor | None,
    images: list[int],
    gone: int,
    *others: object,
) -> tuple[Tensor, Tensor]:
    src = features.new_empty(len(features), gone, dtype=torch.int64)
    return src, torch.empty_like(src)


def _partitions(features: Tensor, images: Sequence[Image]) -> Iterator[Partition]:
    """Candidates and destinations of each image that merges, as places in the sequence."""
    start, tokens = 0, features.shape[1]
    for frames, rows, columns, merges in images:
        count = frames * rows * columns
        if merges:
            suffix = tokens - start - count
            partition = partition_tokens(
                tokens, start, "grid", suffix=suffix, grid=(frames, rows, columns), device=features.device
            )
            band = BAND if frames == 1 else max(BAND, 2 * rows * columns)
            yield replace(partition, windows=max(1, count // band))
        start += count


def _joined(parts: Sequence[Partition], device: torch.device) -> Partition:
    """One partition of all images, for what no longer looks at windows."""
    if len(parts) == 1:
        return parts[0]
    candidates, destinations = (
        torch.cat([positions(index, device) for index in indices])
        for indices in zip(*((part.candidates, part.destinations) for part in parts))
    )
    return Partition(candidates, destinations)


def _flat(images: Sequence[Image]) -> list[int]:
    return [int(number) for image in images for number in image]


def _images(flat: Sequence[int]) -> list[Image]:
    return [(flat[i], flat[i + 1], flat[i + 2], bool(flat[i + 3])) for i in range(0, len(flat), 4)]
