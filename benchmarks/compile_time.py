"""How long `torch.compile` takes for an encoder, and for the same with merging.

    python benchmarks/compile_time.py       # writes benchmarks/results/compile_time.{json,md}; five minutes

CPU seconds of the process and of the compilers that it starts, in one thread, with empty caches; every version is
compiled twice, in turn, and the second is taken: the first pays for imports. A block compiles once for each length, so
each merge adds the kernels of another one.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
from typing import Any

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = (
    "1"  # before torch is imported: the workers of a pool end too late to count
)
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
from cases import CASES, RESULTS, build, described, images, machine, save

import turbovlm
from turbovlm import TurboConfig

NAMES = ("dinov2-s-224", "clip-b-224")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", choices=tuple(CASES), default=NAMES, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(), "seconds": {}}
    for name in args.encoders:
        results["seconds"][name] = of_encoder(name)
        save(RESULTS / "compile_time.json", results)
    (RESULTS / "compile_time.md").write_text(report(results))
    print(report(results))


def of_encoder(name: str) -> dict[str, float]:
    """CPU seconds of each version's compilation."""
    case = CASES[name]
    model, pixels = build(case, torch.float32), images(case, 2, torch.float32)
    versions = {"model": model}
    for title, config in (("default", TurboConfig(case.r)), ("every block", TurboConfig(case.r, blocks="every"))):
        versions[title] = copy.deepcopy(model)
        turbovlm.apply(versions[title], config)
    seconds = {}
    for _ in range(2):
        for title, version in versions.items():
            seconds[title] = compiled_in(version, pixels)
    return seconds


def compiled_in(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    """CPU seconds of the first compiled forward, this process's and its compilers'."""
    torch._dynamo.reset()
    start = _spent()
    with torch.inference_mode():
        torch.compile(model)(pixels)
    return _spent() - start


def _spent() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def report(results: dict[str, Any]) -> str:
    lines = ["# How long compiling takes", "", "CPU seconds, and times the model's own.", ""]
    lines += [described(results["machine"]), ""]
    names = list(next(iter(results["seconds"].values())))
    lines += [f"| encoder | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for name, row in results["seconds"].items():
        cells = [f"{seconds:.1f} ({seconds / row['model']:.2f}×)" for seconds in row.values()]
        lines.append(f"| {CASES[name].name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
