"""Thousands of forwards of changing shapes: memory, live tensors and caches do not grow."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import turbovlm
from denoisers import DENOISERS
from fuzz.drawing import EXAMPLES, PROFILE
from fuzz.models import Drawn, encoder
from turbovlm.ops import partition_tokens
from turbovlm.ops.partition import CACHE_LIMIT
from vlms import VLMS, seeded

MOST_GROWTH = 24
"""MiB of memory that a process may grow by from the middle of a run to its end; the allocator's holes, no leak."""


def timm_vit() -> tuple[Any, Callable[[random.Random], Any], dict[str, Any]]:
    return images_of("timm_dynamic")


def transformers_vit() -> tuple[Any, Callable[[random.Random], Any], dict[str, Any]]:
    return images_of("vit")


def images_of(name: str) -> tuple[Any, Callable[[random.Random], Any], dict[str, Any]]:
    model = encoder(name, 2, "float32")

    def forward(draw: random.Random) -> None:
        size = draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 9)
        Drawn(name, 2, "float32", *size, "noise", draw.randint(0, 99)).run(model)

    return model, forward, {"r": 3, "trace": True}


def llava() -> tuple[Any, Callable[[random.Random], Any], dict[str, Any]]:
    family = VLMS["llava"]
    model = seeded(family.make)

    def forward(draw: random.Random) -> None:
        rows = [["image"] * draw.randint(1, 2) + [5] * draw.randint(1, 20) for _ in range(draw.randint(1, 3))]
        model(**family.inputs(*rows))

    return model, forward, {"visual_keep": 0.4}


def unet() -> tuple[Any, Callable[[random.Random], Any], dict[str, Any]]:
    family = DENOISERS["sd15"]
    model = family().eval()

    def forward(draw: random.Random) -> None:
        model(**family.inputs(draw.randint(1, 2), 2 * draw.randint(4, 8), 2 * draw.randint(4, 8)))

    return model, forward, {"keep": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("make", [timm_vit, transformers_vit, llava, unet])
@pytest.mark.filterwarnings("ignore:turbovlm merges nothing")
@torch.no_grad()
def test_nothing_grows(make):
    """As many live tensors after any forward as after another of the same shape, half a run earlier."""
    forwards = 10_000 if PROFILE[0] == "nightly" else 400
    model, forward, chosen = make()
    with turbovlm.apply(model, **chosen):
        draw = random.Random(0)
        for _ in range(forwards // 2):
            forward(draw)
        before = measured(forward)
        for _ in range(forwards // 2):
            forward(draw)
        after = measured(forward)
    EXAMPLES["forwards"] += forwards
    assert after["tensors"] <= before["tensors"] + 2 * (after["cached"] - before["cached"])
    assert after["MiB"] - before["MiB"] < MOST_GROWTH
    assert all(size <= most for size, most in caches().values()), caches()


def measured(forward: Callable[[random.Random], Any]) -> dict[str, Any]:
    """Live tensors and memory behind a forward that is always the same."""
    forward(random.Random(1))
    gc.collect()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
    return {"tensors": tensors, "MiB": resident, "cached": sum(size for size, _ in caches().values())}


FIXED = {
    "turbovlm.registry._LOADED": 4,  # three kinds of families, and those of other packages
    "turbovlm.vlm.cache._CLASSES": 20,  # one for each class of cache
    "turbovlm.ops.kernels.replay._REPLAYS": 1024,
}
"""Most entries of what grows with what was seen, beside the cache of partitions."""


def caches() -> dict[str, tuple[int, int]]:
    """Everything in `turbovlm` that remembers: entries now, and at most."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "turbovlm" or module is None:
            continue
        for name, value in list(vars(module).items()):
            path = f"{module_name}.{name}"
            if hasattr(value, "cache_info") and value.__module__ == module_name:
                info = value.cache_info()
                assert info.maxsize is not None, f"{path} has no bound"
                found[path] = info.currsize, info.maxsize
            elif path == "turbovlm.ops.partition._CACHED":
                found[path] = len(value), CACHE_LIMIT
            elif path in FIXED:
                found[path] = len(value), FIXED[path]
            elif isinstance(value, dict | list | set) and name.startswith("_") and not name.startswith("__"):
                found[path] = len(value), CONSTANT.setdefault(path, len(value))
    return found


CONSTANT: dict[str, int] = {}
"""Entries of all other collections when they were first seen: they hold what the program itself says."""


def test_caches_are_bounded():
    """More partitions and schedules than are kept."""
    for seed in range(CACHE_LIMIT + 100):
        partition_tokens(6, kind="random", seed=seed)
    with turbovlm.apply(encoder("timm_vit", 1, "float32"), keep=0.9) as handle:
        for tokens in range(2, 1200):
            handle.features[0].solved_amounts(2 + tokens % 40, 1, "")
            handle.features[0].solved_amounts(2 + tokens % 40, tokens % 2, "")
    sizes = caches()
    assert sizes["turbovlm.ops.partition._CACHED"][0] > 0
    assert all(size <= most for size, most in sizes.values()), sizes
