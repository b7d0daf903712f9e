"""Whole encoders on a GPU: the model itself, and turbovlm in three settings and ToMe in two, each timed beside it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from cases import CASES, DTYPES, GPU_CASES, Case, build, images
from gpu_part import NOT_ON_CPU, Bench, Cell, Cells, Part, attempt, free, last, part, reason, stamp, timed
from host_time import launched, on_host
from rivals import published, with_sdpa
from torch import Tensor
from torch._inductor.utils import fresh_cache

import turbovlm
from turbovlm import TurboConfig
from turbovlm.profile.macs import macs
from turbovlm.profile.timing import peak_memory
from turbovlm.sharing import twin

Forward = Callable[[], Any]

MODEL = "model"
VERSIONS = (MODEL, "default", "paper", "redundancy", "published", "SDPA")
"""What is timed, as in the table's columns."""
MODES = ("eager", "graph", "compiled", "reduce-overhead")
BATCHES = (1, 8, 64)


def _small() -> nn.Module:
    import timm

    size = {"img_size": 96, "embed_dim": 48, "num_heads": 3, "depth": 4, "num_classes": 0}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, **size)
    return model


ENCODERS = {name: CASES[name] for name in GPU_CASES}
SMALL = {"small": Case("ViT of 4 blocks", 96, 37, 4, _small)}


@dataclass(frozen=True)
class Plan:
    """What the paper's setting does to an encoder: the share of multiply-accumulates left, its blocks, and merges."""

    share: float
    depth: int
    merges: int


@dataclass(frozen=True)
class Ready:
    """A version of the model, ready to be timed: `compile_s` seconds of compilation, `peak_bytes` of its forward."""

    forward: Forward
    macs: int
    merges: int
    peak_bytes: int | None
    compile_s: float | None


def encoder_parts(
    dtype: str, modes: Sequence[str], batches: Sequence[int], versions: Sequence[str], small: bool
) -> list[Part]:
    """One part for each encoder, mode and batch."""
    return [
        part(
            f"{name}/{dtype}/{mode}/{batch}",
            versions,
            functools.partial(_measure, case=case, dtype=dtype, mode=mode, batch=batch),
        )
        for mode in modes
        for name, case in (SMALL if small else ENCODERS).items()
        for batch in ((1, 2) if small else batches)
    ]


def _measure(bench: Bench, keys: Sequence[str], *, case: Case, dtype: str, mode: str, batch: int) -> Cells:
    if bench.device == "cpu" and mode in ("graph", "reduce-overhead"):
        yield from ((key, NOT_ON_CPU) for key in keys)
        return
    # All versions have one forward, whose compiled versions would otherwise give way to eager ones from the ninth on.
    with torch._dynamo.config.patch(recompile_limit=4 * len(VERSIONS)):
        try:
            model, plan = _built(case, dtype, bench.device)
            pixels = images(case, batch, DTYPES[dtype], bench.device)
            base = _ready(model, 0, pixels, mode)
        except Exception as error:
            failed = {"failed": f"the model itself: {reason(error)}"}
            yield from ((key, failed) for key in keys)
            return
        for key in keys:
            yield key, attempt(functools.partial(_cell, bench, last(key), case, model, plan, base, pixels, mode))
            free(bench)


@functools.lru_cache(maxsize=1)
def _built(case: Case, dtype: str, device: str) -> tuple[nn.Module, Plan]:
    """The encoder as its library makes it, and what the paper's r does to it."""
    model = build(case, DTYPES[dtype], device)
    with turbovlm.apply(model, TurboConfig.paper(case.r)) as handle:
        schedule = handle.schedules[0]
    return model, Plan(schedule.ratio, len(schedule.blocks), _merges(schedule.merged))


def _merges(merged: Sequence[int]) -> int:
    """In how many blocks."""
    return sum(count > 0 for count in merged)


def _cell(
    bench: Bench, version: str, case: Case, model: nn.Module, plan: Plan, base: Ready, pixels: Tensor, mode: str
) -> Cell:
    own = base if version == MODEL else _ready(*_prepared(version, case, model, plan), pixels, mode)
    found = {**timed(bench, base.forward, own.forward), "images": len(pixels), "blocks": plan.depth}
    found |= {"macs": own.macs, "macs_ratio": base.macs / own.macs, "merges": own.merges}
    if own.peak_bytes is not None:
        found["peak_bytes"] = own.peak_bytes
    if own.compile_s is not None:
        found |= {"compile_s": own.compile_s, "base_compile_s": base.compile_s}
    if mode == "eager" and len(pixels) == 1:  # of larger batches a GPU's queue may be full, and launching waits
        found["host"] = _on_host(bench, base.forward, own.forward)
    return found | stamp()


def _prepared(version: str, case: Case, model: nn.Module, plan: Plan) -> tuple[nn.Module, int]:
    """A copy of the model that merges, on the model's weights, and in how many blocks."""
    own = twin(model)
    rivals = {"published": published, "SDPA": with_sdpa}
    if version in rivals:
        rivals[version](case.r)(own)
        return own, plan.merges
    settings = {
        "default": lambda: TurboConfig(flops=plan.share),
        "paper": lambda: TurboConfig.paper(case.r),
        "redundancy": lambda: TurboConfig.paper(case.r, degree="redundancy"),
    }
    schedule = turbovlm.apply(own, settings[version]()).schedules[0]
    if schedule.note:
        raise ValueError(schedule.note)
    return own, _merges(schedule.merged)


def _ready(model: nn.Module, merges: int, pixels: Tensor, mode: str) -> Ready:
    cost = macs(model, pixels[:1])

    def eager() -> Any:
        with torch.inference_mode():
            return model(pixels)

    # here the kernels of turbovlm itself are compiled, which does not count as compilation below
    if not _hidden(eager()).isfinite().all():
        raise ArithmeticError("there are infinite values, or none, in its output")
    forward, peak, seconds = eager, None, None
    if mode == "eager":
        peak = peak_memory(eager, pixels.device)
    elif mode == "graph":
        made: list[tuple[Forward, Any]] = []
        peak = peak_memory(lambda: made.append(captured(eager)), pixels.device)  # a replay allocates nothing
        forward = made[0][0]
    else:
        forward, seconds = compiled(model, pixels, mode)
        peak = peak_memory(forward, pixels.device) if mode == "compiled" else None  # graphs have a pool of their own
    return Ready(forward, cost, merges, peak, seconds)


def captured(forward: Forward) -> tuple[Forward, Tensor]:
    """A replay of what `forward` does in a CUDA graph, and where its result comes to lie."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    return graph.replay, _hidden(out)


def _hidden(out: Any) -> Tensor:
    """The tensor that timm's encoders return, or the one in what those of transformers return."""
    hidden: Tensor = getattr(out, "last_hidden_state", out)
    return hidden


def compiled(model: nn.Module, pixels: Tensor, mode: str) -> tuple[Forward, float]:
    """The model's forward, compiled by `torch.compile`, and seconds of its first call, no cache filled."""
    _start_compiler(pixels.device)
    program = torch.compile(model, mode="default" if mode == "compiled" else mode)

    def forward() -> Any:
        if mode == "reduce-overhead":
            # nobody reads the last result any more
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            return program(pixels)

    with fresh_cache():
        start = time.perf_counter()
        forward()
        if pixels.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        for _ in range(2):  # reduce-overhead records its graphs in the second call
            forward()
    return forward, seconds


@functools.cache
def _start_compiler(device: torch.device) -> None:
    """What the first compilation of a process pays once: imports and workers."""
    with fresh_cache():
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(64, device=device))


def _on_host(bench: Bench, base: Forward, own: Forward) -> Cell:
    """Milliseconds of CPU time to run or launch a forward, and its operators and kernels; `base_…` are the model's."""
    device = torch.device(bench.device)
    clock = on_host({"": own, "base_": base}, bench.rounds, device)
    found: Cell = {f"{whose}ms": microseconds / 1e3 for whose, microseconds in clock.items()}
    for whose, forward in (("", own), ("base_", base)):
        found |= {f"{whose}{what}": count for what, count in launched(forward, device).items()}
    return found
