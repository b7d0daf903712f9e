"""The merge and its books (where each token went, shares and sizes), in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turbovlm.ops.kernels.common import HAS_TRITON, by_image, jit, operator
from turbovlm.ops.kernels.replay import empty
from turbovlm.ops.plain import LOG_0

if HAS_TRITON:
    import triton
    import triton.language as tl


@operator
def merge_tokens(
    x: Tensor, sizes: Tensor | None, src: Tensor, dst: Tensor, slots: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Merge r of N tokens into others of their image; differentiable in `x`, but for `"keep_norm"`.

    Args:
        x: `[batch, N, width]`, float32, float16 or bfloat16, with any strides.
        sizes: patches each token stands for, `[batch, N]`, float32; ones if None.
        src: the source tokens, which lose their place, distinct, `[batch, r]`, int64.
        dst: the destination that each goes into, never itself one of `src`, `[batch, r]`, int64.
        slots: where each token would lie if none disappeared, `[N]` or `[batch, N]`, int64; where it lies now if None.
        reduce: `"merge"`; `"keep_norm"`: as long as the parts are on average; `"prune"`: the destination keeps its own
            value and size.

    Returns:
        The averages by size, `[batch, N − r, width]`, rounded once to `x`'s dtype; for each of the N, the row of the
        `batch · (N − r)` that it became part of, `[batch · N]`, int64, and its share in it, `[batch, N]`, float32; and
        patches that each token left stands for, and the logarithm of that, `LOG_0` for none, `[batch, N − r]`, float32.
    """
    outputs = _merge_tokens_outputs(x, sizes, src, dst, slots, reduce)
    batch, tokens, width = x.shape
    block = triton.next_power_of_2(width)
    with torch.cuda.device(x.get_device()):
        _merge_tokens[(batch * tokens,)](
            *(x, *x.stride()),
            *(None if sizes is None else sizes.contiguous(), src.contiguous(), dst.contiguous()),
            *by_image(slots, batch),
            *outputs,
            *(tokens, src.shape[1], width),
            REDUCE=reduce,
            LOG_0=LOG_0,
            BLOCK_R=32,
            BLOCK_W=block,
            num_warps=min(max(block // 1024, 1), 8),
        )
    return outputs


@operator
def mean_of_bags(x: Tensor, bag: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of a batch's tokens; not differentiable.

    Args:
        x: `[batch, N, width]`, float32, float16 or bfloat16, with any strides.
        bag: rows of the `batch · N`, `[batch · N]`, int64: those of the first sum, then of the second, and so on.
        starts: where each sum begins in `bag`, `[batch · M]`, int64.
        weights: of each entry of `bag`, float32.

    Returns:
        `[batch, M, width]`, added up in float32 and rounded once to `x`'s dtype.
    """
    out: Tensor = _bags_output(x, bag, starts, weights)
    block = triton.next_power_of_2(x.shape[2])
    with torch.cuda.device(x.get_device()):
        _mean_of_bags[(len(starts),)](
            *(x, *x.stride(), bag, starts, weights, out),
            *(x.shape[1], len(bag), x.shape[2]),
            BLOCK_W=block,
            num_warps=min(max(block // 1024, 1), 8),
        )
    return out


def _bags_output(x: Tensor, bag: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    return empty(x, x.shape[0], len(starts) // x.shape[0], x.shape[2])


mean_of_bags.operator.register_fake(_bags_output)


def _merge_tokens_outputs(
    x: Tensor, sizes: Tensor | None, src: Tensor, dst: Tensor, slots: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, width = x.shape
    left = tokens - src.shape[1]
    weights, merged_sizes, logs = (empty(x, batch, each, dtype=torch.float32) for each in (tokens, left, left))
    return empty(x, batch, left, width), empty(src, batch * tokens), weights, merged_sizes, logs


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if inputs[-1] == "keep_norm":
        raise NotImplementedError("merge_tokens keeps nothing to differentiate keep_norm by: use Merge.merge")
    _, rows, weights, merged_sizes, logs = output
    ctx.mark_non_differentiable(weights, merged_sizes, logs)
    ctx.save_for_backward(rows, weights)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, weights = ctx.saved_tensors
    gathered = grad.flatten(0, 1).index_select(0, rows).view(*weights.shape, grad.shape[-1])
    return (gathered * weights.unsqueeze(-1)).to(grad.dtype), None, None, None, None, None


merge_tokens.operator.register_fake(_merge_tokens_outputs)
merge_tokens.operator.register_autograd(_backward, setup_context=_keep_for_backward)


@jit
def _merge_tokens(
    x: tl.tensor, image_stride: tl.tensor, token_stride: tl.tensor, channel_stride: tl.tensor,
    sizes: tl.tensor, src: tl.tensor, dst: tl.tensor, slots: tl.tensor, slots_stride: tl.tensor,
    y: tl.tensor, rows: tl.tensor, weights: tl.tensor, merged_sizes: tl.tensor, logs: tl.tensor,
    tokens: tl.tensor, src_count: tl.tensor, width: tl.tensor,
    REDUCE: tl.constexpr, LOG_0: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
) -> None:  # fmt: skip
    """One program per token: it finds its place, and if it stays, it adds up those that join it."""
    image = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    x += image * image_stride
    src += image * src_count
    dst += image * src_count
    if sizes is not None:
        sizes += image * tokens
    if slots is not None:
        slots += image * slots_stride

    channel = tl.arange(0, BLOCK_W)
    in_width = channel < width
    channels = x + channel.to(tl.int64) * channel_stride
    loaded = tl.load(channels + token * token_stride, mask=in_width, other=0.0)  # before it is known to be needed

    target = token
    for first in range(0, src_count, BLOCK_R):
        j = first + tl.arange(0, BLOCK_R)
        found = tl.load(src + j, mask=j < src_count, other=-1) == token
        target += tl.sum(tl.where(found, tl.load(dst + j, mask=found, other=0) - token, 0))

    slot = target if slots is None else tl.load(slots + target)
    position = slot
    total = 1.0 if sizes is None else tl.load(sizes + target)
    for first in range(0, src_count, BLOCK_R):
        j = first + tl.arange(0, BLOCK_R)
        valid = j < src_count
        source = tl.load(src + j, mask=valid, other=0)
        left = source if slots is None else tl.load(slots + source, mask=valid, other=0)
        position -= tl.sum((valid & (left < slot)).to(tl.int64))
        if REDUCE != "prune":
            joins = tl.load(dst + j, mask=valid, other=-1) == target
            size = 1.0 if sizes is None else tl.load(sizes + source, mask=joins, other=0.0)
            total += tl.sum(tl.where(joins, size, 0.0))

    own = 1.0 if sizes is None else tl.load(sizes + token)
    weight = (target == token).to(tl.float32) if REDUCE == "prune" else own / tl.maximum(total, 1e-6)
    out = image * (tokens - src_count) + position
    tl.store(rows + tl.program_id(0), out)
    tl.store(weights + tl.program_id(0), weight)
    if target == token:
        tl.store(merged_sizes + out, total)
        tl.store(logs + out, tl.where(total > 0, tl.log(tl.maximum(total, 1e-30)), LOG_0))
        own_row = loaded.to(tl.float32)
        mean = weight * own_row
        if REDUCE != "prune":
            length = weight * tl.sqrt(tl.sum(own_row * own_row))
            joined_by = 0
            for first in range(0, src_count, BLOCK_R):
                j = first + tl.arange(0, BLOCK_R)
                joins = tl.load(dst + j, mask=j < src_count, other=-1) == token
                source = tl.load(src + j, mask=joins, other=0)
                rank = tl.cumsum(joins.to(tl.int32), axis=0)
                count = tl.sum(joins.to(tl.int32))
                joined_by += count
                for done in range(count):
                    row = tl.sum(tl.where(joins & (rank == done + 1), source, 0))
                    size = 1.0 if sizes is None else tl.load(sizes + row)
                    share = size / tl.maximum(total, 1e-6)
                    joined = tl.load(channels + row * token_stride, mask=in_width, other=0.0).to(tl.float32)
                    mean += share * joined
                    length += share * tl.sqrt(tl.sum(joined * joined))
            if REDUCE == "keep_norm":
                found = tl.sqrt(tl.sum(mean * mean))
                if (joined_by > 0) & (found > 1e-12):
                    mean *= length / found
        tl.store(y + out * width + channel, mean.to(y.dtype.element_ty), mask=in_width)


@jit
def _mean_of_bags(
    x: tl.tensor, image_stride: tl.tensor, token_stride: tl.tensor, channel_stride: tl.tensor,
    bag: tl.tensor, starts: tl.tensor, weights: tl.tensor, out: tl.tensor,
    tokens: tl.tensor, entries: tl.tensor, width: tl.tensor, BLOCK_W: tl.constexpr,
) -> None:  # fmt: skip
    """One program per sum."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + row)
    end = tl.load(starts + row + 1, mask=row + 1 < tl.num_programs(0), other=entries)
    channel = tl.arange(0, BLOCK_W)
    in_width = channel < width
    channels = x + channel.to(tl.int64) * channel_stride
    mean = tl.zeros([BLOCK_W], tl.float32)
    for entry in range(first, end):
        token = tl.load(bag + entry)
        place = channels + token // tokens * image_stride + token % tokens * token_stride
        mean += tl.load(weights + entry) * tl.load(place, mask=in_width, other=0.0).to(tl.float32)
    tl.store(out + row * width + channel, mean.to(out.dtype.element_ty), mask=in_width)
