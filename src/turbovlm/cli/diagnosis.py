"""What `turbovlm doctor` finds: versions, devices, kernels, families, plug-ins and caches. Nothing is downloaded."""

from __future__ import annotations

import getpass
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

import turbovlm
from turbovlm.cli.measuring import device_named
from turbovlm.registry import ENTRY_POINTS as FAMILIES
from turbovlm.registry import OWN, families

LAB = "turbovlm-lab"
DEVELOPMENT = "dev"
"""The extra of those who work on turbovlm: its packages are no business of users."""
GROUPS = ("turbovlm.commands", FAMILIES, "turbovlm.models", "vllm.general_plugins", "lmms_eval.models")
"""Groups of entry points that turbovlm reads, or by which others find it."""
STATES = ("registered", "loads")
"""Of a plug-in that is another package's to load, and of one of turbovlm's."""
SPACE = 1 << 30
"""Bytes that a cache of models should have left."""


@dataclass
class Findings:
    """What was found, as JSON has it.

    Attributes:
        facts: sections by name, each a list of rows with the same keys.
        problems: what is wrong, each with its remedy.
        notes: what could be faster or is out of the ordinary, each with its remedy.
    """

    facts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)
    notes: list[dict[str, str]] = field(default_factory=list)

    def problem(self, what: str, remedy: str) -> None:
        """Add one that makes the command fail."""
        self.problems.append({"what": what, "remedy": remedy})

    def note(self, what: str, remedy: str) -> None:
        """Add one that does not."""
        self.notes.append({"what": what, "remedy": remedy})


def examine() -> Findings:
    """All but the self-test."""
    found = Findings()
    found.facts["versions"] = list(_versions(found))
    found.facts["devices"] = list(_devices(found))
    found.facts["kernels"] = list(_kernels(found))
    found.facts["plug-ins"] = list(_plugins(found))
    if not any(each["group"] == FAMILIES and each["state"] not in STATES for each in found.facts["plug-ins"]):
        found.facts["families"] = list(_families(found))  # else they are asked for in vain
    found.facts["caches"] = list(_caches(found))
    return found


def _versions(found: Findings) -> Iterator[dict[str, Any]]:
    yield {"name": "python", "installed": platform.python_version(), "needed": "", "for": ""}
    yield {"name": "turbovlm", "installed": turbovlm.__version__, "needed": "", "for": ""}
    yield from _lab(found)
    for name, specifier, extra in _needed(found):
        version = _installed(name)
        yield {"name": name, "installed": version, "needed": str(specifier), "for": extra or "turbovlm"}
        if version is not None and not specifier.contains(version, prereleases=True):
            install = f"turbovlm[{extra}]" if extra else "turbovlm"
            found.problem(f"{name} {version} is installed, not {specifier}", f"pip install --upgrade '{install}'")


def _lab(found: Findings) -> Iterator[dict[str, Any]]:
    """The lab's release, and the releases of turbovlm that it is made for."""
    from packaging.requirements import Requirement

    version = _installed(LAB)
    yield {"name": LAB, "installed": version, "needed": "", "for": "the lab"}
    for line in importlib.metadata.requires(LAB) or [] if version is not None else []:
        each = Requirement(line)
        if each.name == "turbovlm" and not each.specifier.contains(turbovlm.__version__, prereleases=True):
            what = f"{LAB} {version} is made for turbovlm {each.specifier}, not for {turbovlm.__version__}"
            found.problem(what, f"pip install --upgrade turbovlm {LAB}")


def _needed(found: Findings) -> Iterator[tuple[str, Any, str]]:
    """Each package that turbovlm or one of its extras needs: its name, the releases, and the extra."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("turbovlm") or []
        extras = importlib.metadata.metadata("turbovlm").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        found.problem("turbovlm runs from a folder that is not installed", "pip install turbovlm, or pip install -e .")
        return
    every = [Requirement(line) for line in lines]
    needs = {"": [each for each in every if each.marker is None]}
    for extra in extras:
        if extra != DEVELOPMENT:
            needs[extra] = [each for each in every if each.marker and each.marker.evaluate({"extra": extra})]
    seen = {"turbovlm"}
    for extra in sorted(needs, key=lambda extra: (extra != "", len(needs[extra]))):  # each of the smallest that has it
        for each in needs[extra]:
            if each.name not in seen:
                seen.add(each.name)
                yield each.name, each.specifier, extra


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(found: Findings) -> Iterator[dict[str, Any]]:
    threads = f"PyTorch uses {torch.get_num_threads()} of {os.cpu_count()} cores"
    capability = torch.backends.cpu.get_cpu_capability()
    yield {"device": "cpu", "name": f"{_cpu()}, {capability}, {threads}", "free_gb": _free_memory()}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        name = f"{about.name}, compute capability {about.major}.{about.minor}, {_gb(total)} GB"
        yield {"device": f"cuda:{index}", "name": name, "free_gb": _gb(free)}
    if torch.backends.mps.is_available():
        yield {"device": "mps", "name": "Apple", "free_gb": None}
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        found.note(
            f"there is an NVIDIA driver, but PyTorch {torch.__version__} sees no GPU",
            "install PyTorch for CUDA: https://pytorch.org/get-started/locally",
        )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _free_memory() -> float | None:
    """Of the machine, where it tells, as Linux does."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    free = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return _gb(free[0] * 1024) if free else None


def _gb(count: int) -> float:
    return round(count / 1e9, 1)


def _kernels(found: Findings) -> Iterator[dict[str, Any]]:
    from turbovlm.ops.dispatch import HAS_NUMPY, path_told

    for name in dict.fromkeys(("cpu", device_named(None))):
        for dtype in (torch.float32,) if name == "cpu" else (torch.float32, torch.bfloat16, torch.float16):
            path = path_told(torch.device(name), dtype)
            yield {"what": f"merges, {name}, {str(dtype).removeprefix('torch.')}", "runs_on": path}
            if name == "cuda" and path.startswith("PyTorch"):
                found.note(f"on {name} merges run on {path}", "pip install triton, where there are kernels for it")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    yield {"what": "torch.compile, cpu", "runs_on": compiler or "nothing: there is no C++ compiler"}
    if not HAS_NUMPY:
        found.note("on CPUs index work is faster with NumPy, which is not installed", "pip install numpy")


def _plugins(found: Findings) -> Iterator[dict[str, Any]]:
    for group in GROUPS:
        for point in sorted(entry_points(group=group)):
            if not group.startswith("turbovlm.") and "turbovlm" not in point.value:
                continue
            package = point.dist.name if point.dist is not None else ""
            registered, state = STATES
            if group.startswith("turbovlm."):
                try:
                    point.load()
                except Exception as error:  # a package's own, whatever it is
                    state = f"does not load: {type(error).__name__}: {error}"
                    remedy = f"pip install --upgrade {package}, or uninstall it"
                    found.problem(f"{group} {point.name} of {package} {state}", remedy)
            else:
                state = registered
            yield {"group": group, "name": point.name, "package": package, "state": state}


def _families(found: Findings) -> Iterator[dict[str, Any]]:
    """By library, how many families of each kind its installed release has the classes of."""
    known: dict[str, dict[str, list[bool]]] = {}
    absent: dict[str, list[str]] = {}
    for kind in OWN:
        for each in families(kind):
            library = each.classes[0].partition(".")[0]
            there = any(_is_there(path) for path in each.classes)
            known.setdefault(library, {}).setdefault(kind, []).append(there)
            if not there:
                absent.setdefault(library, []).append(each.family)
    for library, kinds in known.items():
        installed = importlib.util.find_spec(library) is not None
        counts = {kind: {"known": len(kinds.get(kind, [])), "there": sum(kinds.get(kind, []))} for kind in OWN}
        missing = absent.get(library, []) if installed else []
        yield {"library": library, "installed": installed, **counts, "missing": missing}


def _is_there(path: str) -> bool:
    """Whether the module of a class lies in its package, which is not imported."""
    top, *parts = path.split(".")[:-1]
    spec = importlib.util.find_spec(top)
    places = [] if spec is None else [Path(place).joinpath(*parts) for place in spec.submodule_search_locations or ()]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)


def _caches(found: Findings) -> Iterator[dict[str, Any]]:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    places = {
        "models of the hub": ("HF_HOME", Path(os.environ.get("HF_HUB_CACHE", home / "hub"))),
        "Triton's kernels": (
            "TRITON_CACHE_DIR",
            Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")),
        ),
        "compiled programs": (
            "TORCHINDUCTOR_CACHE_DIR",
            Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{_user()}")),
        ),
    }
    for what, (variable, place) in places.items():
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        writable = there.is_dir() and os.access(there, os.W_OK)
        free = shutil.disk_usage(there).free
        yield {"what": what, "folder": _short(place), "writable": writable, "free_gb": _gb(free)}
        if not writable:
            found.problem(
                f"nothing may be written to {place}, the cache of {what}", f"set {variable} to another folder"
            )
        elif free < SPACE:
            found.note(f"{place} has {_gb(free)} GB left", f"set {variable} to a folder with more")


def _user() -> str:
    """As PyTorch names the folder of its compiled programs."""
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):  # a container's user may have no name
        return f"uid_{os.getuid()}"


def _short(place: Path) -> str:
    """A folder without the user's name, where it lies at home."""
    home = Path.home()
    return f"~/{place.relative_to(home)}" if place.is_relative_to(home) else str(place)
