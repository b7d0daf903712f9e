"""The tables of `serving.py`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
from cases import described

DISTINCT, REPEATED, NONE = "distinct", "repeated", "none"
"""Images of a load."""
GAIN = 1.1
"""Times the requests a second: what has less is listed as no gain."""
HEADS = (
    "clients | visual_keep | requests/s | ratio | tokens/s | first token, s | 90 % | speed-up | read | blocks "
    "| worker, s | ratio"
)


def report(results: dict[str, Any]) -> str:
    lines = ["# Serving by vLLM with fewer visual tokens", "", described(results["machine"]), ""]
    lines += [
        f"LLaVA-1.5's shape, random weights, {results['dtype']}, eager, one engine for each `visual_keep` (1: vLLM as "
        "it is). *First token*: the median over requests, and what 90 % of them stay below. *Read*: tokens of a prompt "
        "that the language model reads, without those in the prefix cache. *Blocks*: of "
        f"{results['block']} tokens, in use at most. *Worker*: processor time of the process that runs the model, a "
        "request. Ratios are to vLLM as it is in the same round, medians: above 1 is more requests, a sooner first "
        "token, less work. How far they are from 1 without images, two engines differ by themselves.",
        "",
    ]
    measured = {name: found for name, found in results["sizes"].items() if "loads" in found}
    for name, found in measured.items():
        macs = found["macs"]
        keeps = [keep for keep in macs if keep not in ("1", "tower")]
        fewer = ", ".join(f"{macs['1'] / macs[keep]:.2f}× fewer with {keep}" for keep in keeps)
        lines += [
            f"## {name}: a language model of {found['parameters']['text'] / 1e6:.0f} M parameters",
            "",
            f"To the first token {macs['1'] / 1e9:.1f} G multiply-accumulates, of which the tower has "
            f"{macs['tower'] / 1e9:.1f}, which do not get fewer; {fewer}. {found['rounds']} rounds; other processes "
            f"kept {found['others_cores']:.1f} of the machine's cores busy meanwhile. Processor time in which an "
            f"image's tokens are chosen: {chosen(found['choosing'])}.",
            "",
        ]
        for title, entries in tables(found["loads"]):
            lines += [f"### {title}", "", f"| {HEADS} |", f"|{'--:|' * (HEADS.count('|') + 1)}"]
            lines += [row(entry, keep) for entry in entries for keep in entry["served"]] + [""]
    lines += ["## Where fewer tokens do not serve more requests", "", f"Less than {GAIN:g} times as many:", ""]
    lines += [f"- {text}" for text in no_gain(measured)] or ["nowhere."]
    return "\n".join(lines) + "\n"


def chosen(choosing: dict[str, dict[str, float]]) -> str:
    parts = (
        " and ".join(f"{1000 * seconds:.0f} ms ({keep})" for keep, seconds in by_keep.items()) + f' by "{selection}"'
        for selection, by_keep in choosing.items()
    )
    return ", ".join(parts)


def tables(loads: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Loads that stand in one table, under its title."""
    titles = {
        DISTINCT: "Another image in each request, {} tokens asked for",
        REPEATED: "The same image in each request, {} tokens asked for",
        NONE: "No image, {} tokens asked for: the engines do the same",
    }
    for (images, new), entries in itertools.groupby(loads, lambda each: (each["load"]["images"], each["load"]["new"])):
        yield titles[images].format(new), list(entries)


def ratio(entry: dict[str, Any], keep: str, what: str) -> float:
    """The median over rounds of vLLM's value over that with `keep`."""
    rounds = zip(entry["served"]["1"], entry["served"][keep])
    return statistics.median(value(own, what) / value(fewer, what) for own, fewer in rounds)


def value(served: dict[str, Any], what: str) -> float:
    return float(statistics.median(served[what]) if isinstance(served[what], list) else served[what])


def row(entry: dict[str, Any], keep: str) -> str:
    load, rounds = entry["load"], entry["served"][keep]
    n = load["requests"]
    rate = statistics.median(n / each["seconds"] for each in rounds)
    first = [seconds for each in rounds for seconds in each["first"]]
    read = statistics.median((each["prompt"] - each["cached"]) / n for each in rounds)
    cells = [
        f"{load['clients']} | {keep} | {rate:.2f} | **{ratio(entry, keep, 'seconds'):.2f}×**",
        f"{rate * load['new']:.1f} | {statistics.median(first):.2f} | {np.percentile(first, 90):.2f}",
        f"**{ratio(entry, keep, 'first'):.2f}×** | {read:.0f} | {max(each['blocks'] for each in rounds)}",
        f"{statistics.median(each['worker'] for each in rounds) / n:.3f} | {ratio(entry, keep, 'worker'):.2f}×",
    ]
    return f"| {' | '.join(cells)} |"


def no_gain(sizes: dict[str, Any]) -> Iterator[str]:
    """What serves fewer than `GAIN` times as many requests."""
    for name, found in sizes.items():
        for title, entries in tables(found["loads"]):
            for entry in entries:
                rounds = entry["served"]["1"]
                whole = statistics.median(seconds for each in rounds for seconds in each["whole"])
                first = statistics.median(seconds for each in rounds for seconds in each["first"])
                for keep in entry["served"]:
                    if keep != "1" and (times := ratio(entry, keep, "seconds")) < GAIN:
                        clients = f"{entry['load']['clients']} client{'s'[: entry['load']['clients'] > 1]}"
                        yield (
                            f"{name}, {title[0].lower()}{title[1:]}, {clients}, `visual_keep` {keep}: {times:.2f}×; "
                            f"{1 - first / whole:.0%} of a request's time is behind its first token"
                        )
