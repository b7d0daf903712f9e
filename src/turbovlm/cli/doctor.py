"""`turbovlm doctor`."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from turbovlm.cli.help import Help
from turbovlm.cli.output import add_json_option, check_json, console, print_table, write_json
from turbovlm.errors import TurboError

if TYPE_CHECKING:
    from rich.console import Console

    from turbovlm.cli.diagnosis import Findings
    from turbovlm.cli.selftest import Check

_EPILOG = """\
examples:
  turbovlm doctor                    what is installed, what of it works, and what to do about the rest
  turbovlm doctor --compile          also whether torch.compile works here: a minute
  turbovlm doctor --json             for a report of a bug

Exit code 1 where something is wrong, each thing with its remedy. The self-test merges in small models with random
weights and takes less than 20 seconds on a CPU. Nothing is downloaded.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="what is installed here, what of it works, and what to do about the rest",
        description="Say which versions, devices, kernels, families and plug-ins are here, and try them.",
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("--compile", action="store_true", help="also try torch.compile, which takes a minute")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, try, and say what was found.

    Returns:
        1 where something is wrong.

    Raises:
        TurboError: a package is missing without which versions are not compared.
    """
    check_json(args)
    if importlib.util.find_spec("packaging") is None:
        raise TurboError("doctor needs packaging: pip install 'turbovlm[cli]'")
    from turbovlm.cli.diagnosis import examine

    found = examine()
    checks = _checks(found, args.compile)
    for check in checks:
        if not check.passed:
            found.problem(f"{check.subject}: {check.what}: {check.found}", REPORT)
    _print(console(), found, checks)
    if args.json:
        write_json(args.json, as_json(found, checks))
    return 1 if found.problems else 0


REPORT = "report it with what `turbovlm doctor --json` prints; until then expect wrong results here"


def _checks(found: Findings, compile: bool) -> list[Check]:
    from turbovlm.cli import selftest
    from turbovlm.cli.measuring import device_named, progress_bar

    devices = list(dict.fromkeys(("cpu", device_named(None))))
    with progress_bar(selftest.count(devices, compile), "self-test") as advance:
        return selftest.run(devices, compile, advance)


def as_json(found: Findings, checks: Sequence[Check]) -> dict[str, Any]:
    """All that was found."""
    tried = [asdict(check) for check in checks]
    said = {"problems": found.problems, "notes": found.notes}
    return {"ok": not found.problems, **said, **found.facts, "self_test": tried}


def _print(out: Console, found: Findings, checks: Sequence[Check]) -> None:
    def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        print_table(out, title, header, rows, names=len(header))
        out.print()

    facts = found.facts
    rows = [(each["name"], each["installed"] or "–", each["needed"], each["for"]) for each in facts["versions"]]
    table("Versions", ("package", "installed", "needed", "for"), rows)
    table(
        "Devices", ("device", "name", "free"), [(d["device"], d["name"], _size(d["free_gb"])) for d in facts["devices"]]
    )
    table("Kernels", ("what", "runs on"), [(each["what"], each["runs_on"]) for each in facts["kernels"]])
    if "families" in facts:
        header = ("library", "encoders", "vision-language", "denoisers")
        table("Families that merge, of the installed releases", header, [_counts(each) for each in facts["families"]])
    header = ("group", "name", "package", "state")
    table("Plug-ins", header, [tuple(each[name] for name in header) for each in facts["plug-ins"]])
    rows = [(c["what"], c["folder"], "yes" if c["writable"] else "no", _size(c["free_gb"])) for c in facts["caches"]]
    table("Caches", ("of", "folder", "writable", "free"), rows)
    tried = [(c.what, c.subject, "yes" if c.passed else "NO", c.found.partition("\n")[0]) for c in checks]
    table("Self-test", ("what", "of", "passed", "found"), tried)
    for title, items in (("Note", found.notes), ("Problem", found.problems)):
        for each in items:
            out.print(f"{title}: {each['what']}")
            out.print(f"→ {each['remedy']}")
    seconds = sum(check.seconds for check in checks)
    passed = sum(check.passed for check in checks)
    out.print(f"{passed} of {len(checks)} checks passed in {seconds:.0f} s; problems: {len(found.problems) or 'none'}")


def _counts(each: dict[str, Any]) -> tuple[str, ...]:
    if not each["installed"]:
        return (f"{each['library']} (not installed)", *(str(each[kind]["known"] or "") for kind in KINDS))
    return (each["library"], *(_count(**each[kind]) for kind in KINDS))


KINDS = ("encoder", "vlm", "denoiser")


def _count(known: int, there: int) -> str:
    return "" if not known else str(known) if there == known else f"{there} of {known}"


def _size(gigabytes: float | None) -> str:
    return "" if gigabytes is None else f"{gigabytes:g} GB"
