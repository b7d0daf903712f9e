"""The encoders that the benchmarks run: architectures of the libraries, random weights from a seed, nothing fetched."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import turbovlm
from turbovlm import TurboConfig
from turbovlm_lab.demo.result import describe_machine

if TYPE_CHECKING:
    from turbovlm.profile import Comparison

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One encoder at one resolution: its name as printed, pixels per side, tokens, and tokens merged per block."""

    name: str
    pixels: int
    tokens: int
    r: int
    build: Callable[[], nn.Module]


def _timm(name: str, pixels: int) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, img_size=pixels, num_classes=0)
    return model


def _clip(pixels: int, patch: int, **size: int) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model: nn.Module = CLIPVisionModel(CLIPVisionConfig(image_size=pixels, patch_size=patch, **size))
    return model


def _siglip() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    size = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    model: nn.Module = SiglipVisionModel(SiglipVisionConfig(image_size=384, patch_size=14, **size))
    return model


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    size = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    model: nn.Module = Dinov2Model(Dinov2Config(image_size=518, patch_size=14, **size))
    return model


def _eva(pixels: int) -> nn.Module:
    from transformers import Blip2VisionConfig, Blip2VisionModel

    model: nn.Module = Blip2VisionModel(Blip2VisionConfig(image_size=pixels))
    return model


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CASES = {
    "vit-b-384": Case("ViT-B/16-384", 384, 577, 35, lambda: _timm("vit_base_patch16_384", 384)),
    "dinov2-s-224": Case("DINOv2-S/14-224", 224, 257, 16, lambda: _timm("vit_small_patch14_dinov2", 224)),
    "dinov2-s-518": Case("DINOv2-S/14-518", 518, 1370, 64, lambda: _timm("vit_small_patch14_dinov2", 518)),
    "clip-b-224": Case("CLIP-B/16-224", 224, 197, 12, lambda: _clip(224, 16)),
    "vit-l-384": Case("ViT-L/16-384", 384, 577, 16, lambda: _timm("vit_large_patch16_384", 384)),
    "clip-l-336": Case("CLIP-L/14-336", 336, 577, 16, lambda: _clip(336, 14, **_LARGE)),
    "siglip-so400m-384": Case("SigLIP-so400m/14-384", 384, 729, 16, _siglip),
    "dinov2-l-518": Case("DINOv2-L/14-518", 518, 1370, 40, _dinov2),
    "eva-g-364": Case("EVA-g/14-364", 364, 677, 16, lambda: _eva(364)),
    "eva-g-448": Case("EVA-g/14-448", 448, 1025, 16, lambda: _eva(448)),
}
CPU_CASES = ("vit-b-384", "dinov2-s-224", "dinov2-s-518", "clip-b-224", "vit-l-384", "clip-l-336", "eva-g-364")
GPU_CASES = ("vit-l-384", "clip-l-336", "siglip-so400m-384", "dinov2-l-518", "clip-b-224", "eva-g-448")


def default_at_cost(model: nn.Module, case: Case) -> TurboConfig:
    """The default setting, at as many multiply-accumulates as the paper's with the case's r in every block."""
    with turbovlm.apply(model, TurboConfig.paper(case.r)) as handle:
        return TurboConfig(flops=handle.schedules[0].ratio)


def build(case: Case, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """The encoder in eval mode, its random weights from seed 0, drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return case.build().eval().to(dtype)


def images(case: Case, batch: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Noise from seed 0, `[batch, 3, pixels, pixels]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, case.pixels, case.pixels, generator=generator).to(device, dtype)


def compare_shown(model: nn.Module, inputs: Any, versions: Any, label: str, rounds: int, **settings: Any) -> Comparison:
    """`compare`, with a progress bar on the terminal."""
    from turbovlm.profile import compare

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=(settings.get("warmup", 2) + rounds) * (len(versions) + 1))
        advance = functools.partial(progress.advance, task)
        return compare(model, inputs, versions, rounds=rounds, progress=advance, **settings)


def pooled(
    measure: Callable[..., Comparison], *arguments: Any, processes: int = 3, long: float = math.inf
) -> Comparison:
    """The rounds of several fresh processes, in each of which `measure(*arguments)` compares the same versions.

    Where memory happens to lie moves a process's times by several percent. A model whose own forward takes `long`
    seconds or more is left at one process.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        found = [fresh.submit(measure, *arguments).result()]
        if statistics.median(found[0].baseline.wall_seconds) < long:
            found += [fresh.submit(measure, *arguments).result() for _ in range(processes - 1)]
    runs = []
    for same in zip(*(comparison.runs for comparison in found)):
        seconds, wall = (tuple(chain(*(getattr(run, name) for run in same))) for name in ("seconds", "wall_seconds"))
        peak = max((run.peak_bytes for run in same if run.peak_bytes is not None), default=None)
        forward = replace(same[0].timings["forward"], seconds=seconds, peak_bytes=peak)
        runs.append(replace(same[0], timings={"forward": forward}, wall_seconds=wall))
    return replace(found[0], runs=tuple(runs))


def machine() -> dict[str, Any]:
    """Where and with what this runs, and the instruction sets that decide how fast bf16 is."""
    return {**asdict(describe_machine()), "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def described(machine: dict[str, Any]) -> str:
    """`machine()` as one line of Markdown."""
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def load(path: Path) -> dict[str, Any]:
    """A JSON file's content, or nothing where there is none yet."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole, or leave the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)
