"""The most similar destination of every candidate: the similarity of all pairs is never in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.ops.kernels.common import HAS_TRITON, interpreted, jit, operator, places
from turbovlm.ops.kernels.replay import empty

if HAS_TRITON:
    import triton
    import triton.language as tl


BUSY = 128
"""Programs that occupy a large GPU, one for each of 108 to 132 multiprocessors: a count, not timed."""


def candidates_at_a_time(windows: int, count: int) -> int:
    """How many candidates a program takes of `windows` windows of `count` each: fewer where 64 would leave GPUs idle.

    Each program reads all destinations of its window, so more programs read more.
    """
    return next((block for block in (64, 32) if windows * -(-count // block) >= BUSY), 16)


@operator
def most_similar(
    features: Tensor,
    squares: Tensor | None,
    hidden: Tensor | None,
    candidates: Tensor | None,
    destinations: Tensor | None,
    strided: list[int],
    counts: list[int],
) -> tuple[Tensor, Tensor]:
    """Each candidate's most similar destination other than itself; the similarity of all pairs is never in memory.

    Args:
        features: `[batch, tokens, width]`, float32, float16 or bfloat16, with any strides; not differentiated.
        squares: parts of each token's squared length, `[batch, parts, tokens]`, float32; measured here if None, again
            for every block of pairs.
        hidden: tokens that are nobody's destination, `[batch, tokens]`, bool; none if None.
        candidates, destinations: token positions, `[k]` or `[batch, k]`, int64; None for those of `strided`.
        strided: the first candidate, the first destination, and the step from one to the next.
        counts: C candidates, P ≥ 1 destinations, and the windows that both are divided into (`Partition.windows`).

    Returns:
        The largest cosine, `[batch, C]`, float32, −1 where there is no destination, and its index among the
        destinations (the lowest of equals), `[batch, C]`, int64.
    """
    outputs = _most_similar_outputs(features, squares, hidden, candidates, destinations, strided, counts)
    batch, tokens, width = features.shape
    count, destination_count, windows = counts
    block = candidates_at_a_time(batch * windows, -(-count // windows))
    with torch.cuda.device(features.get_device()):
        _most_similar[(batch * windows * triton.cdiv(triton.cdiv(count, windows), block),)](
            *(features, *features.stride()),
            *((None, 0) if squares is None else (squares.contiguous(), squares.shape[1])),
            *(None if hidden is None else hidden.contiguous(),),
            *places(candidates, strided[0], batch),
            *places(destinations, strided[1], batch),
            *(strided[2], *outputs),
            *(tokens, count, destination_count, windows, width),
            WIDENED=interpreted(features),
            BLOCK_C=block,
            BLOCK_P=128,
            BLOCK_W=128 // features.element_size(),
            num_warps=4,
            num_stages=3,
        )
    return outputs


def _most_similar_outputs(features: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    shape = features.shape[0], others[-1][0]
    return empty(features, *shape, dtype=torch.float32), empty(features, *shape, dtype=torch.int64)


most_similar.operator.register_fake(_most_similar_outputs)


@jit
def _most_similar(
    features: tl.tensor, image_stride: tl.tensor, token_stride: tl.tensor, channel_stride: tl.tensor,
    squares: tl.tensor, parts: tl.tensor, hidden: tl.tensor,
    candidates: tl.tensor, candidates_stride: tl.tensor, first_candidate: tl.tensor,
    destinations: tl.tensor, destinations_stride: tl.tensor, first_destination: tl.tensor,
    step: tl.tensor, redundancy: tl.tensor, nearest: tl.tensor,
    tokens: tl.tensor, candidate_count: tl.tensor, destination_count: tl.tensor, windows: tl.tensor, width: tl.tensor,
    WIDENED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
) -> None:  # fmt: skip
    """One program per `BLOCK_C` candidates of a window; its destinations, and their width, come in blocks.

    Products of float32 are exact to float32, those of half precision exact, and both add up in float32.
    """
    blocks = tl.cdiv(tl.cdiv(candidate_count, windows), BLOCK_C)
    image = (tl.program_id(0) // (windows * blocks)).to(tl.int64)
    window = tl.program_id(0) // blocks % windows
    row = candidate_count * window // windows + tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = row < candidate_count * (window + 1) // windows
    if candidates is None:
        candidate = (first_candidate + row * step).to(tl.int64)
    else:
        candidate = tl.load(candidates + image * candidates_stride + row, mask=in_rows, other=0)
    features += image * image_stride
    square = tl.zeros([BLOCK_C], tl.float32)
    if squares is not None:
        squares += image * parts * tokens
        for part in range(parts):
            square += tl.load(squares + part * tokens + candidate, mask=in_rows, other=0.0)

    best = tl.full([BLOCK_C], float("-inf"), tl.float32)
    best_column = tl.zeros([BLOCK_C], tl.int32)
    end = destination_count * (window + 1) // windows
    for first in range(destination_count * window // windows, end, BLOCK_P):
        column = first + tl.arange(0, BLOCK_P)
        in_columns = column < end
        if destinations is None:
            other = (first_destination + column * step).to(tl.int64)
        else:
            other = tl.load(destinations + image * destinations_stride + column, mask=in_columns, other=0)
        square_of_other = tl.zeros([BLOCK_P], tl.float32)
        if squares is not None:
            for part in range(parts):
                square_of_other += tl.load(squares + part * tokens + other, mask=in_columns, other=0.0)
        else:
            square = tl.zeros([BLOCK_C], tl.float32)
        dots = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for start in range(0, width, BLOCK_W):
            channel = start + tl.arange(0, BLOCK_W)
            channels = features + channel[None, :].to(tl.int64) * channel_stride
            in_width = channel[None, :] < width
            a = tl.load(channels + candidate[:, None] * token_stride, mask=in_rows[:, None] & in_width, other=0.0)
            b = tl.load(channels + other[:, None] * token_stride, mask=in_columns[:, None] & in_width, other=0.0)
            if WIDENED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
            if squares is None:
                wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
                square += tl.sum(wide_a * wide_a, axis=1)
                square_of_other += tl.sum(wide_b * wide_b, axis=1)
        length = tl.maximum(tl.sqrt(square), 1e-12)
        cosines = dots / length[:, None] / tl.maximum(tl.sqrt(square_of_other), 1e-12)[None, :]
        allowed = in_columns[None, :] & (other[None, :] != candidate[:, None])
        if hidden is not None:
            is_hidden = tl.load(hidden + image * tokens + other, mask=in_columns, other=0)
            allowed = allowed & (is_hidden == 0)[None, :]
        cosines = tl.where(allowed, cosines, float("-inf"))
        highest, where = tl.max(cosines, axis=1, return_indices=True)
        better = highest > best
        best = tl.where(better, highest, best)
        best_column = tl.where(better, first + where, best_column)

    out = image * candidate_count + row
    tl.store(redundancy + out, tl.maximum(best, -1.0), mask=in_rows)
    tl.store(nearest + out, best_column.to(tl.int64), mask=in_rows)
