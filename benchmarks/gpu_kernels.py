"""The kernels of a merge on a GPU: what each step takes beside plain operators, and whether it computes the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from cases import CASES, DTYPES, build, images
from gpu_attention import CUDA_ROUTES, ROUTES, heads, masked_attention
from gpu_encoders import captured
from gpu_part import NOT_ON_CPU, Bench, Cell, Cells, Part, attempt, last, part, timed
from torch import Tensor

import turbovlm
from turbovlm import TurboConfig
from turbovlm.ops import (
    Partition,
    merge_ranked,
    partition_tokens,
    plain,
    rank_candidates,
    size_bias,
)
from turbovlm.ops.dispatch import path_for
from turbovlm.ops.kernels import replay
from turbovlm.ops.partition import Split
from turbovlm.ops.plain import Chosen
from turbovlm.ops.whole import Guide, Rules, merge_whole

Step = Callable[[ModuleType], Any]
"""What runs on a path: `turbovlm.ops.fused` or `plain`."""


@dataclass(frozen=True)
class Shape:
    """Tokens of a batch of images, and how many of them merge."""

    batch: int
    length: int
    heads: int
    width: int
    r: int


SHAPES = {
    "ViT-L/16-384": Shape(64, 577, 16, 64, 64),
    "SigLIP-so400m/14-384": Shape(64, 729, 16, 72, 72),
    "EVA-g/14-448": Shape(64, 1025, 16, 88, 107),
    "DINOv2-L/14-518": Shape(64, 1370, 16, 64, 160),
}
"""All that the case's r merges, in six blocks, as in the default setting."""
SMALL_SHAPES = {"small": Shape(2, 65, 3, 64, 8)}
KINDS = {"all": "any two patches", "random": "random halves", "alternate": "even into odd"}
STEPS = ("attention row", "similarity", "degree and choice", "merge", "whole merge")


def kernel_parts(dtype: str, small: bool) -> list[Part]:
    """One part for each shape."""
    return [
        part(
            f"kernels/{dtype}/{name.replace('/', '-')}",
            [f"{kind}/{step}" for kind in KINDS for step in STEPS],
            functools.partial(_measure_steps, dtype=dtype, shape=shape),
        )
        for name, shape in (SMALL_SHAPES if small else SHAPES).items()
    ]


def _measure_steps(bench: Bench, keys: Sequence[str], *, dtype: str, shape: Shape) -> Cells:
    @functools.lru_cache(maxsize=1)
    def run(kind: str) -> dict[str, Step]:
        made = heads(shape.batch, shape.length, width=shape.width, dtype=dtype, device=bench.device, count=shape.heads)
        return steps(*made, kind, shape.r)

    def cell(kind: str, step: str) -> Cell:
        own = path_for(torch.empty(0, dtype=DTYPES[dtype], device=bench.device))
        return timed(bench, functools.partial(run(kind)[step], plain), functools.partial(run(kind)[step], own))

    for key in keys:
        yield key, attempt(functools.partial(cell, *key.split("/")[-2:]))


def steps(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, kind: str, r: int) -> dict[str, Step]:
    """The steps of a merge as the default setting runs them, each on inputs that are there already."""
    features, x = k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2).contiguous()
    bias, split = size_bias(sizes, k.dtype), partition_tokens(k.shape[2], 1, kind, device=k.device)
    semantic, squares = path_for(q).attention_rows(q, k, bias)
    ranking = rank_candidates(features, split, semantic, degree="weighted_distance", squares=squares, r=r)
    guide = Guide(q, k, None, bias[:, :1], None, (0, 1), q.shape[-1] ** -0.5, of_features=True)
    whole, rules = Split(kind, prefix=1), Rules("weighted_distance", None, 0, "spatial", "keep_norm")
    return {
        "attention row": lambda path: path.attention_rows(q, k, bias),
        "similarity": lambda path: path.most_similar(features, split, None, squares),
        "degree and choice": lambda path: _choose(ranking.redundancy, ranking.nearest, semantic, split, r, path),
        "merge": lambda path: merge_ranked(ranking, r, x, sizes=sizes, order="spatial", reduce="keep_norm", path=path),
        "whole merge": lambda path: merge_whole(path, x, features, guide, sizes, whole, None, rules, r=r, index=0),
    }


def _choose(
    redundancy: Tensor, nearest: Tensor, semantic: Tensor, split: Partition, r: int, path: ModuleType
) -> object:
    how = {"degree": "weighted_distance", "alpha": None, "seed": 0, "padding": None}
    return path.rank(redundancy, nearest, semantic, split, 0, r=r, **how)


def check_parts(dtype: str, small: bool) -> list[Part]:
    """One part: is everything right, within rounding?"""
    return [part(f"checks/{dtype}", [*CHECKS], functools.partial(_measure_checks, dtype=dtype))]


def _measure_checks(bench: Bench, keys: Sequence[str], *, dtype: str) -> Cells:
    for key in keys:
        if bench.device == "cpu" and last(key) in ON_CUDA:
            yield key, NOT_ON_CPU
            continue
        yield key, attempt(functools.partial(_difference, CHECKS[last(key)], dtype, bench.device))


def _difference(check: Check, dtype: str, device: str) -> Cell:
    found, exact = check(dtype, device)
    difference = float((found.double() - exact.double()).abs().max())
    # one unit in the last place of the largest value, or of 1; 16 where float32 was added up in another order
    units = 16 if found.dtype == torch.float32 else 1
    limit = max(float(exact.abs().max()), 1.0) * torch.finfo(found.dtype).eps * units
    if not difference <= limit:
        raise ArithmeticError(f"differs by {difference:.2g}, more than rounding, {limit:.2g}")
    return {"difference": difference, "limit": limit}


Check = Callable[[str, str], tuple[Tensor, Tensor]]
"""What is found in a dtype on a device, and what should be."""


def _route(name: str) -> Check:
    def check(dtype: str, device: str) -> tuple[Tensor, Tensor]:
        q, k, v, sizes = heads(2, 145, width=64, dtype=dtype, device=device, count=4)
        bias, scale = size_bias(sizes, q.dtype), q.shape[-1] ** -0.5
        exact = masked_attention(q.double(), k.double(), v.double(), bias.double(), scale)
        return ROUTES[name](q, k, v, bias, scale), exact

    return check


def _step(kind: str, name: str) -> Check:
    """R, E or the merged tokens, on the device's own path and on the plain one."""

    def check(dtype: str, device: str) -> tuple[Tensor, Tensor]:
        tensors = heads(2, 145, width=64, dtype=dtype, device=device, count=4)
        run = steps(*tensors, kind, 40)[name]
        results = [run(path) for path in (path_for(tensors[0]), plain)]
        if name == "similarity":
            return results[0][0], results[1][0]
        if name in ("merge", "whole merge"):
            (merge, found), (plain_merge, exact) = results
            alike = torch.equal(merge.rows, plain_merge.rows)
        else:
            (_, found, chosen), (_, exact, plain_chosen) = results
            alike = _pairs(chosen) == _pairs(plain_chosen)
        if not alike:
            raise ArithmeticError("other tokens merge than on the plain path")
        return found, exact

    return check


def _pairs(chosen: Chosen) -> list[set[tuple[int, int]]]:
    """For each image, which tokens go where."""
    return [{*zip(src, dst)} for src, dst in zip(*(each.tolist() for each in chosen))]


def _graph(dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """An encoder captured in a CUDA graph and replayed on other images, beside the same in eager mode."""
    case = CASES["vit-b-384"]
    model = build(case, DTYPES[dtype], device)
    first, second = images(case, 4, DTYPES[dtype], device).chunk(2)
    with turbovlm.apply(model, TurboConfig(flops=0.6)), torch.inference_mode():
        static = first.clone()
        replay, out = captured(lambda: model(static))
        static.copy_(second)
        replay()
        return out, model(second)


def _repeated(dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """An encoder whose merges repeat launches that were recorded on other images, beside one that records anew."""
    case = CASES["vit-b-384"]
    model = build(case, DTYPES[dtype], device)
    first, second = images(case, 4, DTYPES[dtype], device).chunk(2)
    with turbovlm.apply(model, TurboConfig(flops=0.6)), torch.inference_mode():
        model(first)
        out = model(second)
        replay._REPLAYS.clear()
        return out, model(second)


def _checks() -> Iterator[tuple[str, Check]]:
    for route in ROUTES:
        yield f"attention, {route}", _route(route)
    for kind, words in KINDS.items():
        for step in STEPS[1:]:
            yield f"{step}, {words}", _step(kind, step)
    yield "CUDA graph", _graph
    yield "repeated launches", _repeated


CHECKS = dict(_checks())
ON_CUDA = ("CUDA graph", "repeated launches", *(f"attention, {route}" for route in CUDA_ROUTES))
