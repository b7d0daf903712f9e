"""What a maintainer wants to watch: how large the package is, what importing it costs, how far a forward's calls go.

    python benchmarks/structure.py                      # this checkout; writes benchmarks/results/structure.{json,md}
    python benchmarks/structure.py --source ../other --label before     # another one, kept beside it under that label

Size: lines of Python, files, and bytes of the package as a deflated zip, which a wheel is. Import: process time of
`import turbovlm` after `import torch`, in a fresh process each, and what it adds in modules and in memory. Calls: those
of functions of turbovlm, by `sys.setprofile`, on the tests' small models, each after a first forward; without lambdas,
comprehensions and generator expressions, which releases of Python count differently. A switch is a call into another
file than the call before.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
IMPORTS = 5
"""Processes that `import turbovlm` is timed in."""
Call = tuple[str, str]
"""File, below the package, and the function's qualified name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=ROOT, metavar="DIR", help="a checkout (default: this one)")
    parser.add_argument("--label", default="now", help="what it is called in the report (default: now)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="of the report (default: results)")
    parser.add_argument("--probe", choices=PROBES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        print(json.dumps(PROBES[args.probe]()))
        return
    source = args.source.resolve()
    if not (source / "src" / "turbovlm").is_dir():
        parser.error(f"--source {args.source}: has no src/turbovlm")
    file = args.out / "structure.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    found[args.label] = measured(source)
    file.write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "structure.md").write_text(report(found))
    print(report(found))


def measured(source: Path) -> dict[str, Any]:
    """Everything about one checkout."""
    packages = {"wheel": source / "src" / "turbovlm", "lab": source / "lab" / "src" / "turbovlm_lab"}
    found: dict[str, Any] = {name: size_of(folder) for name, folder in packages.items() if folder.is_dir()}
    imports = [_probed(source, "import") for _ in range(IMPORTS)]
    found["import"] = {name: statistics.median(each[name] for each in imports) for name in imports[0]}
    return found | {name: _probed(source, name) for name in PROBES if name != "import"}


def in_checkout(source: Path, script: str, *arguments: str) -> dict[str, Any]:
    """What a script prints as JSON in its last line, in a fresh process that imports the packages of a checkout."""
    paths = os.pathsep.join(str(source / part) for part in ("src", "lab/src", "tests"))
    command, environment = [sys.executable, script, *arguments], {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {' '.join(arguments)}: failed in {source}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def size_of(package: Path) -> dict[str, int]:
    """Lines and files of Python, the longest file's lines, and bytes as a zip."""
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in package.rglob("*.py")]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(package.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                archive.write(file, file.relative_to(package.parent))
    return {"lines": sum(lines), "files": len(lines), "longest": max(lines), "bytes": len(packed.getvalue())}


def _probed(source: Path, probe: str) -> dict[str, Any]:
    return in_checkout(source, __file__, "--probe", probe)


def probe_import() -> dict[str, float]:
    """Seconds of the process, new modules, and growth of its largest resident size in MB."""
    import torch  # noqa: F401

    modules, size, start = set(sys.modules), _peak_megabytes(), time.process_time()
    import turbovlm  # noqa: F401

    seconds = time.process_time() - start
    added = set(sys.modules) - modules
    return {"seconds": seconds, "modules": len(added), "megabytes": _peak_megabytes() - size}


def _peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@contextmanager
def recording(until: Callable[[FrameType], bool] = lambda frame: False) -> Iterator[list[Call]]:
    """The calls of turbovlm's functions, up to the first return from a frame that `until` is true of."""
    import turbovlm

    package, calls = str(Path(turbovlm.__file__).parent), list[Call]()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "return" and until(frame):
            sys.setprofile(None)
        elif event == "call" and code.co_filename.startswith(package) and not code.co_name.startswith("<"):
            calls.append((os.path.relpath(code.co_filename, package), getattr(code, "co_qualname", code.co_name)))

    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def counts(calls: list[Call]) -> dict[str, int]:
    """Calls, different functions and files, and calls into another file than the call before."""
    switches = sum(before[0] != after[0] for before, after in pairwise(calls))
    files = {file for file, _ in calls}
    return {"calls": len(calls), "functions": len({*calls}), "files": len(files), "switches": switches}


def probe_block() -> dict[str, int]:
    """The second block of a ViT of transformers, r=4."""
    import torch

    import turbovlm
    from families import FAMILIES

    family = FAMILIES["vit"]
    model, inputs = family.make(), family.inputs(2)
    turbovlm.apply(model, r=[4] * 4)
    block: Any = [module for module in model.modules() if type(module).__name__ == "ViTLayer"][1]
    forward, found = block.__dict__["forward"], list[Call]()

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with recording() as calls:
            out = forward(*args, **kwargs)
        found[:] = calls
        return out

    block.__dict__["forward"] = recorded
    with torch.no_grad():
        model(**inputs)
        model(**inputs)
    return counts(found)


def probe_generate() -> dict[str, int]:
    """LLaVA's `generate` of three tokens, visual_keep=0.5."""
    import torch

    import turbovlm
    from vlms import VLMS, seeded

    family = VLMS["llava"]
    model, inputs = seeded(family.make), family.inputs([5, "image", 6, 7])
    turbovlm.apply(model, visual_keep=0.5)
    with torch.no_grad():
        for _ in range(2):
            with recording() as calls:
                model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    return counts(calls)


def probe_denoiser_block() -> dict[str, int]:
    """A small UNet, from its entry to the end of its first transformer block of three parts, keep=0.5."""
    return _denoised(lambda frame: getattr(frame.f_code, "co_qualname", "") == "BasicTransformerBlock.forward")


def probe_denoiser() -> dict[str, int]:
    """The whole small UNet."""
    return _denoised(lambda frame: False)


def _denoised(until: Callable[[FrameType], bool]) -> dict[str, int]:
    import torch

    import turbovlm
    from denoisers import DENOISERS

    family = DENOISERS["sd15"]
    model, inputs = family(), family.inputs(2, 16, 16)
    turbovlm.apply(model, keep=0.5)
    with torch.no_grad():
        for _ in range(2):
            with recording(until) as calls:
                model(**inputs)
    return counts(calls)


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "import": probe_import,
    "block": probe_block,
    "generate": probe_generate,
    "denoiser block": probe_denoiser_block,
    "denoiser": probe_denoiser,
}
TITLES = {
    "block": "one merging block of a ViT, r=4",
    "generate": "LLaVA's `generate` of three tokens, visual_keep=0.5",
    "denoiser block": "a UNet's entry and first block of three parts, keep=0.5",
    "denoiser": "the whole small UNet, keep=0.5",
}


def report(found: dict[str, Any]) -> str:
    """Everything as tables in Markdown, a column per checkout."""
    lines = ["# The package's structure", "", "| | " + " | ".join(found) + " |", "|---|" + "--:|" * len(found)]
    for name, title in (("wheel", "turbovlm"), ("lab", "turbovlm-lab")):
        for key in ("lines", "files", "longest", "bytes"):
            cells = [f"{one[name][key]:,}" if name in one else "" for one in found.values()]
            what = {"longest": "lines of the longest file", "bytes": "bytes as a zip"}.get(key, f"{key} of Python")
            lines.append(f"| {title}: {what} | " + " | ".join(cells) + " |")
    forms = {"seconds": "{:.2f} s", "modules": "{:.0f}", "megabytes": "{:.1f} MB"}
    for key, what in (("seconds", "CPU time"), ("modules", "new modules"), ("megabytes", "memory")):
        cells = [forms[key].format(one["import"][key]) for one in found.values()]
        lines.append(f"| import turbovlm, after torch: {what} | " + " | ".join(cells) + " |")
    lines += ["", "## Calls inside turbovlm", "", "Calls / different functions / files / switches between files.", ""]
    lines += ["| | " + " | ".join(found) + " |", "|---|" + "--:|" * len(found)]
    for name, title in TITLES.items():
        cells = [" / ".join(str(one[name][key]) for key in one[name]) for one in found.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
