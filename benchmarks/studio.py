"""How fast the studio answers, in Chromium as a person meets it:  python benchmarks/studio.py, three minutes.

Writes benchmarks/results/studio.{json,md}. Needs gradio, playwright and Debian's chromium.

`open`: from opening the page to the first picture and answer on it. `first`: from the first key that moves a slider to
the new picture and answer. `change`: the median of the changes after that. `timed`: the same until the times stand
there too, which are measured behind the answer, three runs of each version. `cpu`: CPU time of a change up to the
answer, of the studio's process with all its threads, which other work on the machine moves less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from cases import RESULTS, save
from playwright.sync_api import sync_playwright

from turbovlm_lab.demo.result import describe_machine
from turbovlm_lab.studio.app import Settings, serving

MODELS = {"clip": "CLIP ViT-B/16", "saliency": "ViT-S/14 and its head"}
CHANGES = 5
WAIT = 120_000
"""Milliseconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="PyTorch's (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = asdict(describe_machine())
    with serving(Settings(port=0)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        rows = {key: measured(browser.new_page(), f"{url}?model={key}&amount=r&value=9") for key in MODELS}
        browser.close()
    found = {"machine": machine, "load": round(os.getloadavg()[1], 1), "rows": rows}
    save(RESULTS / "studio.json", found)
    text = table(found)
    (RESULTS / "studio.md").write_text(text, encoding="utf-8")
    print(text)


def measured(page: Any, link: str) -> dict[str, float]:
    """Seconds of one model; it is loaded by a visit before."""
    visit(page, link)
    opened = visit(page, link)
    page.locator("#r .range").focus()
    changes = [change(page, value) for value in range(10, 11 + CHANGES)]
    return {
        "open": opened,
        "first": changes[0][0],
        "change": statistics.median(shown for shown, _, _ in changes[1:]),
        "timed": statistics.median(timed for _, timed, _ in changes[1:]),
        "cpu": statistics.median(cpu for _, _, cpu in changes[1:]),
    }


def visit(page: Any, link: str) -> float:
    """Seconds from opening the page to the first result on it."""
    started = time.perf_counter()
    page.goto(link)
    page.wait_for_selector("#costs .cards", timeout=WAIT)
    seconds = time.perf_counter() - started
    page.wait_for_selector("#costs .cards[data-stage=done]", timeout=WAIT)
    return seconds


def change(page: Any, value: int) -> tuple[float, float, float]:
    """Seconds from the key that makes r one larger to its result, and to its times; and CPU time to its result."""
    started, process = time.perf_counter(), time.process_time()
    page.keyboard.press("ArrowRight")
    shown = f'#costs .cards[data-state*="value={value}"]'
    page.wait_for_selector(shown, timeout=WAIT)
    seconds, cpu = time.perf_counter() - started, time.process_time() - process
    page.wait_for_selector(f"{shown}[data-stage=done]", timeout=WAIT)
    return seconds, time.perf_counter() - started, cpu


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    machine = found["machine"]
    lines = [
        "| model | page opened | first change of r | a change of r | until it is timed | its CPU time |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in found["rows"].items():
        lines.append(f"| {MODELS[key]} | " + " | ".join(f"{row[name]:.2f} s" for name in row) + " |")
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"
    lines += ["", f"{where}; load average over five minutes {found['load']}. Written by benchmarks/studio.py."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
