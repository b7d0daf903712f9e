"""What a merge costs beside arithmetic: host time and operators of a model so small that it computes nothing.

    python benchmarks/host_time.py                  # writes benchmarks/results/host_time.{json,md}; a minute
    python benchmarks/host_time.py --device cuda    # the same on a GPU, and the kernels that are launched

A ViT of 12 blocks with 17 tokens of 48 channels, one thread, process CPU time, medians of forwards in turn, each behind
one of its kind. The cost of a merge is the slope between one merge and six, that of a block the model's own. Operators
are those of PyTorch's profiler whose names begin with `aten::`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from statistics import median
from types import ModuleType
from typing import Any

import torch
from cases import RESULTS, described, load, machine, save
from torch.profiler import ProfilerActivity, profile

import turbovlm
from turbovlm.encoder import attention, block
from turbovlm.ops import plain
from turbovlm.ops.dispatch import path_for

DEPTH, ROUNDS = 12, 150
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
    own_way = path_for(pixels)
    versions: dict[tuple[str, int], tuple[Any, ModuleType]] = {("", 0): (model, own_way)}
    for way in dict.fromkeys((own_way, plain)):
        for name, setting in SETTINGS.items():
            for merges in (1, 6):
                merged = copy.deepcopy(model)
                turbovlm.apply(merged, r=(1,) * merges + (0,) * (DEPTH - merges), **setting)
                versions[f"{name}, {way.__name__.rpartition('.')[2]}", merges] = merged, way
    costs = of_all(versions, pixels, args.rounds)
    whole = costs.pop(("", 0))
    taken = {}
    for name in dict.fromkeys(name for name, _ in costs):
        one, six = costs[name, 1], costs[name, 6]
        taken[name] = {what: (six[what] - one[what]) / 5 for what in one}
    found[args.device] = {
        "machine": machine(),
        "block": {what: value / DEPTH for what, value in whole.items()},
        "merges": taken,
    }
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
    clock: dict[tuple[str, int], list[float]] = {name: [] for name in versions}
    counts: dict[tuple[str, int], dict[str, float]] = {}
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if pixels.is_cuda else [])
    with torch.inference_mode():
        for turn in range(-5, rounds):
            for name, (model, way) in versions.items():
                with on(way):
                    model(pixels)
                    seconds = timed(lambda model=model: model(pixels))
                if turn >= 0:
                    clock[name].append(seconds)
        for name, (model, way) in versions.items():
            with on(way), profile(activities=kinds) as record:
                model(pixels)
                if pixels.is_cuda:
                    torch.cuda.synchronize()
            events = record.events()
            assert events is not None
            counts[name] = {"operators": sum(event.name.startswith("aten::") for event in events)}
            if pixels.is_cuda:
                on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
                counts[name]["kernels"] = len(on_gpu)
    return {name: {"microseconds": median(clock[name]), **counts[name]} for name in versions}


def timed(forward: Callable[[], None]) -> float:
    start = time.process_time_ns()
    forward()
    return (time.process_time_ns() - start) / 1e3


def report(found: dict[str, Any]) -> str:
    lines = ["# What a merge costs on the host", ""]
    lines += ["A ViT of 12 blocks with 17 tokens of 48 channels, batch 1, fp32, eager, one thread: CPU time of the"]
    lines += ["process. *Plain*: in PyTorch's operators alone; *host*: index work in NumPy; *fused*: Triton's kernels."]
    for device, of in found.items():
        names = list(of["block"])
        lines += ["", f"## {device}", "", described(of["machine"]), ""]
        lines += [f"| | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
        for name, row in {"the model's own block": of["block"], **of["merges"]}.items():
            lines.append(f"| {name} | {' | '.join(f'{row[what]:.0f}' for what in names)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
