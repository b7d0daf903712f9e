"""What a merge costs beside arithmetic: host time and operators of a model so small that it computes nothing.

    python benchmarks/host_time.py                  # writes benchmarks/results/host_time.{json,md}; a minute
    python benchmarks/host_time.py --device cuda    # the same on a GPU, and the kernels that are launched

A ViT of 12 blocks with 17 tokens of 48 channels, one thread, process CPU time, medians of forwards in turn, each behind
one of its kind. The cost of a merge is the slope between one merge and six, that of a block the slope between 6 blocks
and 12: of the model's own, and of blocks behind one merge. Operators are those of PyTorch's profiler whose names begin
with `aten::`. Without a GPU, the kernels' host side is timed all the same, but for the launches themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from types import ModuleType
from typing import Any, TypeVar

import torch
from cases import RESULTS, described, load, machine, save
from torch.profiler import ProfilerActivity, profile

import turbovlm
from turbovlm.encoder import attention, block
from turbovlm.ops import fused, kernels, plain
from turbovlm.ops.dispatch import path_for

Name = TypeVar("Name")

DEPTH, ROUNDS = 12, 150
OWN, BEHIND = "a block of the model's own", "a block behind a merge, which merges nothing"
AS_PUBLISHED = {"partition": "alternate", "order": "partition", "similarity": "keys", "reduce": "merge"}
SETTINGS: dict[str, dict[str, Any]] = {
    "any two patches (default)": {"partition": "all"},
    "random halves": {"partition": "random"},
    "the paper's": {**AS_PUBLISHED, "degree": "weighted_difference", "alpha": 2.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    import timm

    torch.manual_seed(0)
    size = {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": DEPTH, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **size).eval().to(args.device)
    pixels = torch.randn(1, 3, 64, 64, device=args.device)
    path = RESULTS / "host_time.json"
    found: dict[str, Any] = load(path)
    half = copy.deepcopy(model)
    half.blocks = half.blocks[: DEPTH // 2]
    own_way = path_for(pixels)
    versions: dict[tuple[str, int], tuple[Any, ModuleType]] = {(OWN, 6): (half, own_way), (OWN, 12): (model, own_way)}
    for whole in (half, model):
        merged, depth = copy.deepcopy(whole), len(whole.blocks)
        turbovlm.apply(merged, r=(1,) + (0,) * (depth - 1))
        versions[BEHIND, depth] = merged, own_way
    without_gpu = args.device == "cpu" and kernels.HAS_TRITON
    for way in dict.fromkeys((own_way, *([fused] if without_gpu else []), plain)):
        for name, setting in SETTINGS.items():
            for merges in (1, 6):
                merged = copy.deepcopy(model)
                turbovlm.apply(merged, r=(1,) * merges + (0,) * (DEPTH - merges), **setting)
                versions[f"{name}, {way.__name__.rpartition('.')[2]}", merges] = merged, way
    if without_gpu:
        from unlaunched import unlaunched  # imports triton
    with unlaunched() if without_gpu else contextlib.nullcontext():
        costs = of_all(versions, pixels, args.rounds)
    taken = {}
    for name in dict.fromkeys(name for name, _ in costs):
        few, many = sorted(count for other, count in costs if other == name)
        taken[name] = {
            what: (costs[name, many][what] - costs[name, few][what]) / (many - few) for what in costs[name, few]
        }
    found[args.device] = {"machine": machine(), "costs": taken}
    save(path, found)
    path.with_suffix(".md").write_text(report(found))
    print(report(found))


@contextlib.contextmanager
def on(way: ModuleType) -> Iterator[None]:
    """Whatever device it is on, an encoder's blocks take this path."""
    before = block.path_for, attention.path_for
    block.path_for = attention.path_for = lambda x: way
    try:
        yield
    finally:
        block.path_for, attention.path_for = before


def of_all(
    versions: dict[tuple[str, int], tuple[Any, ModuleType]], pixels: torch.Tensor, rounds: int
) -> dict[tuple[str, int], dict[str, float]]:
    """Microseconds of a forward on the host, in turn; its operators, and on a GPU its kernels."""

    def run(model: Any, way: ModuleType) -> None:
        with on(way):
            model(pixels)

    forwards = {name: functools.partial(run, *version) for name, version in versions.items()}
    with torch.inference_mode():
        clock = on_host(forwards, rounds, pixels.device)
        return {
            name: {"microseconds": clock[name], **launched(forward, pixels.device)}
            for name, forward in forwards.items()
        }


def on_host(forwards: Mapping[Name, Callable[[], object]], rounds: int, device: torch.device) -> dict[Name, float]:
    """Median microseconds of the process's CPU time that each takes, in turn, each behind one of its kind.

    On a GPU that is the time to launch it: the GPU is idle when it begins, and nobody waits for the end.
    """
    clock: dict[Name, list[float]] = {name: [] for name in forwards}
    for turn in range(-5, rounds):
        for name, forward in forwards.items():
            forward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.process_time_ns()
            forward()
            if turn >= 0:
                clock[name].append((time.process_time_ns() - start) / 1e3)
    return {name: median(samples) for name, samples in clock.items()}


def launched(forward: Callable[[], object], device: torch.device) -> dict[str, int]:
    """How many operators of PyTorch a forward runs, and on a GPU how many kernels it launches, by the profiler."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as record:
        forward()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = record.events()
    assert events is not None
    found = {"operators": sum(event.name.startswith("aten::") for event in events)}
    if on_gpu:
        found["kernels"] = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    return found


def report(found: dict[str, Any]) -> str:
    lines = ["# What a merge costs on the host", ""]
    lines += [
        "A ViT with 17 tokens of 48 channels, batch 1, fp32, eager, one thread: CPU time of the process. *Plain*: in"
    ]
    lines += [
        "PyTorch's operators alone; *host*: index work in NumPy; *fused*: Triton's kernels, on a CPU without the four"
    ]
    lines += ["launches themselves."]
    for device, of in found.items():
        names = list(of["costs"][OWN])
        lines += ["", f"## {device}", "", described(of["machine"]), ""]
        lines += [f"| | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
        for name, row in of["costs"].items():
            what = name if name in (OWN, BEHIND) else f"a merge: {name}"
            lines.append(f"| {what} | {' | '.join(f'{row[each]:.0f}' for each in names)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
