"""Is an encoder as fast as in another checkout? The same model, here and there, in processes that take turns.

    git worktree add /tmp/before v0.9                        # the checkout to compare with
    python benchmarks/against.py --source /tmp/before        # ViT-B/16-384, r=35, batch 8, fp32: about ten minutes
    python benchmarks/against.py --source /tmp/before --case dinov2-s-224 --dtype bf16

Each process measures, round by round, the model itself and with turbovlm (process CPU time). Written are
benchmarks/results/against.{json,md}: the speed-up in each checkout, its efficiency (the speed-up over what the ratio of
multiply-accumulates allows), and the time with turbovlm here over that there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from cases import CASES, CPU_CASES, DTYPES, RESULTS, build, described, images, machine, save
from structure import in_checkout

import turbovlm
from turbovlm import TurboConfig
from turbovlm.profile import compare

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure in turn, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="DIR", help="the other checkout")
    parser.add_argument("--case", choices=CPU_CASES, default="vit-b-384", help="encoder (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images at a time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="in a process (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=3, metavar="N", help="of each checkout (default: %(default)s)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.case, args.dtype, args.batch, args.rounds)))
        return
    if args.source is None or not (args.source / "src" / "turbovlm").is_dir():
        parser.error(f"--source {args.source}: has no src/turbovlm")
    checkouts: dict[str, list[dict[str, Any]]] = {"there": [], "here": []}
    for number in range(args.processes):
        order = list(checkouts) if number % 2 == 0 else list(reversed(checkouts))
        for name in order:
            checkouts[name].append(_process(ROOT if name == "here" else args.source.resolve()))
            print(name, checkouts[name][-1], file=sys.stderr, flush=True)
    what = {"case": args.case, "dtype": args.dtype, "batch": args.batch, "rounds": args.rounds}
    found = {"machine": machine(), **what, "checkouts": checkouts}
    save(RESULTS / "against.json", found)
    (RESULTS / "against.md").write_text(report(found))
    print(report(found))


def _process(source: Path) -> dict[str, Any]:
    """What a fresh process measures that imports turbovlm from a checkout."""
    result = in_checkout(source, __file__, *sys.argv[1:], "--measure")
    if not result["package"].startswith(str(source)):
        raise SystemExit(f"turbovlm was imported from {result['package']}, not from {source}")
    return result


def measured(name: str, dtype: str, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round of the model itself and with turbovlm, and the ratio of multiply-accumulates."""
    case = CASES[name]
    model, inputs = build(case, DTYPES[dtype]), images(case, batch, DTYPES[dtype])
    found = compare(model, inputs, {"turbo": TurboConfig(case.r, blocks="every")}, rounds=rounds, warmup=1)
    plain, turbo = ([float(s) for s in run.seconds] for run in found.runs)
    ratio = found.runs[0].macs / found.runs[1].macs
    return {"package": turbovlm.__file__, "plain": plain, "turbo": turbo, "macs_ratio": ratio}


def report(found: dict[str, Any]) -> str:
    """Both checkouts, a row each, and the ratio of their times."""
    case, rows, medians = CASES[found["case"]], [], {}
    for name, processes in found["checkouts"].items():
        ups = [p / t for each in processes for p, t in zip(each["plain"], each["turbo"])]
        medians[name] = statistics.median(t for each in processes for t in each["turbo"])
        allowed = processes[0]["macs_ratio"]
        low, up, high = statistics.quantiles(ups, n=4)
        rows.append(
            f"| {name} | {medians[name]:.2f} | {up:.3f}× | {low:.3f}–{high:.3f} | {allowed:.3f}× | {up / allowed:.3f} |"
        )
    shares = [
        statistics.median(here["turbo"]) / statistics.median(there["turbo"])
        for here, there in zip(found["checkouts"]["here"], found["checkouts"]["there"])
    ]
    return (
        "\n".join(
            [
                "# An encoder here and in another checkout",
                "",
                described(found["machine"]),
                "",
                f"{case.name}, r={case.r}, batch {found['batch']}, {found['dtype']}; {len(shares)} processes each, in "
                f"turn, of {found['rounds']} rounds. Process CPU time.",
                "",
                "| checkout | s with turbovlm | speed-up | quartiles | MACs | efficiency |",
                "|---|--:|--:|--:|--:|--:|",
                *rows,
                "",
                f"Time with turbovlm, here over there: {medians['here'] / medians['there']:.3f} of the medians; pairs "
                f"of processes {min(shares):.3f} to {max(shares):.3f}.",
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
