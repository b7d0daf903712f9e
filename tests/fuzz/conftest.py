"""The profile of a run; in nightly ones, how many examples ran, printed and, with `FUZZ_REPORT=FILE`, written."""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest

from fuzz import drawing

HERE = Path(__file__).parent
LIBRARIES = ("timm", "torchvision", "open_clip_torch", "diffusers", "hypothesis")
LONGEST = 3600
"""Seconds that a test may take in a nightly run."""


def pytest_configure(config):
    drawing.PROFILE[0] = config.getoption("--hypothesis-profile", None) or "core"


def pytest_collection_modifyitems(config, items):
    if drawing.PROFILE[0] == "nightly":
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.timeout(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Note on the test's report how many examples it ran."""
    before = drawing.EXAMPLES.total()
    try:
        return (yield)
    finally:
        if HERE in item.path.parents:
            item.user_properties.append(("examples", drawing.EXAMPLES.total() - before))


def pytest_terminal_summary(terminalreporter, config):
    """After a nightly run, a table of its tests."""
    if drawing.PROFILE[0] != "nightly":
        return
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            examples = dict(report.user_properties).get("examples")
            if report.when == "call" and examples is not None:
                rows.append((report.nodeid.partition("tests/fuzz/")[2], outcome, examples, report.duration))
    lines = table(sorted(rows), config.getoption("--hypothesis-seed", None))
    terminalreporter.section("fuzz")
    for line in lines:
        terminalreporter.line(line)
    if path := os.environ.get("FUZZ_REPORT"):
        from turbovlm_lab.demo.result import describe_machine

        found = asdict(describe_machine()) | {name: version(name) for name in LIBRARIES}
        machine = ", ".join(f"{key} {value}" for key, value in found.items())
        Path(path).write_text("\n".join(["# Fuzzing", "", machine, "", *lines, ""]))


def table(rows, seed):
    """The tests, each with its outcome, its examples and its seconds; then the sums."""
    failed = sum(outcome == "failed" for _, outcome, _, _ in rows)
    sums = f"{sum(row[2] for row in rows)} examples, {failed} of {len(rows)} tests failed, seed {seed}"
    lines = ["| test | outcome | examples | seconds |", "|---|---|--:|--:|"]
    lines += [f"| {name} | {outcome} | {examples} | {duration:.0f} |" for name, outcome, examples, duration in rows]
    return [sums, "", *lines]
