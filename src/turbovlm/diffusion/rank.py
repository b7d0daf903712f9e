"""Which tokens of the images of a sequence go, and where: each image is compared and ranked by itself.

In a compiled denoiser the numbers of tokens are symbols, as soon as it has met a second size. Laid open, what is here
has them in branches and loops, which are true of one size alone, and a graph would be compiled for every size. So
compilers are given operators that they do not look into: a denoiser keeps to the graphs that it has without merging.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from turbovlm.ops.averaging import precise_dtype
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.merging import mutual_redundancy
from turbovlm.ops.partition import Partition, partition_tokens
from turbovlm.ops.plain import Chosen
from turbovlm.ops.tracing import is_exporting
from turbovlm.ops.whole import Rules

BAND = 4096
"""Larger images are cut into bands of about as many tokens, from top to bottom, and merged within them: to compare all
tokens with all would cost their square. A video's bands have two frames at least, so that what stands still can
merge."""

Image = tuple[int, int, int, int]
"""Frames, rows and columns of an image, and how many of its tokens are left."""


def compare(features: Tensor, images: Sequence[Image], path: ModuleType) -> tuple[Tensor, Tensor]:
    """R of the candidates of the images that merge, one image behind the other, and its argument.

    Args:
        features: `[batch, tokens, width]`.
        images: those of the sequence, in its order; at least one merges.
        path: from `path_for`.

    Returns:
        R in float32 or better, and the index among the destinations of the same image, int64, `[batch, candidates]`
        each.
    """
    if torch.compiler.is_compiling() and not is_exporting():
        compared: tuple[Tensor, Tensor] = compare_operator(features, _flat(images))
        return compared
    found = [mutual_redundancy(features, each, path=path) for each, _ in _merging(features, images)]
    return found[0] if len(found) == 1 else _beside(found)


def choose(
    features: Tensor,
    redundancy: Tensor,
    nearest: Tensor,
    semantic: Tensor | None,
    images: Sequence[Image],
    path: ModuleType,
    block: int,
    rules: Rules,
) -> Chosen:
    """The tokens that go, those of highest degree of each image, and the destination of each: places in the sequence.

    Args:
        features, images, path: as in `compare`; redundancy, nearest: what it gave.
        semantic: A of every token, `[batch, tokens]`; None where the degree does not need it.
        block: index of the group of blocks, from 0.
        rules: degree, alpha and seed.

    Returns:
        `[batch, gone]` each, int64.
    """
    if torch.compiler.is_compiling() and not is_exporting() and isinstance(rules.degree, str):
        chosen: Chosen = choose_operator(features, redundancy, nearest, semantic, _flat(images), block, *rules[:3])
        return chosen
    found, start = [], 0
    for partition, gone in _merging(features, images):
        some = slice(start, start := start + partition.count())
        r, j = redundancy[:, some], nearest[:, some]
        _, e, pair = path.rank(
            *(r, j, semantic, partition, block),
            degree=rules.degree,
            alpha=rules.alpha,
            seed=rules.seed,
            padding=None,
            r=gone,
        )
        found.append(path.choose(e, j, partition, gone) if pair is None else pair)
    return found[0] if len(found) == 1 else _beside(found)


@torch.library.custom_op("turbovlm::compare_on_grids", mutates_args=())
def compare_operator(features: Tensor, images: list[int]) -> tuple[Tensor, Tensor]:
    """`compare`, of images laid open."""
    return compare(features, _images(images), path_for(features))


@compare_operator.register_fake
def _(features: Tensor, images: list[int]) -> tuple[Tensor, Tensor]:
    count = sum(frames * (rows * columns - _cells(rows, columns)) for frames, rows, columns, _ in _smaller(images))
    redundancy = features.new_empty(len(features), count, dtype=precise_dtype(features))
    return redundancy, torch.empty_like(redundancy, dtype=torch.int64)


@torch.library.custom_op("turbovlm::choose_on_grids", mutates_args=())
def choose_operator(
    features: Tensor,
    redundancy: Tensor,
    nearest: Tensor,
    semantic: Tensor | None,
    images: list[int],
    block: int,
    degree: str,
    alpha: float | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """`choose`, of images laid open."""
    rules = Rules(degree, alpha, seed, "spatial", "merge")
    src, dst = choose(features, redundancy, nearest, semantic, _images(images), path_for(features), block, rules)
    return src.clone(), dst.clone()  # an operator's results are no views


@choose_operator.register_fake
def _(
    features: Tensor, redundancy: Tensor, nearest: Tensor, semantic: Tensor | None, images: list[int], *rules: object
) -> tuple[Tensor, Tensor]:
    gone = sum(frames * rows * columns - left for frames, rows, columns, left in _smaller(images))
    src = features.new_empty(len(features), gone, dtype=torch.int64)
    return src, torch.empty_like(src)


def _merging(features: Tensor, images: Sequence[Image]) -> Iterator[tuple[Partition, int]]:
    """Candidates and destinations of each image that merges, as places in the sequence, and how many go."""
    start, tokens = 0, features.shape[1]
    for frames, rows, columns, left in images:
        count = frames * rows * columns
        if left < count:
            suffix = tokens - start - count
            partition = partition_tokens(
                tokens, start, "grid", suffix=suffix, grid=(frames, rows, columns), device=features.device
            )
            band = BAND if frames == 1 else max(BAND, 2 * rows * columns)
            yield replace(partition, windows=max(1, count // band)), count - left
        start += count


def _beside(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = (torch.cat(each, dim=1) for each in zip(*found))
    return first, second


def _flat(images: Sequence[Image]) -> list[int]:
    return [number for image in images for number in image]


def _images(flat: Sequence[int]) -> list[Image]:
    return [(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]) for i in range(0, len(flat), 4)]


def _smaller(flat: Sequence[int]) -> list[Image]:
    """The images that merge."""
    return [image for image in _images(flat) if image[3] < image[0] * image[1] * image[2]]


def _cells(rows: int, columns: int) -> int:
    """2×2 cells, also those that are cut off, each of which has a destination."""
    return (rows + 1) // 2 * ((columns + 1) // 2)
