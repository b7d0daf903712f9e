"""The most similar destination of every candidate: the similarity of all pairs is never in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from turbovlm.ops.kernels.common import HAS_TRITON, by_image, interpreted, jit, operator

if HAS_TRITON:
    import triton
    import triton.language as tl


@operator
def most_similar(features: Tensor, candidates: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Each candidate's most similar destination other than itself; the similarity of all pairs is never in memory.

    Args:
        features: `[batch, tokens, width]`, float32, float16 or bfloat16, with any strides; not differentiated.
        candidates: token positions, `[C]` or `[batch, C]`, int64.
        destinations: token positions, `[P]` or `[batch, P]`, int64, P ≥ 1.

    Returns:
        The largest cosine, `[batch, C]`, float32, and its index among the destinations (the lowest of equals),
        `[batch, C]`, int64.
    """
    outputs = _most_similar_outputs(features, candidates, destinations)
    batch, _, width = features.shape
    count, block = candidates.shape[-1], 64
    lengths = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)
    with torch.cuda.device(features.get_device()):
        _most_similar[(batch * triton.cdiv(count, block),)](
            *(features, *features.stride(), lengths, lengths.stride(0)),
            *by_image(candidates, batch),
            *by_image(destinations, batch),
            *outputs,
            *(count, destinations.shape[-1], width),
            WIDENED=interpreted(features),
            BLOCK_C=block,
            BLOCK_P=128,
            BLOCK_W=128 // features.element_size(),
            num_warps=4,
            num_stages=3,
        )
    return outputs


def _most_similar_outputs(features: Tensor, candidates: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    shape = features.shape[0], candidates.shape[-1]
    return features.new_empty(shape, dtype=torch.float32), candidates.new_empty(shape)


most_similar.operator.register_fake(_most_similar_outputs)


@jit
def _most_similar(
    features: tl.tensor, image_stride: tl.tensor, token_stride: tl.tensor, channel_stride: tl.tensor,
    lengths: tl.tensor, lengths_stride: tl.tensor,
    candidates: tl.tensor, candidates_stride: tl.tensor, destinations: tl.tensor, destinations_stride: tl.tensor,
    redundancy: tl.tensor, nearest: tl.tensor,
    candidate_count: tl.tensor, destination_count: tl.tensor, width: tl.tensor,
    WIDENED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
) -> None:  # fmt: skip
    """One program per `BLOCK_C` candidates of an image; destinations and width come in blocks.

    Products of float32 are exact to float32, those of half precision exact, and both add up in float32.
    """
    blocks = tl.cdiv(candidate_count, BLOCK_C)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = row < candidate_count
    candidate = tl.load(candidates + image * candidates_stride + row, mask=in_rows, other=0)
    features += image * image_stride
    lengths += image * lengths_stride
    length = tl.maximum(tl.load(lengths + candidate, mask=in_rows, other=1.0), 1e-12)

    best = tl.full([BLOCK_C], float("-inf"), tl.float32)
    best_column = tl.zeros([BLOCK_C], tl.int32)
    for first in range(0, destination_count, BLOCK_P):
        column = first + tl.arange(0, BLOCK_P)
        in_columns = column < destination_count
        other = tl.load(destinations + image * destinations_stride + column, mask=in_columns, other=0)
        other_length = tl.maximum(tl.load(lengths + other, mask=in_columns, other=1.0), 1e-12)
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
        cosines = dots / length[:, None] / other_length[None, :]
        allowed = in_columns[None, :] & (other[None, :] != candidate[:, None])
        cosines = tl.where(allowed, cosines, float("-inf"))
        highest, where = tl.max(cosines, axis=1, return_indices=True)
        better = highest > best
        best = tl.where(better, highest, best)
        best_column = tl.where(better, first + where, best_column)

    out = image * candidate_count + row
    tl.store(redundancy + out, tl.maximum(best, -1.0), mask=in_rows)
    tl.store(nearest + out, best_column.to(tl.int64), mask=in_rows)
