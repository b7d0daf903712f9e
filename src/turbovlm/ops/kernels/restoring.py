"""Every position gets its token's result back: one launch by copies, two by linear regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.ops.kernels.common import HAS_TRITON, called, jit, operator
from turbovlm.ops.kernels.replay import empty
from turbovlm.ops.kernels.similarity import candidates_at_a_time

if HAS_TRITON:
    import triton
    import triton.language as tl


@operator
def restore(x: Tensor, merged: Tensor, out: Tensor, rows: Tensor, update: bool, samples: int, ridge: float) -> Tensor:
    """`turbovlm.ops.restoring.restore`; not differentiable.

    Args:
        x: `[batch, N, width]`, float32, float16 or bfloat16, with any strides.
        merged: `[batch, M, width]`; out: `[batch, M, out_width]`, with `update` of the same width; likewise.
        rows: `Merge.rows`, `[batch · N]`, int64.
        update, samples: as there; at most 64 samples.
        ridge: `turbovlm.ops.restoring.RIDGE`.

    Returns:
        `[batch, N, out_width]`, added up in float32 and rounded once.
    """
    restored = _restored(x, merged, out, rows, update, samples, ridge)
    batch, tokens, width = x.shape
    left, out_width = out.shape[1:]
    across = weights = None
    block_s = max(triton.next_power_of_2(samples), 16)
    with torch.cuda.device(x.get_device()):
        if samples:
            across = empty(x, batch, samples, width, dtype=torch.float32)
            weights = empty(x, batch, samples, out_width, dtype=torch.float32)
            _linear_maps[(batch,)](
                *(merged, *merged.stride(), out, *out.stride(), across, weights),
                *(samples, left // samples, width, out_width, ridge * samples / width, samples**-0.5),
                UPDATE=update,
                BLOCK_S=block_s,
                BLOCK_W=32,
                num_warps=4,
            )
        block = candidates_at_a_time(batch, tokens)
        _restore[(batch * triton.cdiv(tokens, block),)](
            *(x, *x.stride(), merged, *merged.stride(), out, *out.stride(), rows, across, weights, restored),
            *(tokens, left, samples, width, out_width),
            UPDATE=update,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            BLOCK_N=block,
            BLOCK_S=block_s,
            BLOCK_W=128 // x.element_size(),
            num_warps=4,
        )
    return restored


def _restored(x: Tensor, merged: Tensor, out: Tensor, rows: Tensor, update: bool, *others: Any) -> Tensor:
    dtype = torch.promote_types(x.dtype, out.dtype) if update else out.dtype
    return empty(x, *x.shape[:2], out.shape[2], dtype=dtype)


restore.operator.register_fake(_restored)


@jit
def _linear_maps(
    merged: tl.tensor, merged_image: tl.tensor, merged_token: tl.tensor, merged_channel: tl.tensor,
    out: tl.tensor, out_image: tl.tensor, out_token: tl.tensor, out_channel: tl.tensor,
    across: tl.tensor, weights: tl.tensor,
    samples: tl.tensor, every: tl.tensor, width: tl.tensor, out_width: tl.tensor,
    ridge: tl.tensor, shorter: tl.tensor,
    UPDATE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
) -> None:  # fmt: skip
    """One program per image: both factors of `linear_map`'s W, `[batch, samples, …]` each.

    The samples' products first, in blocks of channels; then their inverse, by elimination in registers.
    """
    image = tl.program_id(0).to(tl.int64)
    sample = tl.arange(0, BLOCK_S)
    there = sample < samples
    token = sample.to(tl.int64) * every
    merged += image * merged_image
    out += image * out_image
    across += image * samples * width
    weights += image * samples * out_width

    products = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
    for first in range(0, width, BLOCK_W):
        channel = first + tl.arange(0, BLOCK_W)
        inside = there[:, None] & (channel < width)[None, :]
        z = tl.load(merged + token[:, None] * merged_token + channel[None, :] * merged_channel, mask=inside, other=0.0)
        z = _centred(z.to(tl.float32), inside, samples)
        products = tl.dot(z, tl.trans(z), products, input_precision="ieee")
    same = sample[:, None] == sample[None, :]
    trace = tl.sum(tl.sum(tl.where(same, products, 0.0), axis=1), axis=0)
    length = tl.maximum(tl.sqrt(trace), 1e-12) * shorter
    inverse = products / (length * length) + tl.where(same, ridge, 0.0)
    for k in range(BLOCK_S):
        in_row, in_column = (sample == k)[:, None], (sample == k)[None, :]
        row = tl.sum(tl.where(in_row, inverse, 0.0), axis=0)
        column = tl.sum(tl.where(in_column, inverse, 0.0), axis=1)
        pivot = tl.sum(tl.where(sample == k, column, 0.0), axis=0)
        reduced = inverse - column[:, None] * row[None, :] / pivot
        reduced = tl.where(in_row, row[None, :] / pivot, reduced)
        reduced = tl.where(in_column, -column[:, None] / pivot, reduced)
        inverse = tl.where(in_row & in_column, 1.0 / pivot, reduced)

    for first in range(0, width, BLOCK_W):
        channel = first + tl.arange(0, BLOCK_W)
        inside = there[:, None] & (channel < width)[None, :]
        z = tl.load(merged + token[:, None] * merged_token + channel[None, :] * merged_channel, mask=inside, other=0.0)
        z = _centred(z.to(tl.float32), inside, samples) / length
        tl.store(across + sample[:, None] * width + channel[None, :], z, mask=inside)
    for first in range(0, out_width, BLOCK_W):
        channel = first + tl.arange(0, BLOCK_W)
        inside = there[:, None] & (channel < out_width)[None, :]
        y = tl.load(out + token[:, None] * out_token + channel[None, :] * out_channel, mask=inside, other=0.0)
        y = y.to(tl.float32)
        if UPDATE:
            place = merged + token[:, None] * merged_token + channel[None, :] * merged_channel
            y -= tl.load(place, mask=inside, other=0.0).to(tl.float32)
        y = _centred(y, inside, samples) / length
        y = tl.dot(inverse, y, input_precision="ieee")
        tl.store(weights + sample[:, None] * out_width + channel[None, :], y, mask=inside)


@called
def _centred(values: tl.tensor, inside: tl.tensor, samples: tl.tensor) -> tl.tensor:
    """Without their mean over samples, `[samples, channels]`; 0 outside."""
    return tl.where(inside, values - (tl.sum(values, axis=0) / samples)[None, :], 0.0)


@jit
def _restore(
    x: tl.tensor, x_image: tl.tensor, x_token: tl.tensor, x_channel: tl.tensor,
    merged: tl.tensor, merged_image: tl.tensor, merged_token: tl.tensor, merged_channel: tl.tensor,
    out: tl.tensor, out_image: tl.tensor, out_token: tl.tensor, out_channel: tl.tensor,
    rows: tl.tensor, across: tl.tensor, weights: tl.tensor, restored: tl.tensor,
    tokens: tl.tensor, left: tl.tensor, samples: tl.tensor, width: tl.tensor, out_width: tl.tensor,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
) -> None:  # fmt: skip
    """One program per `BLOCK_N` positions of an image, whose channels come in blocks."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    there = place < tokens
    row = tl.load(rows + image * tokens + place, mask=there, other=0) - image * left
    x += image * x_image + place.to(tl.int64)[:, None] * x_token
    merged += image * merged_image + row[:, None] * merged_token
    out += image * out_image + row[:, None] * out_token
    restored += (image * tokens + place)[:, None] * out_width

    if across is not None:
        sample = tl.arange(0, BLOCK_S)
        across += image * samples * width
        weights += image * samples * out_width
        along = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
        for first in range(0, width, BLOCK_W):
            channel = first + tl.arange(0, BLOCK_W)
            inside = there[:, None] & (channel < width)[None, :]
            apart = tl.load(x + channel[None, :] * x_channel, mask=inside, other=0.0).to(tl.float32)
            apart -= tl.load(merged + channel[None, :] * merged_channel, mask=inside, other=0.0).to(tl.float32)
            seen = (sample < samples)[:, None] & (channel < width)[None, :]
            z = tl.load(across + sample[:, None] * width + channel[None, :], mask=seen, other=0.0)
            along = tl.dot(apart, tl.trans(z), along, input_precision=PRECISION)
    for first in range(0, out_width, BLOCK_W):
        channel = first + tl.arange(0, BLOCK_W)
        inside = there[:, None] & (channel < out_width)[None, :]
        y = tl.load(out + channel[None, :] * out_channel, mask=inside, other=0.0).to(tl.float32)
        if UPDATE:
            apart = tl.load(x + channel[None, :] * x_channel, mask=inside, other=0.0).to(tl.float32)
            apart -= tl.load(merged + channel[None, :] * merged_channel, mask=inside, other=0.0).to(tl.float32)
            y += apart
        if across is not None:
            seen = (sample < samples)[:, None] & (channel < out_width)[None, :]
            weight = tl.load(weights + sample[:, None] * out_width + channel[None, :], mask=seen, other=0.0)
            y = tl.dot(along, weight, y, input_precision=PRECISION)
        tl.store(restored + channel[None, :], y.to(restored.dtype.element_ty), mask=inside)
