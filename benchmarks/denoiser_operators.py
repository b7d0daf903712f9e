"""How many operators a denoising step runs, merged and not: on a GPU each is a launch, or several.

    python benchmarks/denoiser_operators.py     # writes benchmarks/results/denoiser_operators.{json,md}; five minutes
    python benchmarks/denoiser_operators.py --times     # host time alone anew; half a minute

Blocks as many as in the full-size models, and narrow ones, on small images, as their number depends on neither. On a
CPU there are PyTorch's operators alone. For a GPU the kernels run in Triton's interpreter, and each is counted as one.
What computes nothing (views, empty tensors) is not counted. Host time is the process CPU time of a forward of these
narrow models on one thread, most of which is spent in calls; medians of forwards in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import torch
from cases import RESULTS, described, load, machine, save
from torch.utils._python_dispatch import TorchDispatchMode

import turbovlm
from turbovlm import DenoiseConfig

VERSIONS = {
    "stacks": DenoiseConfig(0.5),
    "stacks, copies": DenoiseConfig(0.5, restore="copy"),
    "blocks": DenoiseConfig(0.5, scope="block"),
    "parts": DenoiseConfig(0.5, scope="part"),
    "parts, copies": DenoiseConfig(0.5, scope="part", restore="copy"),
}
KERNELS = ("stacks", "stacks, copies")
"""Versions that are counted with a GPU's kernels, too."""
VIEWS = frozenset(
    [
        *("empty", "empty_like", "new_empty", "promote_types"),
        *("alias", "as_strided", "chunk", "detach", "diagonal", "expand", "permute", "select", "slice", "split", "t"),
        *("split_with_sizes", "squeeze", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view"),
    ]
)


class Counter(TorchDispatchMode):
    """Counts operators that compute something; turbovlm's own count by the kernels that they launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator.namespace != "turbovlm" and operator.overloadpacket.__name__ not in VIEWS
        return operator(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", action="store_true", help="host time alone; what was counted before stays")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"operators": {}}
    if args.times:
        results = load(RESULTS / "denoiser_operators.json")
    results |= {"machine": machine(), "ms": {name: host_times(*make()) for name, make in MODELS.items()}}
    for name, make in MODELS.items():
        if args.times:
            break
        model, inputs = make()
        found = {"model": operators(model, inputs)}
        for version, config in VERSIONS.items():
            with turbovlm.apply(model, config):
                found[version] = operators(model, inputs)
                if version in KERNELS:
                    with on_kernels():
                        found[f"{version}, kernels"] = operators(model, inputs)
        results["operators"][name] = found
    save(RESULTS / "denoiser_operators.json", results)
    (RESULTS / "denoiser_operators.md").write_text(report(results))
    print(report(results))


@torch.no_grad()
def host_times(model: Any, inputs: dict[str, Any], rounds: int = 15) -> dict[str, float]:
    """Milliseconds of a forward, by version."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for version in ("model", *VERSIONS):
            with nullcontext() if version == "model" else turbovlm.apply(model, VERSIONS[version]):
                model(**inputs)
                before = time.process_time()
                model(**inputs)
                found.setdefault(version, []).append(1000 * (time.process_time() - before))
    return {version: statistics.median(times) for version, times in found.items()}


@torch.no_grad()
def operators(model: Any, inputs: dict[str, Any]) -> int:
    """Of one forward, the second."""
    model(**inputs)
    with Counter() as counter, launches_counted(counter):
        model(**inputs)
    return counter.count


@contextmanager
def launches_counted(counter: Counter) -> Iterator[None]:
    """Count every launch of a kernel as well."""
    from turbovlm.ops.kernels.common import Kernel

    launch: Any = Kernel.__getitem__

    def counted(kernel: Any, grid: Any) -> Any:
        counter.count += 1
        return launch(kernel, grid)

    with patch.object(Kernel, "__getitem__", counted):
        yield


@contextmanager
def on_kernels() -> Iterator[None]:
    """Have the kernels run, as on a GPU."""
    from turbovlm.ops import fused

    with (
        patch("turbovlm.diffusion.denoiser.path_for", lambda x: fused),
        patch("turbovlm.diffusion.rank.path_for", lambda x: fused),
    ):
        yield


def unet(blocks: tuple[int, ...], levels: tuple[bool, ...]) -> Callable[[], tuple[Any, dict[str, Any]]]:
    """A UNet with so many blocks in the transformers of each resolution, where it has any."""

    def make() -> tuple[Any, dict[str, Any]]:
        from diffusers import UNet2DConditionModel

        model = UNet2DConditionModel(
            sample_size=64,
            layers_per_block=2,
            block_out_channels=(32,) * len(levels),
            down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in levels),
            up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(levels)),
            transformer_layers_per_block=blocks,
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
            use_linear_projection=True,
        )
        return model.eval(), {
            "sample": torch.randn(2, 4, 32, 32),
            "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(2, 77, 32),
        }

    return make


def flux() -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return model.eval(), {
        "hidden_states": torch.randn(2, 256, 16),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.full((2,), 0.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0)),
        "txt_ids": torch.zeros(7, 3),
    }


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "Stable Diffusion 1.5": unet((1, 1, 1, 1), (True, True, True, False)),
    "SDXL": unet((1, 2, 10), (False, True, True)),
    "FLUX.1": flux,
}


def report(results: dict[str, Any]) -> str:
    lines = ["# Operators of a denoising step", "", described(results["machine"]), ""]
    lines += [
        "keep=0.5; what computes nothing is not counted. In brackets: times the model's own. Kernels: as on a GPU.",
        "",
    ]
    names = ["model", *VERSIONS]
    for version in KERNELS:
        names.insert(names.index(version) + 1, f"{version}, kernels")
    lines += [f"| | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for model, found in results["operators"].items():
        cells = [f"{found[name]:,} ({found[name] / found['model']:.2f}×)" for name in names]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    names = ["model", *VERSIONS]
    lines += ["", "## Host time, ms", "", f"| | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for model, times in results["ms"].items():
        cells = [f"{times[name]:.0f} ({times[name] / times['model']:.2f}×)" for name in names]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
