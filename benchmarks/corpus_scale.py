"""A hundred million images on 64 GPUs, simulated: what limits, and what merging then saves.

    python benchmarks/corpus_costs.py       # what an image costs a CPU, measured here
    python benchmarks/corpus_scale.py       # simulates; writes benchmarks/results/corpus_scale.{json,md,png}

It goes on behind the last seed of the file, if that is of the same inputs: half an hour for eight.
Times of GPUs are those in `corpus_gpu.json`, which says where they are from. Cores, disks, networks and deaths are
parameters. The simulation itself is `corpus_simulation.py`; it needs `simpy`.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from cases import RESULTS, described, load, machine, save
from corpus_simulation import BATCH, EMBEDDING, Costs, Setup, ceilings, simulate
from rich.console import Console
from rich.progress import track

from turbovlm_lab.evaluate.statistics import over_seeds

HERE = Path(__file__).parent
VIT, EVA = "ViT-L/16-384", "EVA-g/14-448"
NONE, MEASURED, COUNTED = "unmerged", "merged", "by arithmetic"
PLENTY, FEW = 32, 8
USUAL = "nothing"


@dataclass(frozen=True)
class Case:
    """A row: a model, how it merges, cores for each GPU, and what differs from the usual run, with its settings."""

    model: str
    merging: str
    cores: int
    what: str = USUAL
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.merging}, {self.cores} cores, {self.what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="runs of each setup (default: %(default)s)")
    parser.add_argument("--images", type=int, default=100_000_000, help="of the corpus (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default: %(default)s)")
    args = parser.parse_args()
    inputs, path = read_inputs(), args.out / "corpus_scale.json"
    asked = {"images": args.images, "inputs": inputs, "cases": [case.name for case in cases(inputs)]}
    found: dict[str, Any] = load(path)
    if any(found.get(name) != value for name, value in asked.items()):
        found = {"machine": machine(), "seeds": 0, **asked, "runs": {name: [] for name in asked["cases"]}}
    for seed in range(found["seeds"], args.seeds):
        for case in track([*cases(inputs)], f"seed {seed}", console=Console(stderr=True), transient=True):
            outcome = simulate(replace(setup(case, inputs), images=args.images), seed)
            found["runs"][case.name].append(asdict(outcome))
        found["seeds"] = seed + 1
        save(path, found)
    (args.out / "corpus_scale.md").write_text(report(found))
    plot(found, args.out / "corpus_scale.png")
    print(report(found))


def read_inputs() -> dict[str, Any]:
    """What was measured, in seconds: of images, batches of a GPU, the driver and writing."""
    cpu, timed = load(RESULTS / "corpus_costs.json"), load(RESULTS / "gpu_before.json")["models"]
    each, gpus = cpu["images"]["each"], json.loads((HERE / "corpus_gpu.json").read_text())
    models = {}
    for name, gpu in gpus.items():
        rounds = {run["name"]: np.array(run["seconds"]) for run in timed[gpu["spread"]]["runs"]}
        spread = {NONE: rounds["model"], MEASURED: rounds["turbo"], COUNTED: rounds["turbo"]}
        ms = {NONE: gpu["ms"], MEASURED: gpu["merged_ms"], COUNTED: gpu["ms"] / gpu["fewer_macs"]}
        seconds = {
            merging: (spread[merging] / np.median(spread[merging]) * ms[merging] / 1e3).tolist() for merging in ms
        }
        models[name] = {"gpu": gpu["gpu"], "from": gpu["from"], "seconds": seconds}
    return {
        "models": models,
        "side": cpu["images"]["side"],
        "decode": np.add(each["decode"], each["prepare"]).tolist(),
        "draft": np.add(each["draft"], each["smaller"]).tolist(),
        "bytes": each["bytes"],
        "collect": float(np.mean(cpu["collect"])),
        "engine": float(np.median(cpu["engine"]["seconds"])),
        "write": {how: {size: float(np.median(t)) for size, t in sizes.items()} for how, sizes in cpu["write"].items()},
        "machine": cpu["machine"],
    }


def cases(inputs: dict[str, Any]) -> Iterator[Case]:
    for cores in (1, 4, 8, 16, 24, PLENTY):
        for merging in (NONE,) if cores == 1 else (NONE, MEASURED, COUNTED) if cores >= 16 else (NONE, MEASURED):
            yield Case(VIT, merging, cores)
    for cores in (1, 4, 8):
        yield from (Case(EVA, merging, cores) for merging in ((NONE,) if cores == 1 else (NONE, MEASURED)))
    for what, settings in troubles(inputs).items():
        yield from (Case(VIT, merging, PLENTY, what, settings) for merging in (NONE, MEASURED))
        if what.startswith(("one disk", "a worker dies every 4 h")):
            yield Case(VIT, NONE, FEW, what, settings)
    yield Case(VIT, NONE, PLENTY, "in units of 250 images", {"unit": 250})


def troubles(inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What differs from the usual run."""
    rows, matrix = inputs["write"]["rows"], inputs["write"]["matrix"]
    four = {"between": 4.0, "back": 10.0}
    return {
        "shards of 10,000": {"shard": 10_000, "write": matrix["10000"]},
        "one GPU takes 3 times as long": {"stragglers": 1},
        "a worker dies every 24 h, back in 10 min": {"between": 24.0, "back": 10.0},
        "a worker dies every 4 h, back in 10 min": four,
        "the same, its batches done elsewhere": {**four, "elsewhere": True},
        "one disk of 8 at a tenth": {"slow_disks": 1},
        "the driver writes parts, row by row": {"writers": 0, "write": rows["1000"]},
        "Ray Data's driver, blocks of 64": {"collect": inputs["engine"]},
    }


def costs(inputs: dict[str, Any], model: str, merging: str) -> Costs:
    key = (model, merging)
    if key not in _COSTS:
        seconds = inputs["models"][model]["seconds"][merging]
        _COSTS[key] = Costs(*(np.array(each) for each in (inputs["decode"], inputs["bytes"], seconds)))
    return _COSTS[key]


_COSTS: dict[tuple[str, str], Costs] = {}


def setup(case: Case, inputs: dict[str, Any]) -> Setup:
    usual = {"unit": 1_000, "collect": inputs["collect"], "write": inputs["write"]["matrix"]["1000"]}
    return Setup(costs(inputs, case.model, case.merging), case.cores, **{**usual, **case.settings})


def report(found: dict[str, Any]) -> str:
    """The tables."""
    inputs, seeds = found["inputs"], found["seeds"]
    lines = [
        f"# {found['images'] / 1e6:,.0f} million images on 64 GPUs, simulated",
        "",
        described(found["machine"]),
        "",
    ]
    lines += [*paragraphs(inputs), "", "## What each stage reaches alone", "", *stages(inputs), ""]
    lines += ["## From how many cores for each GPU on merging saves", "", *break_even(inputs), ""]
    lines += ["## By cores for each GPU", "", f"Means of {seeds} seeds with Student's 95 % intervals; *limit* is the"]
    lines += [
        "busiest stage, and for how much of the time it works. GPU-hours and core-hours are of all 64 workers.",
        "",
    ]
    heads = ["model", "", "cores", "limit", "images/s", "hours", "GPU-hours", "core-hours", "hours saved"]
    lines += [f"| {' | '.join(heads)} |", "|---|---|--:|---|--:|--:|--:|--:|--:|"]
    known = {case.name: case for case in cases(inputs)}
    usual = [case for case in known.values() if case.what == USUAL]
    lines += [f"| {case.model} | {case.merging} | {case.cores} | {cells(case, found)} |" for case in usual]
    lines += ["", "## What goes wrong", "", f"{VIT}. *Again*: images decoded or embedded twice, of a million."]
    lines += [
        "A batch waits until its worker is back, unless done elsewhere: where that is near the end, so does the run.",
        "",
    ]
    heads = ["", "", "cores", "again", "limit", "images/s", "hours", "GPU-hours", "core-hours", "hours saved"]
    lines += [f"| {' | '.join(heads)} |", "|---|---|--:|--:|---|--:|--:|--:|--:|--:|"]
    for case in known.values():
        if case.model == VIT and case.merging != COUNTED and case.cores in (FEW, PLENTY):
            again = np.mean([run["again"] for run in found["runs"][case.name]]) / found["images"] * 1e6
            lines.append(f"| {case.what} | {case.merging} | {case.cores} | {again:,.0f} | {cells(case, found)} |")
    return "\n".join([*lines, "", *lost(found), ""])


def paragraphs(inputs: dict[str, Any]) -> list[str]:
    """Where the numbers come from."""
    decode, draft = (1e3 * np.mean(inputs[how]) for how in ("decode", "draft"))
    rate = BATCH / np.median(inputs["models"][VIT]["seconds"][NONE])
    said = [
        f"""An image is a JPEG of {np.mean(inputs["bytes"]) / 1e3:.0f} kB on average ({len(inputs["bytes"])} drawn, of
        640×480 to 2000×1500), which takes a core {decode:.1f} ms to decode and prepare at {inputs["side"]} pixels,
        {draft:.1f} ms where Pillow's `draft` decodes at a fraction of its sides. Ray Data's driver works
        {1e3 * inputs["engine"]:.1f} ms for a block, on one node whose two cores gave it few at once; with more at
        once it may take less for each. [All measured](corpus_costs.json); each image and each batch of a run is drawn
        from those measured.""",
        *(f"{name}: {gpu['gpu']}, {gpu['from']}." for name, gpu in inputs["models"].items()),
        f"""*By arithmetic* is what multiply-accumulates allow, and was not measured. Assumed: 8 disks of 4 GB/s, which
        shards are dealt out to; 10 Gb/s to the driver, and beside it 8 threads that write parts, of 1,000 images, from
        one matrix. Not in it: loading at the start, and copies to GPUs and between machines; as float32, pixels for one
        GPU with
        {VIT} are {rate * 4 * 3 * inputs["side"] ** 2 / 1e9:.1f} GB/s.""",
    ]
    return "\n\n".join(textwrap.fill(" ".join(each.split()), 120) for each in said).split("\n")


def stages(inputs: dict[str, Any]) -> list[str]:
    """Ceilings, from the formula."""
    rows = [
        (f"64 GPUs, {model}, {merging}", ceilings(setup(Case(model, merging, 1), inputs))["GPUs"])
        for model in (VIT, EVA)
        for merging in (NONE, MEASURED, COUNTED)
    ]
    for cores in (1, 4, 8, 16, PLENTY):
        usual = setup(Case(VIT, NONE, cores), inputs)
        drafts = replace(usual, costs=replace(usual.costs, decode=np.array(inputs["draft"])))
        rows += [(f"64×{cores} cores", ceilings(usual)["cores"]), ("… with `draft`", ceilings(drafts)["cores"])]
    usual, write = setup(Case(VIT, NONE, 1), inputs), inputs["write"]["rows"]
    drivers = {
        "the driver, which collects alone": {},
        "… by 1 Gb/s": {"network": 1.25e8},
        "… and writes parts of 1,000, row by row": {"writers": 0, "write": write["1000"]},
        "… and writes parts of 10,000, row by row": {"writers": 0, "write": write["10000"], "shard": 10_000},
        "Ray Data's driver, blocks of 64 images": {"collect": inputs["engine"]},
        "… blocks of 256": {"collect": inputs["engine"] / 4},
    }
    rows += [("8 disks", ceilings(usual)["disks"])]
    rows += [("… one of them at a tenth", ceilings(replace(usual, slow_disks=1))["disks"])]
    rows += [(what, ceilings(replace(usual, **settings))["driver"]) for what, settings in drivers.items()]
    return ["| | images/s |", "|---|--:|", *(f"| {what} | {rate:,.0f} |" for what, rate in rows)]


def break_even(inputs: dict[str, Any]) -> list[str]:
    """Cores that feed one GPU, and what the images cost where both are always busy."""
    lines = [
        "Fewer cores than feed the unmerged model: merging saves nothing. As many as feed the merged one: all that it"
    ]
    lines += ["can. Where both are always busy, a hundred million images cost these hours.", ""]
    lines += [
        "| | cores for each GPU | with `draft` | GPU-hours | core-hours | with `draft` |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    cores = [np.mean(inputs[how]) for how in ("decode", "draft")]
    for model, gpu in inputs["models"].items():
        for merging, seconds in gpu["seconds"].items():
            each = np.median(seconds) / BATCH
            hours = [1e8 * one / 3600 for one in (each, *cores)]
            lines.append(
                f"| {model}, {merging} | **{cores[0] / each:.1f}** | {cores[1] / each:.1f} "
                f"| {hours[0]:.1f} | {hours[1]:.0f} | {hours[2]:.0f} |"
            )
    return lines


def cells(case: Case, found: dict[str, Any]) -> str:
    """A row's measures: of its runs, and of hours what they are beside the same runs unmerged."""
    runs, workers = found["runs"][case.name], Setup.workers
    hours = over_seeds([run["seconds"] / 3600 for run in runs])
    used = {stage: np.mean([run["used"][stage] for run in runs]) for stage in runs[0]["used"]}
    limit = max(used, key=lambda stage: used[stage])
    saved = ""
    if case.merging != NONE:
        own = found["runs"][replace(case, merging=NONE).name]
        part = over_seeds([1 - run["seconds"] / unmerged["seconds"] for run, unmerged in zip(runs, own)])
        saved = f"{part.value:.1%} [{part.low:.1%}, {part.high:.1%}]"
    return (
        f"{limit} {used[limit]:.0%} | {found['images'] / 3600 / hours.value:,.0f} "
        f"| {hours.value:.3f} [{hours.low:.3f}, {hours.high:.3f}] | {workers * hours.value:.1f} "
        f"| {workers * case.cores * hours.value:,.0f} | {saved}"
    )


def lost(found: dict[str, Any]) -> list[str]:
    """What a killed run loses."""
    held = {
        size: np.mean([run["held"] for run in found["runs"][Case(VIT, NONE, PLENTY, what).name]])
        for size, what in (("1,000", "in units of 250 images"), ("10,000", "shards of 10,000"))
    }
    said = "; ".join(
        f"{images / 1e6:.1f} million ({images * EMBEDDING / 1e9:.0f} GB) with shards of {size}"
        for size, images in held.items()
    )
    return [f"Embedded and in no part yet, at most, which the driver holds and a killed run loses: {said}."]


def plot(found: dict[str, Any], path: Path) -> None:
    """Images a second over cores for each GPU, of both models, with what cores alone reach."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    colours = {NONE: "0.4", MEASURED: "#0b6e99", COUNTED: "#c2571a"}
    known = [case for case in cases(found["inputs"]) if case.what == USUAL]
    for axis, model in zip(figure.subplots(1, 2), (VIT, EVA)):
        for merging, colour in colours.items():
            rows = [case for case in known if (case.model, case.merging) == (model, merging)]
            if not rows:
                continue
            seconds = [np.mean([run["seconds"] for run in found["runs"][case.name]]) for case in rows]
            rates = found["images"] / np.array(seconds) / 1e3
            axis.plot([case.cores for case in rows], rates, "o-", color=colour, label=merging, markersize=4)
        most = max(case.cores for case in known if case.model == model)
        axis.plot(
            [0, most], [0, 64 * most / np.mean(found["inputs"]["decode"]) / 1e3], ":", color="black", label="decoding"
        )
        axis.set(
            title=f"{model}, {found['inputs']['models'][model]['gpu']}", xlabel="cores for each GPU", xlim=(0, None)
        )
        axis.set(ylabel="thousand images/s, 64 GPUs", ylim=(0, 1.7 * max(axis.lines[0].get_ydata())))
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
